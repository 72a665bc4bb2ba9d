"""Turns every failure into an application/problem+json response (RFC 9457), or JSON under /v2.

Input: problems of `app.exceptions`, errors of Starlette and FastAPI, and resource shortages of the machine.
"""

import asyncio
import errno
import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typing_extensions import override

from app.exceptions import Problem, Unavailable
from training.encoding import replace_surrogates
from training.text import quote, shorten

log = logging.getLogger(__name__)

_MAX_DETAIL = 2000  # characters
_MAX_FAULTS = 10  # validation errors that a response lists
_MAX_FAULT = 200  # characters per validation error

_SHORTAGES = {
    errno.ENOSPC: "a disk is full",
    errno.EDQUOT: "a disk quota is used up",
    errno.EFBIG: "a file would become larger than allowed",
    errno.EROFS: "a disk is read-only",
    errno.EACCES: "the service has no permission for a file or folder",
    errno.EPERM: "the service has no permission for a file or folder",
    errno.EMFILE: "the service has too many files open",
    errno.ENFILE: "the machine has too many files open",
    errno.ENOMEM: "there is not enough memory",
    errno.EAGAIN: "no further thread or process can be started",
}
_NO_MEMORY = ("out of memory", "not enough memory", "allocate memory")  # parts of messages of PyTorch's RuntimeError
_NO_THREAD = "can't start new thread"  # part of the message of Python's RuntimeError


class ProblemDetails(BaseModel):
    """Problem details as in RFC 9457. Some problems have additional members."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    type: str
    """Address of the description of this status on this service, such as /errors#404."""
    title: str
    """Phrase of the status."""
    status: int
    """HTTP status of the response."""
    detail: str
    """The error, the value that caused it, and a remedy."""


ERRORS_PATH = "/errors"
"""Path of the page that describes every status in `MEANINGS`."""

MEANINGS = {
    400: "The form is malformed, incomplete or has too many files, a compressed body is damaged, the binary tensor "
    "data do not fit their JSON, the request head is ambiguous, or X-Forwarded-Prefix is invalid. Correct what the "
    "detail names, and send the request again.",
    401: "The API key is missing or wrong. Send one of the keys of the service as 'Authorization: Bearer KEY'.",
    403: "No API key is configured, and the call does not come from this machine, or the call is off. Make the call on "
    "the machine of the service, or start the service with CIFAR100_API_KEYS, or with the setting that the detail "
    "names.",
    404: "There is no such path, model, version, job, evaluation or file. The detail names the call that lists what "
    "there is.",
    405: "The path has no such method. The detail and the header Allow name the methods that it has.",
    408: "The body arrives too slowly. Send it faster, or send a smaller one.",
    409: "The version is in use and cannot be deleted. The detail says what uses it.",
    413: "The body, an image or a zip is larger or more costly than a limit. Send a smaller one.",
    415: "The body is not an image of a supported format, not a zip in a form, or not JSON, or its content coding is "
    "not supported. Send it in the form that the detail names.",
    416: "The header Range asks for bytes behind the end of the file. The header Content-Range has its size.",
    422: "A parameter, a recipe, an image or an uploaded version is invalid, or a parameter is unknown. Correct what "
    "the detail names. For parameters the member `errors` lists each field with its fault.",
    429: "The client is over a rate limit. Try again after the seconds in the header Retry-After.",
    431: "The request line and headers are too large. Send fewer or shorter headers.",
    500: "An unexpected error occurred. The log of the service has it, with the X-Request-ID of the response.",
    501: "The service does not support the method CONNECT. Send the request to the service itself.",
    503: "The service is overloaded, not ready, stopping, or lacks disk, memory or its database. Try again after the "
    "seconds in the header Retry-After.",
    507: "The service keeps as many corrections as a setting allows. An operator has to export and delete some.",
}
"""Meaning of every status of a problem, and what to do."""


class InferenceError(ProblemDetails):
    """An error in the form of the Open Inference Protocol."""

    error: str
    """The same text as `detail`."""


def _describe(media_type: str, model: type[ProblemDetails]) -> dict[int | str, dict[str, Any]]:
    content = {"content": {media_type: {"schema": model.model_json_schema()}}}
    return {
        "4XX": {"description": "The request cannot be fulfilled. `detail` gives the reason.", **content},
        "5XX": {"description": "The service cannot fulfill the request now.", **content},
    }


RESPONSES = _describe("application/problem+json", ProblemDetails)
"""OpenAPI descriptions of the error responses that every operation can return."""

OPEN_INFERENCE_RESPONSES = _describe("application/json", InferenceError)
"""The same for the operations of the Open Inference Protocol."""


REFUSAL = "cifar100.refusal"
"""Key that a `ProblemResponse` adds to the scope of its request: the reason of the refusal, or None."""

# Statuses of requests that are refused for access, limits or load, and their reasons in the metrics.
_REFUSALS = {
    401: "unauthorized",
    403: "forbidden",
    408: "slow_body",
    413: "too_large",
    429: "rate_limit",
    431: "head_too_large",
    503: "unavailable",
}


_OF_THE_BODY = ("content-length", "content-type")


class ProblemResponse(JSONResponse):
    """A problem+json response. It is adapted to its request when it is sent, see `adapt`.

    Args:
        problem: Members of the problem.
        status: HTTP status.
        headers: Further headers.
        refusal: Reason of the refusal in the metrics. Default: that of the status.
    """

    media_type = "application/problem+json"

    def __init__(
        self, problem: dict[str, Any], status: int, headers: dict[str, str] | None = None, refusal: str | None = None
    ):
        super().__init__(problem, status, headers)
        self.refusal = refusal or _REFUSALS.get(status)
        self._problem = problem

    def adapt(self, prefix: str, is_open_inference: bool = False) -> JSONResponse:
        """Return the response for a service that is published under a path prefix.

        Args:
            prefix: The prefix, such as /ml, or an empty text. It becomes a part of the type.
            is_open_inference: True for a call of the Open Inference Protocol. Its clients look for `error`, and some of
                them only in a body of type application/json.
        """
        headers = {name: value for name, value in self.headers.items() if name not in _OF_THE_BODY}
        problem = {**self._problem, "type": prefix + self._problem["type"]}
        if is_open_inference:
            return JSONResponse({"error": problem["detail"], **problem}, self.status_code, headers)
        return JSONResponse(problem, self.status_code, headers, self.media_type)

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[REFUSAL] = self.refusal
        prefix = scope.get("root_path", "")
        adapted = self.adapt(prefix, is_open_inference(scope["path"].removeprefix(prefix)))
        await adapted(scope, receive, send)


def is_open_inference(path: str) -> bool:
    """Return whether a path, without the prefix of the service, is one of the Open Inference Protocol."""
    return path == "/v2" or path.startswith("/v2/")


def problem_response(
    status: int, detail: str, headers: dict[str, str] | None = None, refusal: str | None = None, **more: Any
) -> ProblemResponse:
    """Return a problem+json response. `more` adds members. A long detail is shortened, as it may quote the client."""
    return ProblemResponse({**describe_problem(status, detail).model_dump(), **more}, status, headers, refusal)


def describe_problem(status: int, detail: str) -> ProblemDetails:
    """Return the members of a problem, with a shortened detail."""
    return ProblemDetails(
        type=f"{ERRORS_PATH}#{status:d}",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=shorten(replace_surrogates(detail), _MAX_DETAIL),
    )


EXPECTED = (Problem, HTTPException, RequestValidationError, OSError, MemoryError, RuntimeError)
"""Exceptions for which `error_response` may have a response."""


def describe_shortage(error: BaseException) -> str | None:
    """Describe a lack of memory, disk space, files, threads or permissions. Return None for other errors."""
    match error:
        case OSError():
            return _SHORTAGES.get(error.errno or 0)
        case MemoryError():
            return _SHORTAGES[errno.ENOMEM]
        case RuntimeError() if _NO_THREAD in str(error):
            return _SHORTAGES[errno.EAGAIN]
        case RuntimeError() if any(sign in str(error) for sign in _NO_MEMORY):
            return _SHORTAGES[errno.ENOMEM]
    return None


async def error_response(request: Request, error: Exception) -> JSONResponse:
    """Return the response to an `EXPECTED` exception.

    Raises:
        Exception: `error` itself, if there is no response for it.
    """
    match error:
        case Problem():
            refusal = error.reason if isinstance(error, Unavailable) else None
            return problem_response(error.status, error.detail, error.headers, refusal)
        case HTTPException():
            headers, detail = dict(error.headers or {}), error.detail
            if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED and "Allow" in headers:
                detail = f"{request.method} is not supported here; use {headers['Allow']}"
            if error.status_code == HTTPStatus.NOT_FOUND:  # routes raise `NotFound` instead
                detail = f"there is no path {quote(request.url.path)}; GET /docs describes all calls"
            return problem_response(error.status_code, detail, headers)
        case RequestValidationError():
            found = error.errors()
            faults = [
                {
                    "field": shorten(replace_surrogates(".".join(map(str, fault["loc"]))), _MAX_FAULT),
                    "message": shorten(replace_surrogates(_describe_fault(fault)), _MAX_FAULT),
                }
                for fault in found[:_MAX_FAULTS]
            ]
            detail = "; ".join(f"{fault['field']}: {fault['message']}" for fault in faults)
            more = f"; and {len(found) - _MAX_FAULTS} more faults" if len(found) > _MAX_FAULTS else ""
            return problem_response(HTTPStatus.UNPROCESSABLE_ENTITY, detail + more, errors=faults)
    if shortage := describe_shortage(error):
        log.warning("%s %s was refused: %s (%s)", request.method, request.url.path, shortage, error)
        return problem_response(Unavailable.status, f"{shortage}; try again later", dict(Unavailable.default_headers))
    raise error


def _describe_fault(fault: dict[str, Any]) -> str:
    """Return the problem of a value and its remedy."""
    context, given = fault.get("ctx", {}), quote(str(fault.get("input", "")))
    match fault["type"]:
        case "greater_than_equal":
            return f"{given} is too small; give at least {context['ge']}"
        case "less_than_equal":
            return f"{given} is too large; give at most {context['le']}"
        case "less_than":
            return f"{given} is too large; give less than {context['lt']}"
        case "int_parsing" | "int_type" | "int_from_float":
            return f"{given} is not a whole number; give one such as 5"
        case "int_parsing_size":
            return f"{given} is not a number that fits; give a smaller one"
        case "missing" if fault["loc"] == ("body",):
            return "the body is missing; send JSON with the header 'Content-Type: application/json'"
        case "missing":
            return "the field is missing; add it"
    return str(fault["msg"])


def add_exception_handlers(app: FastAPI) -> None:
    """Register `error_response` as the handler of every `EXPECTED` exception of `app`."""
    for kind in EXPECTED:
        app.add_exception_handler(kind, error_response)


def _first_cause(error: BaseException) -> BaseException:
    """Return the original error. Starlette wraps it in further errors if the response has already started."""
    while error.__cause__:
        error = error.__cause__
    return error


class ErrorMiddleware:
    """ASGI middleware that logs every unhandled error and responds with 500.

    A request that is canceled because the server stops gets a 503 response.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and handle the error that it raises."""
        started = False

        async def send_and_note_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, send_and_note_start)
        except ClientDisconnect:
            return  # the client is gone, so there is no response
        except asyncio.CancelledError:  # only a stopping server cancels requests, after its grace period
            if not started:
                stopping = problem_response(
                    HTTPStatus.SERVICE_UNAVAILABLE, "the service stops; try again", {"Retry-After": "1"}
                )
                await stopping(scope, receive, send)
        except Exception as error:
            if started and (shortage := describe_shortage(cause := _first_cause(error))):
                log.warning("%s %s was aborted: %s (%s)", scope.get("method"), scope.get("path"), shortage, cause)
                return  # the server closes the connection, because the response is incomplete
            log.exception("%s %s failed", scope.get("method"), scope.get("path"))
            if started:
                raise
            failed = problem_response(
                HTTPStatus.INTERNAL_SERVER_ERROR, "an unexpected error occurred; see the server's log"
            )
            await failed(scope, receive, send)
