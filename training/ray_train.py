"""Train a run with Ray Train: workers on the machines of a cluster form one process group.

    this process: the lock, the export --Ray Train--> workers: `loop.train` in a process group
                        ^                                 |
                        +--------- run folder <-----------+   metrics and checkpoints of the first worker

Every machine has the run folder and the model store at the same paths. A worker that dies ends the others. New workers
then continue from the last checkpoint. This module needs the extra `ray`.
"""

import os
import shutil
import threading
import time
from collections.abc import Generator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training import loop, ray_cluster
from training.dataset import Dataset
from training.errors import ReportedError
from training.loop import Epoch, Event, Tick
from training.phase_report import PhaseReport
from training.process_group import TIMEOUT, get_process_group, use_interface
from training.recipes import Recipe
from training.run import FollowedRun, Run
from training.store import Store, make_store

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.torch.config import _TorchBackend
from ray.util import get_node_ip_address

_MAX_FAILURES = 3  # failures in succession without a finished epoch
_POLL_S = 0.5
_RAY_FOLDER = "ray"  # Ray Train checks with it that all machines share the run folder
_EVENTS = {"tick": Tick, "epoch": Epoch, "phase": PhaseReport}


@dataclass(frozen=True)
class Workers:
    """The workers of a run and their cluster."""

    count: int = 1
    """Number of worker processes. Each one has an equal share of every batch."""
    cpus: int = 1
    """Processors of each worker, which are its threads on a CPU."""
    cluster: str = ray_cluster.LOCAL
    """Address of the cluster, see `ray_cluster.connect`."""


class WorkersFailed(ReportedError, RuntimeError):
    """The workers have failed several times in succession. The last checkpoint remains valid."""


class _Backend(_TorchBackend):  # type: ignore[misc]  # Ray is not typed
    """The process group of the workers, over the network interfaces that the nodes of the cluster use."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_use_interface_of_node)
        super().on_start(worker_group, backend_config)


class _Config(TorchConfig):  # type: ignore[misc]
    """The configuration of `_Backend`."""

    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend


def _use_interface_of_node() -> None:
    use_interface(get_node_ip_address())


def train(
    recipe: Recipe, dataset: Dataset, run: Run, store: Store | None, workers: Workers
) -> Generator[Event, None, None]:
    """Train a recipe on a cluster, starting from the run's checkpoint if there is one.

    The workers use GPUs, one each, if the cluster has enough of them.

    Args:
        recipe: Recipe of the run.
        dataset: Data set of the run, which this function sends to the workers.
        run: Folder of the run. The first worker writes metrics and checkpoints.
        store: Model store, see `loop.train`.
        workers: The workers and their cluster.

    Yields:
        Progress, and the result of every epoch, as the first worker records them.

    Raises:
        ClusterError: There is no cluster at the address, or it does not answer.
        WorkersFailed: The workers have failed `_MAX_FAILURES` times in succession.
        ReportedError: See `loop.train`.
    """
    ray_cluster.connect(workers.cluster)
    try:
        trainer = _make_trainer(recipe, dataset, run, store, workers)
        failures = 0
        while True:
            needed, free = workers.count * workers.cpus, ray.available_resources().get("CPU", 0.0)
            if free < needed:
                message = f"the workers need {needed} processors, and the cluster has {free:g} free; they wait for more"
                yield PhaseReport("loading", message, epoch=len(run.epochs()))
            finished = len(run.epochs())
            error = yield from _follow(trainer, run)
            if error is None:
                return
            failures = 1 if len(run.epochs()) > finished else failures + 1
            _raise_reported(error, failures)
            message = f"a worker has failed; new workers continue from the checkpoint: {_last_line(error)}"
            yield PhaseReport("loading", message, epoch=len(run.epochs()))
    finally:
        shutil.rmtree(run.path / _RAY_FOLDER, ignore_errors=True)
        ray_cluster.disconnect()


def _make_trainer(recipe: Recipe, dataset: Dataset, run: Run, store: Store | None, workers: Workers) -> TorchTrainer:
    use_gpu = ray.cluster_resources().get("GPU", 0) >= workers.count
    folder = run.path.resolve()
    config = {
        "recipe": recipe,
        "dataset": ray.put(dataset),
        "run": folder,
        "store": store and store.location,  # absolute, because workers have another working folder
        "threads": workers.cpus,
    }
    return TorchTrainer(
        _train_in_worker,
        train_loop_config=config,
        torch_config=_Config("nccl" if use_gpu else "gloo", timeout_s=int(TIMEOUT.total_seconds())),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers.count, use_gpu=use_gpu, resources_per_worker={"CPU": workers.cpus, "GPU": int(use_gpu)}
        ),
        run_config=ray.train.RunConfig(name=_RAY_FOLDER, storage_path=str(folder)),
    )


def _train_in_worker(config: dict[str, Any]) -> None:
    """Train in one worker. Ray Train calls this function in all workers at the same time."""
    group, device = get_process_group(), get_device()
    if device.type == "cpu":
        torch.set_num_threads(config["threads"])
    dataset = deepcopy(ray.get(config["dataset"]))  # the arrays of Ray are read-only, which PyTorch warns about
    folder: Path = config["run"]
    run = Run(folder) if group.is_first else FollowedRun(folder)
    for _ in loop.train(config["recipe"], dataset, run, device, config["store"] and make_store(config["store"]), group):
        pass


def _follow(trainer: TorchTrainer, run: Run) -> Generator[Event, None, Exception | None]:
    """Train, and yield the events that the first worker records. Return the error of the workers, or None."""
    errors = list[Exception]()

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            errors.append(error)

    last = max((number for number, _ in run.numbered_metrics()), default=0)
    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    is_alive = True
    while is_alive:
        time.sleep(_POLL_S)
        is_alive = thread.is_alive()
        for number, metrics in run.numbered_metrics(after=last):
            last = number
            yield _EVENTS[metrics["event"]](**metrics)
    return errors[0] if errors else None


def _raise_reported(error: Exception, failures: int) -> None:
    """Raise the error of a worker that a new worker would have as well.

    Raises:
        ReportedError: A worker has raised it, or the workers have failed too often.
    """
    for failure in getattr(error, "worker_failures", {}).values():
        cause = getattr(failure, "_base_exc", failure)
        if isinstance(cause, ReportedError):
            raise cause from error
    if failures == _MAX_FAILURES:
        raise WorkersFailed(
            f"the workers have failed {failures} times in succession: {_last_line(error)}; the last checkpoint is kept"
        ) from error


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
