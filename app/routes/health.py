"""Serve /health for load balancers, orchestrators and people."""

from datetime import UTC, datetime
from http import HTTPStatus
from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from app.dependencies import ServicesDependency
from app.routes.parameters import StrictRoute

router = APIRouter(tags=["health"], route_class=StrictRoute)


class LiveModel(BaseModel, use_attribute_docstrings=True):
    """A model in memory."""

    version: int
    """Version that is served."""
    engine: str
    """Runtime, device and precision, such as openvino-int8."""
    test_top1: float
    """Top-1 accuracy on the full test set, 0-1."""
    queued_images: int
    """Number of images that wait for the engine."""
    members: list[str]
    """Versions that a cascade pins, such as resnet/4; empty for other models."""


class Health(BaseModel, use_attribute_docstrings=True):
    """The state of the service."""

    status: Literal["ready", "not ready"]
    """Readiness, as /health/ready reports it."""
    version: str
    """Version of the service."""
    uptime_s: float
    """Seconds since the start of this server process."""
    max_images: int
    """Largest number of images in a request to /predict."""
    store: str | None
    """Folder of the model store, as CIFAR100_MODELS names it; None unless no model is live."""
    models: dict[str, LiveModel]
    """The models in memory, by name."""
    errors: dict[str, str]
    """Reasons why live versions cannot be served, by model name."""
    feedback: bool
    """True if POST /feedback accepts corrections."""
    training: str | None
    """Id of the running training job, or the last known one if the job database does not answer."""


class Status(BaseModel, use_attribute_docstrings=True):
    """The result of a probe. The status code has the same meaning."""

    status: Literal["alive", "ready", "not ready"]
    """Result of the probe."""


@router.get("/health", summary="State of the service")
async def health(request: Request, services: ServicesDependency) -> Health:
    """Return the state with status 200. The status code of /health/ready reports readiness."""
    live = services.pool.live()
    return Health(
        status="ready" if services.ready else "not ready",
        version=request.app.version,
        uptime_s=round((datetime.now(UTC) - services.started).total_seconds(), 1),
        max_images=min(services.settings.max_images, services.settings.max_batch),
        store=None if live else str(services.settings.models),
        models={
            name: LiveModel(
                version=model.card.version,
                engine=model.batcher.engine_name,
                test_top1=model.card.test.top1,
                queued_images=model.batcher.waiting,
                members=[f"{member.card.name}/{member.card.version}" for member in model.members],
            )
            for name, model in sorted(live.items())
        },
        errors=services.pool.errors,
        feedback=services.settings.feedback,
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
