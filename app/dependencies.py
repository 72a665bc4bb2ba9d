"""Defines the object that holds everything the routes use. It is created at startup and injected by FastAPI."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, cast

from fastapi import Depends, Request

from app.inference.decoding import Decoders
from app.inference.load_shedding import LoadShedder
from app.inference.pool import ModelPool
from app.jobs.evaluations import Evaluations
from app.jobs.queue import JobQueue
from app.jobs.runner import JobRunner
from app.middleware.metrics import Metrics
from app.settings import Settings
from app.threads import Threads
from training.store import Store


@dataclass
class Services:
    """The objects that live as long as the application."""

    settings: Settings
    store: Store
    pool: ModelPool
    jobs: JobQueue
    runner: JobRunner
    evaluations: Evaluations
    decoders: Decoders
    shedder: LoadShedder
    metrics: Metrics
    store_threads: Threads = field(default_factory=lambda: Threads("the model store", 4))
    """Threads in which requests read and change the model store."""
    draining: bool = False
    """True while the service is about to stop and should receive no further requests."""
    started: datetime = field(default_factory=lambda: datetime.now(UTC))

    @classmethod
    def create(cls, settings: Settings) -> "Services":
        store = Store(settings.models)
        metrics = Metrics()
        pool = ModelPool(settings, store, metrics.observe_batch)
        jobs = JobQueue(settings)
        decoders = Decoders(settings)
        return cls(
            settings=settings,
            store=store,
            pool=pool,
            jobs=jobs,
            runner=JobRunner(settings, jobs, pool.refresh),
            evaluations=Evaluations(settings),
            decoders=decoders,
            shedder=LoadShedder(pool, decoders, bool(settings.trusted_proxies), metrics.count_shed),
            metrics=metrics,
        )

    @property
    def ready(self) -> bool:
        """True if load balancers should send requests to this service."""
        return self.pool.ready and not self.draining

    async def start(self) -> None:
        await self.pool.start()
        await self.jobs.threads.run(self.jobs.open)
        self.runner.start()

    async def stop(self) -> None:
        await self.runner.stop()
        self.jobs.close()
        await self.evaluations.stop()
        await self.pool.stop()
        self.store_threads.close()
        self.decoders.close()


def services_of(request: Request) -> Services:
    """Return the services of the application that received the request."""
    return cast(Services, request.app.state.services)


async def _services(request: Request) -> Services:  # async, because FastAPI would run a sync function in a thread
    return services_of(request)


ServicesDependency = Annotated[Services, Depends(_services)]
