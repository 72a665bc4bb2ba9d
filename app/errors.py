"""Every failure as application/problem+json (RFC 9457)."""

import asyncio
import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.exceptions import (
    BadRequest,
    DamagedImage,
    Forbidden,
    NotFound,
    Problem,
    TooLarge,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    UnsupportedImage,
)

__all__ = [
    "BadRequest",
    "DamagedImage",
    "Forbidden",
    "NotFound",
    "Problem",
    "TooLarge",
    "TooManyRequests",
    "Unauthorized",
    "Unavailable",
    "UnsupportedImage",
]

log = logging.getLogger(__name__)


class ProblemDetails(BaseModel):
    """RFC 9457; some problems have further members."""

    type: str
    title: str
    status: int
    detail: str


_RESPONSE = {"content": {"application/problem+json": {"schema": ProblemDetails.model_json_schema()}}}
RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request cannot be fulfilled; `detail` says why.", **_RESPONSE},
    "5XX": {"description": "The service cannot fulfil it now.", **_RESPONSE},
}
"""What every operation may answer as well, for OpenAPI."""


def problem(status: int, detail: str, headers: dict[str, str] | None = None, **more: Any) -> JSONResponse:
    """A problem+json response; `more` adds members."""
    content = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail, **more}
    return JSONResponse(content, status, headers, media_type="application/problem+json")


EXPECTED = (Problem, HTTPException, RequestValidationError)
"""Failures that have an answer of their own."""


async def answer(_: Request, error: Exception) -> JSONResponse:
    """The response to an `EXPECTED` failure."""
    match error:
        case Problem():
            return problem(error.status, error.detail, error.headers)
        case HTTPException():
            return problem(error.status_code, error.detail, dict(error.headers or {}))
        case RequestValidationError():
            faults = [{"field": ".".join(map(str, fault["loc"])), "message": fault["msg"]} for fault in error.errors()]
            detail = "; ".join(f"{fault['field']}: {fault['message']}" for fault in faults)
            return problem(HTTPStatus.UNPROCESSABLE_ENTITY, detail, errors=faults)
        case _:
            raise error


def install(app: FastAPI) -> None:
    """Make every failure of `app` a problem."""
    for kind in EXPECTED:
        app.add_exception_handler(kind, answer)


class Unexpected:
    """ASGI middleware: an error that nothing else has handled is logged and answered with 500.

    A request that is cancelled because the server stops is answered with 503.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except ClientDisconnect:
            return  # nobody is left to be told
        except asyncio.CancelledError:  # only a server that stops cancels a request, after the time it gives it
            if not started:
                stopping = problem(HTTPStatus.SERVICE_UNAVAILABLE, "the service stops; try again", {"Retry-After": "1"})
                await stopping(scope, receive, send)
        except Exception:
            log.exception("%s %s failed", scope.get("method"), scope.get("path"))
            if started:
                raise
            failed = problem(HTTPStatus.INTERNAL_SERVER_ERROR, "an unexpected error happened; the server's log has it")
            await failed(scope, receive, send)
