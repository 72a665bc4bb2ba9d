"""Serve /metrics for Prometheus."""

from typing import Any

from fastapi import APIRouter, Request, Response

from app.dependencies import ServicesDependency
from app.observability.metrics import OPEN_METRICS, TEXT

router = APIRouter(tags=["health"])

_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The Prometheus text format, or OpenMetrics.",
        "content": {media_type: {"schema": {"type": "string"}} for media_type in (TEXT, OPEN_METRICS)},
    }
}


@router.get("/metrics", response_class=Response, responses=_CONTENT, summary="Metrics for Prometheus")
async def metrics(request: Request, services: ServicesDependency) -> Response:
    """Return the metrics of all workers: requests, images, batches, models, jobs and processes.

    The format is OpenMetrics if the header Accept names it before the text format.
    """
    content, media_type = services.metrics.render(request.headers.get("accept", ""), await services.read_state())
    return Response(content, headers={"Content-Type": media_type, "Vary": "Accept"})
