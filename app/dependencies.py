"""Defines the object that holds everything the routes use. It is created at startup and injected by FastAPI."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, cast

from fastapi import Depends, Request
from prometheus_client.metrics_core import Metric

from app.clients import FairShares
from app.exceptions import Unavailable
from app.feedback import FEEDBACK, FeedbackStore
from app.inference.decoding import Decoders, Lane
from app.inference.load_shedding import LoadShedder
from app.inference.pool import ModelPool
from app.jobs.database import Database
from app.jobs.evaluation_queue import EvaluationQueue
from app.jobs.evaluation_runner import EvaluationRunner
from app.jobs.lease import LeaseKeeper
from app.jobs.overview import read_overview
from app.jobs.training_queue import TrainingQueue
from app.jobs.training_runner import TrainingRunner
from app.observability.metrics import Metrics
from app.observability.state import describe_build, describe_jobs, describe_models
from app.observability.tracing import Tracing
from app.settings import Settings
from app.threads import Threads
from app.version_upload import VersionReceiver
from training.store import Store, make_store

_SAMPLE_S = 1.0


@dataclass
class Services:
    """The objects that live as long as the application."""

    settings: Settings
    store: Store
    pool: ModelPool
    database: Database
    lease: LeaseKeeper
    training_jobs: TrainingQueue
    training_runner: TrainingRunner
    evaluation_jobs: EvaluationQueue
    evaluations: EvaluationRunner
    decoders: Decoders
    masked_images: FairShares
    """Number of masked images of explanations that are computed or wait, by client."""
    shedder: LoadShedder
    metrics: Metrics
    uploads: VersionReceiver
    feedback: FeedbackStore
    tracing: Tracing | None
    event_streams: FairShares
    """Number of clients that receive the events of jobs now, by network."""
    store_threads: Threads = field(default_factory=lambda: Threads("the model store", 4))
    """Threads in which requests read and change the model store."""
    draining: bool = False
    """True while the service is about to stop and should receive no further requests."""
    started: datetime = field(default_factory=lambda: datetime.now(UTC))

    @classmethod
    def create(cls, settings: Settings, tracing: Tracing | None = None) -> "Services":
        """Create the objects. `start` makes them work."""
        store = make_store(settings.models)
        metrics = Metrics()
        pool = ModelPool(settings, store, metrics, tracing)
        database = Database(settings.runs, settings.database, settings.job_lease_s)
        lease = LeaseKeeper(database)
        training_jobs, evaluation_jobs = TrainingQueue(settings, database), EvaluationQueue(database)
        decoders = Decoders(settings, partial(_observe_decoding, metrics, tracing))
        return cls(
            settings=settings,
            store=store,
            pool=pool,
            database=database,
            lease=lease,
            training_jobs=training_jobs,
            training_runner=TrainingRunner(settings, training_jobs, lease, pool.refresh),
            evaluation_jobs=evaluation_jobs,
            evaluations=EvaluationRunner(settings, evaluation_jobs, pool),
            decoders=decoders,
            masked_images=FairShares(settings.max_queue),
            shedder=LoadShedder(pool, decoders, bool(settings.trusted_proxies), metrics.count_shed),
            metrics=metrics,
            uploads=VersionReceiver(settings, store),
            feedback=FeedbackStore(settings.runs / FEEDBACK, settings.max_feedback, settings.feedback_days),
            tracing=tracing,
            event_streams=FairShares(settings.max_event_streams),
        )

    @property
    def ready(self) -> bool:
        """True if load balancers should send requests to this service."""
        return self.pool.ready and not self.draining

    async def read_state(self) -> list[Metric]:
        """Return the metrics of the state of the service. Bring those of this process up to date."""
        self.sample()
        overview = None
        with suppress(Unavailable):
            overview = await self.database.threads.read(read_overview, self.database)
        return [*describe_build(), *describe_models(self.pool), *describe_jobs(overview)]

    def sample(self) -> None:
        """Bring the metrics of this process up to date, so that all workers can read them."""
        queued = {name: model.batcher.waiting for name, model in self.pool.live().items()}
        self.metrics.sample(self.ready, queued, self.decoders.waiting + self.decoders.held_up)

    async def sample_periodically(self) -> None:
        """Call `sample` every second."""
        while True:
            self.sample()
            await asyncio.sleep(_SAMPLE_S)

    async def start(self) -> None:
        """Load the live models, open the job database and start to run jobs."""
        await self.pool.start()
        await self.database.threads.run(self.database.open)
        self.lease.start()
        self.training_runner.start()
        self.evaluations.start()

    async def stop(self) -> None:
        """Stop all work. Unfinished jobs go on at the next start."""
        self.metrics.flush()
        await self.training_runner.stop()
        await self.evaluations.stop()
        await self.lease.stop()
        self.uploads.close()
        self.feedback.threads.close()
        self.database.close()
        await self.pool.stop()
        self.store_threads.close()
        self.decoders.close()
        if self.tracing:
            await asyncio.to_thread(self.tracing.close)


def _observe_decoding(metrics: Metrics, tracing: Tracing | None, lane: Lane, started: float, ended: float) -> None:
    metrics.observe_decoding(lane, ended - started)
    if tracing:
        tracing.record_decoding(lane, started, ended)


def services_of(request: Request) -> Services:
    """Return the services of the application that received the request."""
    return cast(Services, request.app.state.services)


async def _services(request: Request) -> Services:  # async, because FastAPI would run a sync function in a thread
    return services_of(request)


ServicesDependency = Annotated[Services, Depends(_services)]
