"""Builds the FastAPI application from the settings. `python -m app` runs it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

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
from app.middleware.request_log import RequestLogMiddleware
from app.middleware.security_headers import SecurityHeadersMiddleware
from app.routes import evaluate, explain, health, metrics, models, page, predict, train, v2
from app.settings import Settings

DESCRIPTION = "Classifies images with residual networks trained on CIFAR-100, and trains them."


def create_app(settings: Settings | None = None) -> FastAPI:
    """Create the application. It loads the models before it accepts the first request.

    Args:
        settings: Settings of the service. Default: read from the environment.
    """
    settings = settings or Settings()
    services = Services.create(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await services.start()
        sampling = asyncio.create_task(services.metrics.sample_periodically(services.pool))
        yield
        sampling.cancel()
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
        telemetry={"tracing": False, "metrics": False, "logs": False},  # FastAPI would look for providers per request
        redirect_slashes=False,  # Starlette would redirect to any host that the client names
    )
    app.state.services = services
    app.state.access = Access(settings)
    errors.add_exception_handlers(app)
    for resource in (predict, explain, evaluate, train, models, health, metrics, v2, page):
        app.include_router(resource.router)
        _add_head_routes(app, resource.router)
    app.mount("/static", page.PageFiles(directory=page.STATIC))
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
    app.add_middleware(RequestLogMiddleware)
    return app


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
