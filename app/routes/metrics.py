"""Serve /metrics for Prometheus."""

from typing import Any

from fastapi import APIRouter, Response

from app.dependencies import ServicesDependency

router = APIRouter(tags=["health"])


_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"description": "The Prometheus text format.", "content": {_TEXT: {"schema": {"type": "string"}}}}
}


@router.get("/metrics", response_class=Response, responses=_CONTENT, summary="Metrics for Prometheus")
async def metrics(services: ServicesDependency) -> Response:
    """Return the metrics of all workers: requests, their times, batches, waiting images, live versions and events."""
    return Response(services.metrics.render(services.pool), media_type=_TEXT)
