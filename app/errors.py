"""Every failure as application/problem+json (RFC 9457), and the one table from error to status code.

bytes  --images.decode-->  pixels  --batching-->  logits  --routes-->  JSON
       UnsupportedImage 415        Unavailable 503
       DamagedImage 422, TooLarge 413
names  --pool, store-->  model     NotFound 404, Unavailable 503
recipe --training.recipes-->  job  BadRequest 422, Unavailable 503
"""

import logging
from http import HTTPStatus
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

log = logging.getLogger(__name__)


class Problem(Exception):
    """A failure the client is told about.

    Args:
        detail: what happened, with the value, and what to do.
    """

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    headers: ClassVar[dict[str, str]] = {}

    def __init__(self, detail: str):
        super().__init__(detail)
        self.detail = detail


class UnsupportedImage(Problem):
    """The bytes are not an image of a supported format."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE


class DamagedImage(Problem):
    """The bytes begin as a supported image but cannot be decoded."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY


class TooLarge(Problem):
    """More bytes, pixels or files than the limits allow."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class BadRequest(Problem):
    """The request can be read but not fulfilled as it stands."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY


class NotFound(Problem):
    """No such model, version, job or evaluation."""

    status = HTTPStatus.NOT_FOUND


class Unavailable(Problem):
    """Not now: overloaded, not ready, or past the deadline. Worth another try."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    headers: ClassVar[dict[str, str]] = {"Retry-After": "1"}


def problem(status: int, detail: str, headers: dict[str, str] | None = None, **more: Any) -> JSONResponse:
    """A problem+json response; `more` adds members."""
    content = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail, **more}
    return JSONResponse(content, status, headers, media_type="application/problem+json")


def install(app: FastAPI) -> None:
    """Make every failure of `app` a problem."""

    @app.exception_handler(Problem)
    async def known(_: Request, error: Problem) -> JSONResponse:
        return problem(error.status, error.detail, error.headers)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, error.detail, dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        faults = [{"field": ".".join(map(str, fault["loc"])), "message": fault["msg"]} for fault in error.errors()]
        detail = "; ".join(f"{fault['field']}: {fault['message']}" for fault in faults)
        return problem(HTTPStatus.UNPROCESSABLE_ENTITY, detail, errors=faults)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.exception("%s %s failed", request.method, request.url.path, exc_info=error)
        return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "an unexpected error happened; it is in the server's log")
