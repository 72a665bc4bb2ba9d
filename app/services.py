"""What the routes work with: one object, made at start-up, handed to them by FastAPI."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, cast
from urllib.parse import parse_qsl

from fastapi import Depends, Request

from app.evaluations import Evaluations
from app.jobs import Jobs
from app.pool import Pool
from app.runner import Runner
from app.settings import Settings
from app.workers import processors
from training.store import Store

_MAX_DECODERS = 8


@dataclass
class Services:
    """Everything that lives as long as the application."""

    settings: Settings
    store: Store
    pool: Pool
    jobs: Jobs
    runner: Runner
    evaluations: Evaluations
    decoders: ThreadPoolExecutor
    """Decode images. There are few, as each may need memory for an image of the largest size."""
    draining: bool = False
    """Whether the service is about to stop and wants no further requests."""
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    _arriving: int = field(default=0, init=False)

    @classmethod
    def create(cls, settings: Settings) -> "Services":
        store = Store(settings.models)
        pool = Pool(settings, store)
        jobs = Jobs(settings)
        return cls(
            settings,
            store,
            pool,
            jobs,
            Runner(settings, jobs, pool.refresh),
            Evaluations(settings),
            ThreadPoolExecutor(min(processors(), _MAX_DECODERS), "decoder"),
        )

    @property
    def ready(self) -> bool:
        """Whether requests should be sent here."""
        return self.pool.ready and not self.draining

    def sheds(self, url: bytes) -> bool:
        """Whether a request for this URL is a prediction that would be refused, as too many images are waiting.

        Asked in the event loop, once for every request. Those that are let in have reached the queue at the loop's next
        turn, most of them; until then they count as if they had.
        """
        path, _, query = url.partition(b"?")
        model = self.pool.peek(_model_in(query)) if path == b"/predict" else None
        if model is None:
            return False
        if model.batcher.queued + self._arriving >= model.batcher.max_queue:
            return True
        self._arriving += 1
        asyncio.get_running_loop().call_soon(self._arrived)
        return False

    def _arrived(self) -> None:
        self._arriving -= 1

    async def start(self) -> None:
        await self.pool.start()
        if await asyncio.to_thread(self.jobs.open):
            self.runner.start()

    async def stop(self) -> None:
        await self.runner.stop()
        self.jobs.close()
        await self.evaluations.stop()
        await self.pool.stop()
        self.decoders.shutdown(wait=False)


@lru_cache(256)
def _model_in(query: bytes) -> str | None:
    return dict(parse_qsl(query.decode("latin-1"))).get("model")


def services_of(request: Request) -> Services:
    """Those of the application that got a request."""
    return cast(Services, request.app.state.services)


async def _services(request: Request) -> Services:  # FastAPI would give one that is not async a thread of its own
    return services_of(request)


FromApp = Annotated[Services, Depends(_services)]
