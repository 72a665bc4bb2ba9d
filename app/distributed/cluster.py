"""Connect to a Ray cluster, and deploy versions of models there.

    version of a model --deploy--> application of Ray Serve: replicas, autoscaled on the requests in progress
    cifar100.<store>.<model>.<version>.<settings>     its name

All HTTP processes with the same store and the same settings share the applications. Ray's own HTTP proxy is not
started.
"""

import hashlib
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any, NamedTuple

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from app.distributed.replica import EngineReplica, ReplicaOptions
from app.settings import Settings
from training import ray_cluster
from training.ray_cluster import ClusterError
from training.runtimes.engine import EngineError, EngineNotReady
from training.store import ModelCard, Store

log = logging.getLogger(__name__)

_DEPLOYMENT = "engine"
_PREFIX = "cifar100"
_WAIT_S = 60.0
_SHORT_WAIT_S = 5.0
_CONNECT_S = 60.0
_POLL_S = 0.2


class Application(NamedTuple):
    """An application of this store in the cluster."""

    id: str
    """Name of the application in the cluster."""
    model: str
    version: int
    replicas: int
    """Number of replicas that are ready."""


class _Lock:
    """An actor whose name is a lock. Ray ends it with the process that made it."""


class Cluster:
    """A connection to a Ray cluster with Serve.

    Args:
        settings: Address, replicas and resources.
        store: The model store. Every node of the cluster can open its location.
    """

    def __init__(self, settings: Settings, store: Store):
        self._settings = settings
        self._models = store.location
        self._is_full = False  # the last wait for a replica was in vain
        self._lock = threading.Lock()  # Serve's configurations and statuses cannot be created in two threads at once

    def connect(self) -> None:
        """Connect to the cluster, or start one on this machine. Call this in the main thread of a server process.

        Raises:
            ClusterError: There is no cluster at the address, or it does not answer.
        """
        ray_cluster.connect(self._settings.cluster or ray_cluster.LOCAL)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it warns about every busy replica
        with _hold_lock("serve"):  # only one process can start Serve
            serve.start(proxy_location="Disabled")

    def close(self) -> None:
        """Disconnect. The applications go on, except those of a local cluster."""
        with self._lock:
            ray_cluster.disconnect()

    def deploy(self, card: ModelCard) -> tuple[str, "DeploymentHandle[EngineReplica]", str]:
        """Deploy a version unless it is deployed, and wait until it has a replica.

        Returns:
            The name of the application, a connected handle, and the name of the engine.

        Raises:
            EngineNotReady: There is no replica yet. Call this method again.
            EngineError: The replicas cannot load the version.
        """
        application = self._application_id(card)
        try:
            with _hold_lock(application):
                while _is_deleting(status := self._statuses().get(application)):
                    time.sleep(_POLL_S)
                if status is None:
                    log.info("%s is deployed to the cluster", application)
                    with self._lock:
                        target = serve.RunTarget(self._bind(card), name=application, route_prefix=None)
                        serve.run_many([target], wait_for_applications_running=False)
            self._wait_until_ready(application)
            handle = serve.get_app_handle(application)
            return application, handle, handle.engine_name.remote().result(timeout_s=_CONNECT_S)
        except (RayError, RayServeException, TimeoutError, ValueError) as error:
            raise EngineError(f"the cluster cannot serve {application}: {error}") from error

    def applications(self) -> list[Application]:
        """List the applications of this store, deployed with any settings.

        Raises:
            ClusterError: The cluster does not answer.
        """
        found = []
        try:
            applications = [each for each in self._statuses().items() if not _is_deleting(each[1])]
        except (RayError, RayServeException) as error:
            raise ClusterError(str(error)) from error
        for application, status in applications:
            prefix, _, rest = application.partition(f".{self._store_id()}.")
            if prefix == _PREFIX and rest:
                model, version, _ = rest.split(".")
                replicas = min((_count_ready(each) for each in status.deployments.values()), default=0)
                found.append(Application(application, model, int(version), replicas))
        return found

    def delete(self, application: Application) -> None:
        """Delete an application. Its replicas finish their requests meanwhile.

        Raises:
            ClusterError: The cluster does not answer.
        """
        log.info("%s is deleted from the cluster", application.id)
        try:
            serve.delete(application.id, _blocking=False)
        except (RayError, RayServeException) as error:
            raise ClusterError(str(error)) from error

    def _statuses(self) -> dict[str, Any]:
        """Return the status of every application in the cluster, by its name."""
        with self._lock:
            return dict(serve.status().applications)

    def _wait_until_ready(self, application: str) -> None:
        """Wait until an application has a replica.

        After a wait in vain, the next one is short: the cluster may be full, and other models must not wait for it.

        Raises:
            EngineNotReady: There is no replica yet. The cluster goes on to start one.
            EngineError: The replicas cannot load the version. The application is deleted.
        """
        end = time.monotonic() + (_SHORT_WAIT_S if self._is_full else _WAIT_S)
        while True:
            overview = self._statuses().get(application)
            deployments = list(overview.deployments.values()) if overview else []
            message = "; ".join(each.message for each in deployments if each.message)
            if overview is None or overview.status == "DEPLOY_FAILED":
                serve.delete(application, _blocking=False)
                raise EngineError(f"the cluster cannot serve {application}: {message or 'it was deleted'}")
            if deployments and all(map(_count_ready, deployments)):
                self._is_full = False
                return
            if time.monotonic() >= end:
                self._is_full = True
                raise EngineNotReady(f"{application} has no replica yet: {message or 'the cluster starts one'}")
            time.sleep(_POLL_S)

    def _bind(self, card: ModelCard) -> Any:
        """Return the application of a version, with its replicas, resources and limits."""
        settings = self._settings
        options = self._replica_options(card)
        deployment = serve.deployment(EngineReplica).options(
            name=_DEPLOYMENT,
            max_ongoing_requests=options.max_requests,
            autoscaling_config={
                "min_replicas": settings.cluster_min_replicas,
                "max_replicas": settings.cluster_max_replicas,
                "target_ongoing_requests": settings.cluster_calls,
            },
            ray_actor_options={"num_cpus": settings.cluster_cpus, "num_gpus": settings.cluster_gpus},
            max_constructor_retry_count=2,
        )
        return deployment.bind(options)

    def _replica_options(self, card: ModelCard) -> ReplicaOptions:
        settings = self._settings
        max_requests = 2 * settings.max_batch  # one batch is computed while the next one gathers
        uses_cpu = settings.device == "auto" and not settings.cluster_gpus  # it must not use GPUs that others reserve
        return ReplicaOptions(
            models=self._models,
            name=card.name,
            version=card.version,
            device="cpu" if uses_cpu else settings.device,
            runtime=settings.runtime,
            threads=max(1, int(settings.cluster_cpus)),
            max_batch=settings.max_batch,
            max_requests=max_requests,
        )

    def _application_id(self, card: ModelCard) -> str:
        settings = self._settings
        replicas = settings.cluster_min_replicas, settings.cluster_max_replicas, settings.cluster_calls
        resources = settings.cluster_cpus, settings.cluster_gpus
        content = _digest(astuple(self._replica_options(card)), replicas, resources, sorted(card.files.items()))
        return f"{_PREFIX}.{self._store_id()}.{card.name}.{card.version}.{content}"

    def _store_id(self) -> str:
        return _digest(self._models)


def _digest(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:8]


def _count_ready(deployment: Any) -> int:
    """Return the number of replicas of a deployment that answer requests."""
    return int(deployment.replica_states.get("RUNNING", 0))


def _is_deleting(status: Any) -> bool:
    return status is not None and status.status == "DELETING"


@contextmanager
def _hold_lock(name: str) -> Iterator[None]:
    """Hold a lock of the whole cluster. Without it, a second process would replace the replicas of the first one."""
    while True:
        try:
            lock = ray.remote(_Lock).options(name=f"lock.{name}", namespace=ray_cluster.NAMESPACE, num_cpus=0).remote()
            break
        except ValueError:  # another process holds the lock
            time.sleep(_POLL_S)
    try:
        yield
    finally:
        ray.kill(lock)
