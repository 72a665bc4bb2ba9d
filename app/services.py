"""Defines the object that holds everything the routes use. It is created at startup and injected by FastAPI."""

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, cast
from urllib.parse import parse_qsl

from fastapi import Depends, Request

from app.clients import client_network
from app.decoding import Decoders
from app.evaluations import Evaluations
from app.jobs import Jobs
from app.metrics import Metrics
from app.pool import Pool
from app.runner import Runner
from app.settings import Settings
from app.threads import Threads
from training.store import Store


@dataclass
class Services:
    """The objects that live as long as the application."""

    settings: Settings
    store: Store
    pool: Pool
    jobs: Jobs
    runner: Runner
    evaluations: Evaluations
    decoders: Decoders
    metrics: Metrics
    store_threads: Threads = field(default_factory=lambda: Threads("the model store", 4))
    """Threads in which requests read and change the model store."""
    draining: bool = False
    """True while the service is about to stop and should receive no further requests."""
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    _arriving: int = field(default=0, init=False)

    @classmethod
    def create(cls, settings: Settings) -> "Services":
        store = Store(settings.models)
        metrics = Metrics()
        pool = Pool(settings, store, metrics.observe_batch)
        jobs = Jobs(settings)
        return cls(
            settings,
            store,
            pool,
            jobs,
            Runner(settings, jobs, pool.refresh),
            Evaluations(settings),
            Decoders(settings),
            metrics,
        )

    @property
    def ready(self) -> bool:
        """True if load balancers should send requests to this service."""
        return self.pool.ready and not self.draining

    def sheds(self, url: bytes, client: str) -> bool:
        """Return whether a request for this URL is a prediction that must be refused, because too many images wait.

        Call this in the event loop, once per request. Most accepted requests reach the queue in the next iteration of
        the loop. Until then they count as queued.
        """
        path, _, query = url.partition(b"?")
        if path != b"/predict" or b"version" in query:  # each version has its own queue
            return False
        model = self.pool.peek(_model_in(query))
        if model is None:
            return False
        is_full = model.batcher.queued + self._arriving >= model.batcher.max_queue
        if is_full or self.exceeds_share(client):
            self.metrics.count_shed()
            return True
        self._arriving += 1
        asyncio.get_running_loop().call_soon(self._arrived)
        return False

    def exceeds_share(self, client: str) -> bool:
        """Return whether a client, given by its address, has its full share of images waiting to be decoded.

        Behind a trusted proxy the answer is always False, because the client address is known only after the request
        has reached the application.
        """
        return not self.settings.trusted_proxies and self.decoders.is_full_for(client_network(client))

    def _arrived(self) -> None:
        self._arriving -= 1

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


@lru_cache(256)
def _model_in(query: bytes) -> str | None:
    return dict(parse_qsl(query.decode("latin-1"))).get("model")


def services_of(request: Request) -> Services:
    """Return the services of the application that received the request."""
    return cast(Services, request.app.state.services)


async def _services(request: Request) -> Services:  # async, because FastAPI would run a sync function in a thread
    return services_of(request)


FromApp = Annotated[Services, Depends(_services)]
