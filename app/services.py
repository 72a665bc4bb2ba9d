"""What the routes work with: one object, made at start-up, handed to them by FastAPI."""

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
    """Everything that lives as long as the application."""

    settings: Settings
    store: Store
    pool: Pool
    jobs: Jobs
    runner: Runner
    evaluations: Evaluations
    decoders: Decoders
    metrics: Metrics
    store_threads: Threads = field(default_factory=lambda: Threads("the model store", 4))
    """Where requests read and change the model store."""
    draining: bool = False
    """Whether the service is about to stop and wants no further requests."""
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
        """Whether requests should be sent here."""
        return self.pool.ready and not self.draining

    def sheds(self, url: bytes, client: str) -> bool:
        """Whether a request for this URL is a prediction that would be refused, as too many images are waiting.

        Asked in the event loop, once for every request. Those that are let in have reached the queue at the loop's next
        turn, most of them; until then they count as if they had.
        """
        path, _, query = url.partition(b"?")
        if path != b"/predict" or b"version" in query:  # another version has a queue of its own
            return False
        model = self.pool.peek(_model_in(query))
        if model is None:
            return False
        is_full = model.batcher.queued + self._arriving >= model.batcher.max_queue
        # Behind a trusted proxy the client is known only once the request has reached the application.
        if is_full or (not self.settings.trusted_proxies and self.decoders.is_full_for(client_network(client))):
            self.metrics.count_shed()
            return True
        self._arriving += 1
        asyncio.get_running_loop().call_soon(self._arrived)
        return False

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
    """Those of the application that got a request."""
    return cast(Services, request.app.state.services)


async def _services(request: Request) -> Services:  # FastAPI would give one that is not async a thread of its own
    return services_of(request)


FromApp = Annotated[Services, Depends(_services)]
