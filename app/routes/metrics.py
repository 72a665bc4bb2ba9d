"""Serve /metrics for Prometheus."""

from fastapi import APIRouter, Response

from app.dependencies import ServicesDependency

router = APIRouter(tags=["health"])


@router.get("/metrics", response_class=Response, summary="Metrics for Prometheus")
async def metrics(services: ServicesDependency) -> Response:
    """Return the metrics of all workers."""
    return Response(services.metrics.render(services.pool), media_type="text/plain; version=0.0.4; charset=utf-8")
