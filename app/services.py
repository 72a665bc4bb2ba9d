"""What the routes work with: one object, made at start-up, handed to them by FastAPI."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, cast

from fastapi import Depends, Request

from app.evaluations import Evaluations
from app.jobs import Jobs
from app.pool import Pool
from app.settings import Settings
from training.store import Store


@dataclass
class Services:
    """Everything that lives as long as the application."""

    settings: Settings
    store: Store
    pool: Pool
    jobs: Jobs
    evaluations: Evaluations
    started: datetime = field(default_factory=lambda: datetime.now(UTC))

    @classmethod
    def create(cls, settings: Settings) -> "Services":
        store = Store(settings.models)
        pool = Pool(settings, store)
        return cls(settings, store, pool, Jobs(settings, pool.refresh), Evaluations(settings))

    async def start(self) -> None:
        await self.pool.start()
        await self.jobs.start()

    async def stop(self) -> None:
        await self.jobs.stop()
        await self.evaluations.stop()
        await self.pool.stop()


def _services(request: Request) -> Services:
    return cast(Services, request.app.state.services)


FromApp = Annotated[Services, Depends(_services)]
