"""Every failure as application/problem+json (RFC 9457): problems of `app.exceptions`, and shortages of the machine."""

import asyncio
import errno
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

from app.exceptions import Problem, Unavailable
from training.text import shorten

log = logging.getLogger(__name__)

_MAX_DETAIL = 2000  # characters
_MAX_FAULTS = 10  # An answer lists this many faults of a request,
_MAX_FAULT = 200  # each in this many characters.

_LACKS = {
    errno.ENOSPC: "a disk is full",
    errno.EDQUOT: "a disk quota is used up",
    errno.EFBIG: "a file would become larger than allowed",
    errno.EROFS: "a disk is read-only",
    errno.EACCES: "a file or folder may not be used by the service",
    errno.EPERM: "a file or folder may not be used by the service",
    errno.EMFILE: "the service has too many files open",
    errno.ENFILE: "the machine has too many files open",
    errno.ENOMEM: "there is not enough memory",
    errno.EAGAIN: "no further thread or process can be started",
}
_NO_MEMORY = ("out of memory", "not enough memory", "allocate memory")  # in messages of PyTorch's RuntimeErrors
_NO_THREAD = "can't start new thread"  # in that of Python's


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
    """A problem+json response; `more` adds members. A long detail is cut off, as it may quote the client."""
    detail = shorten(detail, _MAX_DETAIL)
    content = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail, **more}
    return JSONResponse(content, status, headers, media_type="application/problem+json")


EXPECTED = (Problem, HTTPException, RequestValidationError, OSError, MemoryError, RuntimeError)
"""Failures that may have an answer of their own."""


def shortage(error: BaseException) -> str | None:
    """The shortage that an error reports: of memory, disk, files, threads or rights. None for other errors."""
    match error:
        case OSError():
            return _LACKS.get(error.errno or 0)
        case MemoryError():
            return _LACKS[errno.ENOMEM]
        case RuntimeError() if _NO_THREAD in str(error):
            return _LACKS[errno.EAGAIN]
        case RuntimeError() if any(sign in str(error) for sign in _NO_MEMORY):
            return _LACKS[errno.ENOMEM]
    return None


async def answer(request: Request, error: Exception) -> JSONResponse:
    """The response to an `EXPECTED` failure.

    Raises:
        Exception: the failure itself, where it has none.
    """
    match error:
        case Problem():
            return problem(error.status, error.detail, error.headers)
        case HTTPException():
            return problem(error.status_code, error.detail, dict(error.headers or {}))
        case RequestValidationError():
            found = error.errors()
            faults = [
                {
                    "field": shorten(".".join(map(str, fault["loc"])), _MAX_FAULT),
                    "message": shorten(fault["msg"], _MAX_FAULT),
                }
                for fault in found[:_MAX_FAULTS]
            ]
            detail = "; ".join(f"{fault['field']}: {fault['message']}" for fault in faults)
            more = f"; and {len(found) - _MAX_FAULTS} more faults" if len(found) > _MAX_FAULTS else ""
            return problem(HTTPStatus.UNPROCESSABLE_ENTITY, detail + more, errors=faults)
    if lacks := shortage(error):
        log.warning("%s %s was refused: %s (%s)", request.method, request.url.path, lacks, error)
        return problem(Unavailable.status, f"{lacks}; try again later", dict(Unavailable.default_headers))
    raise error


def install(app: FastAPI) -> None:
    """Make every failure of `app` a problem."""
    for kind in EXPECTED:
        app.add_exception_handler(kind, answer)


def _first_cause(error: BaseException) -> BaseException:
    """The original error. Starlette raises further ones from it if the answer has begun already."""
    while error.__cause__:
        error = error.__cause__
    return error


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
        except Exception as error:
            if started and (lacks := shortage(cause := _first_cause(error))):
                log.warning("%s %s was broken off: %s (%s)", scope.get("method"), scope.get("path"), lacks, cause)
                return  # the server closes the connection, as the answer is incomplete
            log.exception("%s %s failed", scope.get("method"), scope.get("path"))
            if started:
                raise
            failed = problem(HTTPStatus.INTERNAL_SERVER_ERROR, "an unexpected error happened; the server's log has it")
            await failed(scope, receive, send)
