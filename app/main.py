"""Builds the FastAPI application from the settings. `python -m app` runs it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute

from app import errors, version
from app.dependencies import Services
from app.middleware.access import Access
from app.middleware.body_limit import BodyLimitMiddleware
from app.middleware.metrics import MetricsMiddleware
from app.middleware.proxy import ProxyMiddleware
from app.middleware.request_log import PROBES, RequestLogMiddleware
from app.middleware.security_headers import SecurityHeadersMiddleware
from app.observability.tracing import Tracing, tracing_from_environment
from app.routes import evaluate, explain, feedback, health, metrics, models, page, predict, train, v2, versions
from app.routes.images import DirectRoute, ImageRoute
from app.settings import Settings

if TYPE_CHECKING:
    from fastapi.telemetry import TelemetryConfig

DESCRIPTION = "Classifies images with residual networks trained on CIFAR-100, and trains them."


def create_app(settings: Settings | None = None, tracing: Tracing | None = None) -> FastAPI:
    """Create the application. It loads the models before it accepts the first request.

    Args:
        settings: Settings of the service. Default: read from the environment.
        tracing: Traces of requests. Default: as the standard variables of OpenTelemetry ask for them.
    """
    settings = settings or Settings()
    tracing = tracing or tracing_from_environment(version())
    services = Services.create(settings, tracing)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await services.start()
        periodic = [
            asyncio.create_task(services.sample_periodically()),
            asyncio.create_task(services.feedback.expire_periodically()),
        ]
        yield
        for task in periodic:
            task.cancel()
        await services.stop()

    app = FastAPI(
        title="CIFAR-100",
        description=DESCRIPTION,
        version=version(),
        lifespan=lifespan,
        responses=errors.RESPONSES,
        generate_unique_id_function=lambda route: route.name,
        openapi_url=None,  # routes.page serves both: a cached schema, and docs with a security policy
        docs_url=None,
        redoc_url=None,
        telemetry=_telemetry(tracing),
        redirect_slashes=False,  # Starlette would redirect to any host that the client names
    )
    app.state.services = services
    app.state.access = Access(settings)
    errors.add_exception_handlers(app)
    for resource in (predict, explain, feedback, evaluate, train, models, versions, health, metrics, v2, page):
        app.include_router(resource.router)
        _add_head_routes(app, resource.router)
    if not tracing:  # FastAPI names spans by the routes of its own search
        app.router.routes[:0] = [DirectRoute(route) for route in predict.router.routes if isinstance(route, ImageRoute)]
    app.mount(page.PageFiles.path, page.PageFiles(directory=page.STATIC))
    # The middleware that is added last sees a request first.
    app.add_middleware(BodyLimitMiddleware, settings=settings)
    app.add_middleware(errors.ErrorMiddleware)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    if settings.trusted_proxies or settings.root_path:
        app.add_middleware(ProxyMiddleware, settings=settings)
    app.add_middleware(SecurityHeadersMiddleware)
    app.add_middleware(MetricsMiddleware, metrics=services.metrics)
    app.add_middleware(RequestLogMiddleware, trace_id=tracing.trace_id if tracing else None)
    return app


def _telemetry(tracing: Tracing | None) -> "TelemetryConfig":
    """Return what FastAPI reports to OpenTelemetry: a span per request. By default it looks for providers each time."""
    if tracing is None:
        return {"tracing": False, "metrics": False, "logs": False}
    return {
        "tracer_provider": tracing.provider,
        "operation_spans": False,
        "metrics": False,
        "logs": False,
        "exclude": lambda scope: scope["path"].endswith(PROBES),
    }


def _add_head_routes(app: FastAPI, router: APIRouter) -> None:
    """Add HEAD to all GET routes, because many monitors send it. The server omits the body.

    Streaming routes are excluded, because their responses do not end.
    """
    for route in router.routes:
        if isinstance(route, APIRoute) and route.methods == {"GET"} and route.response_class is not StreamingResponse:
            app.router.add_api_route(
                route.path,
                route.endpoint,
                methods=["HEAD"],
                dependencies=route.dependencies,
                include_in_schema=False,
                route_class_override=type(route),
            )
