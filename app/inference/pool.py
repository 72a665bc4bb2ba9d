"""Keep the live version of each model in memory, and hot-swap it when the store's live pointer changes.

In: the model store.  Out: `Model` objects that compute predictions. A swap replaces a reference. Requests that hold the
old version finish on it, later requests get the new version, and the old version is freed after its last request.
"""

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from app.exceptions import NotFound, Unavailable
from app.inference import decoding
from app.inference.batching import Batcher, BatchTimes, EngineBatcher
from app.inference.cascade import CascadeBatcher
from app.inference.model_check import check_fit
from app.inference.statistics import ModelStatistics
from app.machine import cpu_count
from app.observability.metrics import Metrics
from app.observability.tracing import Tracing
from app.settings import Settings
from app.tasks import cancel_and_wait
from app.threads import Threads
from training.encoding import replace_surrogates
from training.runtimes import selection
from training.runtimes.engine import EngineNotReady
from training.store import CASCADE, MODEL, ModelCard, Store, StoreError
from training.text import quote

if TYPE_CHECKING:
    from app.distributed.cluster import Application, Cluster

log = logging.getLogger(__name__)

_MAX_OLD_VERSIONS = 2
_THREADS = 2  # one polls the live versions, the other loads versions on request
_RETRY_S = 30.0  # wait after a live version failed to load

Version = Annotated[int, Field(ge=1, lt=10**9)]
"""A model's version number in a request."""


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded model version with its batcher. A cascade keeps the versions that it pins in memory as `members`."""

    card: ModelCard
    batcher: EngineBatcher | CascadeBatcher
    members: "tuple[Model, ...]" = ()
    application: str | None = None
    """Name of the application that computes the version in a cluster."""
    statistics: ModelStatistics = field(default_factory=ModelStatistics)
    loaded: datetime = field(default_factory=lambda: datetime.now(UTC))


class ModelPool:
    """The live models by name, and up to two other versions that requests asked for.

    Args:
        settings: Device, batch and queue sizes, and poll interval.
        store: The model store.
        metrics: Metrics of batches, cascades and loads.
        tracing: Traces of batches and cascades, or None.
    """

    def __init__(self, settings: Settings, store: Store, metrics: Metrics, tracing: Tracing | None):
        self.store = store
        self._metrics = metrics
        self._tracing = tracing
        self.errors: dict[str, str] = {}
        """Reason why the live version of a model is not served, by model name."""
        self._settings = settings
        self._live: dict[str, Model] = {}
        self._others: OrderedDict[tuple[str, int], Model] = OrderedDict()
        self._refreshing = asyncio.Lock()
        self._loading = asyncio.Lock()  # held while a version that is not live is loaded
        self._failures: dict[str, tuple[int, float]] = {}  # failed live version and time, by model name
        self._watcher: asyncio.Task[None] | None = None
        self._threads = Threads("the model store", _THREADS, patience_s=_RETRY_S)
        self._cluster: Cluster | None = None
        self._applications = set[str]()  # applications of the cluster at the last refresh, and those deployed since
        self._deploying = set[tuple[str, int]]()  # names and versions that this process deploys now
        self._unneeded = dict[str, float]()  # time since which no version in use needs an application, by its name

    async def start(self) -> None:
        """Connect to the cluster, if there is one. Load every live model, then start to poll the store."""
        if self._settings.cluster:
            from app.distributed.cluster import Cluster

            self._cluster = Cluster(self._settings, self.store)
            self._cluster.connect()
        await self.refresh()
        if not self._live:
            location = self.store.location
            log.warning("no model of the store %s is live: the service is not ready until one is", location)
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Stop to poll the store. The models stay in memory until they are dropped."""
        await cancel_and_wait(self._watcher)
        self._threads.close()
        if self._cluster:
            self._cluster.close()

    @property
    def ready(self) -> bool:
        """True if at least one model is live, and every model with a live version is loaded and warm."""
        return bool(self._live) and not self.errors.keys() - self._live.keys()

    def live(self) -> dict[str, Model]:
        """Return the live models by name."""
        return dict(self._live)

    def loaded(self) -> list[Model]:
        """Return the models in memory: the live ones, and other versions that requests asked for."""
        return [*self._live.values(), *self._others.values()]

    def peek(self, name: str | None, version: int | None = None) -> Model | None:
        """Return a model that is in memory, or None. The default name and version are those of `get`."""
        name = name or self._default() or ""
        model = self._live.get(name)
        if version is None or (model and model.card.version == version):
            return model
        return self._others.get((name, version))

    async def get(self, name: str | None = None, version: int | None = None, patient: bool = False) -> Model:
        """Return a model to predict with. For a live model this does not yield to the event loop.

        Args:
            name: Model name. The default is the configured model, or else a live cascade, or else the most accurate
                live model.
            version: Version number. The default is the live version. Other versions are loaded on demand, one at a
                time.
            patient: If true, wait while another version is loaded. If false, raise Unavailable.

        Raises:
            NotFound: The model or version does not exist.
            Unavailable: No model is live, or the model exists but cannot be served, or cannot be served now.
        """
        if name is None:
            name = self._default()
        if name is None:
            raise Unavailable(
                "no model is live; train one: curl -X POST /train, or python -m training train resnet", "no_model"
            )
        model = self._live.get(name)
        if model and version in (None, model.card.version):
            return model
        if version is None:
            raise self._not_live_error(name)
        if (name, version) in self._others:
            self._others.move_to_end((name, version))
            return self._others[name, version]
        if pinned := self._find_loaded(name, version):
            return pinned
        return await self._load_other(name, version, patient)

    async def refresh(self) -> None:
        """Load every live version of the store that is not in memory yet."""
        async with self._refreshing:
            if self._cluster:
                await self._read_cluster(self._cluster)
            names = await self._threads.run(self.store.names)
            for name in sorted({*names, *self._live}):
                try:
                    version = await self._threads.run(self.store.live, name)
                    current = self._live.get(name)
                    if version is None or (current and current.card.version == version and self._is_deployed(current)):
                        if current:
                            await self._threads.run(self._require_stored, current.card, version)
                        self.errors.pop(name, None)
                        continue
                    model = self._find_loaded(name, version)  # by an earlier request, or pinned by a cascade
                    self._others.pop((name, version), None)
                    if model is None:
                        failed, at = self._failures.get(name, (None, 0.0))
                        if failed == version and time.monotonic() < at + _RETRY_S:
                            continue
                        self._failures[name] = version, time.monotonic()
                        model = await self._threads.run(self._load, name, version)
                    self._failures.pop(name, None)
                    self._live[name] = model
                    self.errors.pop(name, None)
                    log.info("%s version %d is live (%s)", name, version, model.batcher.engine_name)
                except (StoreError, OSError, RuntimeError) as error:
                    reason = replace_surrogates(str(error))
                    if self.errors.get(name) != reason:
                        log.error("%s: the live version cannot be loaded: %s", name, error)
                        self.errors[name] = reason
                        if name not in self._live and not isinstance(error, EngineNotReady):
                            await self._threads.run(self._fall_back, name)

    async def _read_cluster(self, cluster: "Cluster") -> None:
        """Find out which applications and replicas the cluster has.

        Delete the applications that nothing has needed for some time.

        The replicas of a deleted application answer their requests. Another process may still serve its version to
        requests that name it. That process deploys it again.
        """
        from app.distributed.remote_batcher import RemoteBatcher

        try:
            applications = await self._threads.run(cluster.applications)
            self._applications = {each.id for each in applications}
            replicas = {each.id: each.replicas for each in applications}
            for model in self._list_computed():
                if isinstance(model.batcher, RemoteBatcher) and model.application in replicas:
                    model.batcher.replicas = max(1, replicas[model.application])
            for key in [key for key, model in self._others.items() if not self._is_deployed(model)]:
                del self._others[key]
            unneeded = [each for each in applications if not await self._threads.run(self._is_needed, each)]
            now = time.monotonic()
            self._unneeded = {each.id: self._unneeded.get(each.id, now) for each in unneeded}
            for each in unneeded:
                if now >= self._unneeded[each.id] + self._settings.cluster_keep_s:
                    await self._threads.run(cluster.delete, each)
        except ConnectionError as error:
            log.error("the cluster does not answer: %s", error)

    def _is_needed(self, application: "Application") -> bool:
        """Return True if a version is live, a cascade pins it, or this process deploys it or has it in memory."""
        if (application.model, application.version) in self._deploying:
            return True
        if any(each.application == application.id for each in self._list_computed()):
            return True
        name, version = application.model, application.version
        try:
            return version == self.store.live(name) or version in self.store.pins(name)
        except StoreError:  # the live pointer is damaged
            return True

    def _list_computed(self) -> list[Model]:
        """Return the models in memory and the members of cascades."""
        return [each for model in self.loaded() for each in (model, *model.members)]

    def _is_deployed(self, model: Model) -> bool:
        """Return True if this process computes a model, or the cluster has all its applications."""
        needed = {each.application for each in (model, *model.members) if each.application}
        return needed <= self._applications

    def _require_stored(self, card: ModelCard, live: int | None) -> None:
        """Check that the store still has a version that is served from memory.

        Raises:
            StoreError: The version's folder, one of its files or the live pointer is missing.
        """
        try:
            self.store.require_files(card)
            if live is None:
                raise StoreError(f"{card.name} has no live version in {self.store.location} anymore; promote a version")
        except StoreError as error:
            raise StoreError(f"version {card.version} is served from memory until the next start: {error}") from None

    def _fall_back(self, name: str) -> None:
        """Serve the latest version that loads, because the live version does not."""
        for version in reversed(self.store.versions(name)):
            try:
                self._live[name] = self._load(name, version)
            except (StoreError, OSError, RuntimeError) as error:
                log.warning("%s: version %d cannot be loaded either: %s", name, version, error)
            else:
                log.warning("%s: version %d is served instead", name, version)
                return

    async def _watch(self) -> None:
        failure = ""
        while True:
            await asyncio.sleep(self._settings.store_poll_s)
            try:
                await self.refresh()
            except OSError as error:
                if failure != str(error):  # logged once, not at every poll
                    log.error("the model store cannot be read: %s", error)
                failure = str(error)
            except Exception:  # one failed refresh must not end the polling
                log.exception("the model store cannot be read")
            else:
                failure = ""

    def _load(self, name: str, version: int) -> Model:
        started = time.perf_counter()
        try:
            model = self._load_version(name, version)
        except Exception:
            self._metrics.count_load_failure(name)
            raise
        self._metrics.observe_load(name, time.perf_counter() - started)
        return model

    def _load_version(self, name: str, version: int) -> Model:
        card = self.store.card(name, version)
        folder = self.store.verify(card)
        if CASCADE in card.files:
            return self._load_cascade(card)
        statistics = ModelStatistics()

        def observe(times: BatchTimes) -> None:
            statistics.count_batch(times)
            self._metrics.observe_batch(name, times)

        if self._cluster:
            return self._deploy(self._cluster, card, statistics, observe)
        engine = selection.load(folder / MODEL, self._settings.device, self._settings.runtime)
        check_fit(card, engine)
        cpus = cpu_count()
        batcher = Batcher(
            engine,
            self._settings.max_batch,
            self._settings.max_queue,
            observe,
            shares_cpu=cpus == 1,
            busy_photos=cpus if 1 < cpus <= decoding.MAX_THREADS else math.inf,
            trace=self._trace_batches(card, engine.name),
        )
        return Model(card, batcher, statistics=statistics)

    def _deploy(
        self, cluster: "Cluster", card: ModelCard, statistics: ModelStatistics, observe: Callable[[BatchTimes], None]
    ) -> Model:
        """Deploy a version to the cluster, or use its application if another process has deployed it."""
        from app.distributed.remote_batcher import RemoteBatcher

        def observe_decoding(started: float, ended: float) -> None:
            self._metrics.observe_decoding("batch", ended - started)
            if self._tracing:
                self._tracing.record_decoding("batch", started, ended)

        self._deploying.add((card.name, card.version))
        try:
            application, handle, engine_name = cluster.deploy(card)
        finally:
            self._deploying.discard((card.name, card.version))
        self._applications.add(application)
        batcher = RemoteBatcher(
            handle,
            application,
            engine_name,
            self._settings.max_batch,
            self._settings.max_queue,
            observe,
            observe_decoding,
            self._trace_batches(card, engine_name),
        )
        return Model(card, batcher, statistics=statistics, application=application)

    def _trace_batches(self, card: ModelCard, engine_name: str) -> Callable[[float, BatchTimes], None] | None:
        """Return the callback for the traces of a version's batches, or None without traces."""
        return partial(self._tracing.record_batch, card.name, card.version, engine_name) if self._tracing else None

    def _load_cascade(self, card: ModelCard) -> Model:
        cascade = self.store.cascade(card)
        members = tuple(
            self._find_loaded(pinned.name, pinned.version) or self._load(pinned.name, pinned.version)
            for pinned in cascade.members
        )
        batchers = list[EngineBatcher]()
        for member in members:
            if member.card.classes != card.classes or isinstance(member.batcher, CascadeBatcher):
                raise StoreError(
                    f"{member.card.name} version {member.card.version} does not fit {card.name}; fit it again"
                )
            batchers.append(member.batcher)
        observe = partial(self._metrics.observe_cascade, card.name)
        trace = partial(self._tracing.span, "cascade") if self._tracing else nullcontext
        return Model(card, CascadeBatcher(cascade, batchers[0], batchers[1], observe, trace), members)

    def _find_loaded(self, name: str, version: int) -> Model | None:
        """Return a version that is in memory because it is live, was asked for, or is pinned by a loaded cascade."""
        loaded = [*self._live.values(), *self._others.values()]
        models = loaded + [member for model in loaded for member in model.members]
        wanted = (model for model in models if (model.card.name, model.card.version) == (name, version))
        return next(filter(self._is_deployed, wanted), None)

    async def _load_other(self, name: str, version: int, patient: bool) -> Model:
        self._require_version(name, version)
        if self._loading.locked() and not patient:
            raise Unavailable("another version is being loaded; try again later", "no_model")
        async with self._loading:
            model = self._others.get((name, version))  # another request may have loaded it meanwhile
            if model is None:
                try:
                    model = await self._threads.run(self._load, name, version)
                except (StoreError, OSError, RuntimeError) as error:
                    self._require_version(name, version)  # raises NotFound if a training job has removed it
                    raise Unavailable(f"{name} version {version} cannot be loaded: {error}", "no_model") from error
                self._others[name, version] = model
                while len(self._others) > _MAX_OLD_VERSIONS:
                    self._others.popitem(last=False)
            return model

    def _require_version(self, name: str, version: int) -> None:
        try:
            self.store.require(name, version)
        except StoreError as error:
            raise NotFound(f"{error}; GET /models lists all") from None

    def _default(self) -> str | None:
        """Return the name of the configured model, or else of the live one with the highest rank."""
        highest = max(self._live, key=lambda name: self._live[name].card.rank, default=None)
        return self._settings.default_model or highest

    def _not_live_error(self, name: str) -> NotFound | Unavailable:
        if name in self.errors:
            return Unavailable(f"{name} cannot be served: {self.errors[name]}", "no_model")
        live = ", ".join(sorted(self._live)) or "none"
        return NotFound(f"there is no live model {quote(name)}, live are: {live}; GET /models lists all")
