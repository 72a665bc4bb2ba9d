"""Serve /health for load balancers, orchestrators and people."""

from datetime import UTC, datetime
from http import HTTPStatus
from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from app.dependencies import ServicesDependency
from app.routes.parameters import StrictRoute

router = APIRouter(tags=["health"], route_class=StrictRoute)


class LiveModel(BaseModel):
    """A model in memory."""

    version: int
    engine: str
    test_top1: float
    queued_images: int


class Health(BaseModel):
    """The state of the service."""

    status: Literal["ready", "not ready"]
    version: str
    uptime_s: float
    store: str
    """Folder of the model store, as CIFAR100_MODELS names it."""
    models: dict[str, LiveModel]
    errors: dict[str, str]
    """Reasons why live versions cannot be served, by model name."""
    training: str | None
    """Id of the running training job, or the last known one if the job database does not answer."""


class Status(BaseModel):
    """The result of a probe. The status code has the same meaning."""

    status: Literal["alive", "ready", "not ready"]


@router.get("/health", summary="State of the service")
async def health(request: Request, services: ServicesDependency) -> Health:
    """Return the state with status 200. The status code of /health/ready reports readiness."""
    return Health(
        status="ready" if services.ready else "not ready",
        version=request.app.version,
        uptime_s=round((datetime.now(UTC) - services.started).total_seconds(), 1),
        store=str(services.settings.models),
        models={
            name: LiveModel(
                version=model.card.version,
                engine=model.batcher.engine.name,
                test_top1=model.card.test.top1,
                queued_images=model.batcher.queued,
            )
            for name, model in sorted(services.pool.live().items())
        },
        errors=services.pool.errors,
        training=await services.training_jobs.running_soon(),
    )


@router.get("/health/live", summary="Liveness")
async def live() -> Status:
    """Return 200 while the event loop runs."""
    return Status(status="alive")


@router.get(
    "/health/ready",
    responses={
        503: {"model": Status, "description": "Not every live model is loaded and warm, or the service is stopping."}
    },
    summary="Readiness",
)
async def ready(services: ServicesDependency, response: Response) -> Status:
    """Return 200 if load balancers should send requests here, else 503."""
    if services.ready:
        return Status(status="ready")
    response.status_code = HTTPStatus.SERVICE_UNAVAILABLE
    return Status(status="not ready")
