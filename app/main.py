"""Builds the application: settings in, a FastAPI app out. `python -m app` runs it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from app import errors
from app.limits import BodyLimit
from app.metrics import Measured, Metrics
from app.routes import evaluate, health, models, page, predict, train
from app.services import Services
from app.settings import Settings

DESCRIPTION = "Classifies images with residual networks trained on CIFAR-100, and trains them."


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service. Models are loaded before the first request is accepted.

    Args:
        settings: by default from the environment.
    """
    settings = settings or Settings()
    services = Services.create(settings)
    metrics = Metrics(services.pool)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await services.start()
        yield
        await services.stop()

    app = FastAPI(title="CIFAR-100", description=DESCRIPTION, version=_version(), lifespan=lifespan)
    app.state.services = services
    app.state.metrics = metrics
    errors.install(app)
    for resource in (predict, evaluate, train, models, health, page):
        app.include_router(resource.router)
    app.mount("/web", StaticFiles(directory=page.WEB))
    app.add_middleware(BodyLimit, settings=settings)
    app.add_middleware(Measured, metrics=metrics)
    return app


def _version() -> str:
    try:
        return version("cifar100")
    except PackageNotFoundError:
        return "0"
