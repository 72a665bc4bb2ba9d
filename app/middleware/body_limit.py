"""Limits request bodies while they arrive: the size and pace of each body, and the total size of all bodies.

A body with the content coding gzip or deflate is decoded here, so that all limits of size hold for its decoded bytes
as well.
"""

import asyncio
import re
import time
from http import HTTPStatus
from typing import NoReturn

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.clients import FairShares, client_network
from app.errors import is_open_inference, problem_response
from app.exceptions import Problem
from app.machine import MIB
from app.middleware.compressed_body import Coding, CompressedBody
from app.middleware.proxy import route_path
from app.server.connections import SLOWEST_BYTES_PER_S
from app.server.protocol import BODY_RECEIVED
from app.settings import Settings
from training.text import quote

_OTHER_BYTES = MIB
_UPLOAD, _MODEL = "/models/{name}", re.compile("/models/[^/]+")
_SUPPORTED: dict[str, Coding] = {"gzip": "gzip", "x-gzip": "gzip", "deflate": "deflate"}
_MULTIPART_OVERHEAD = 64 << 10
# Time budget of a body, in seconds. Waiting for data uses it up; each 64 KiB received adds one second, up to 30 s.
_BUDGET_S = 30.0


class BodyLimitMiddleware:
    """ASGI middleware that refuses bodies over the limit of their route (413), too slow (408) or too many (503).

    A body whose Content-Length is over the limit is refused before it is read. A chunked body is refused as soon as it
    exceeds the limit, and so is a compressed body as soon as its decoded bytes do. Other content codings are refused
    with 415 and the supported ones (RFC 9110, section 15.5.16).
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app = app
        self.limits = {
            "/predict": settings.max_predict_bytes + _MULTIPART_OVERHEAD,
            "/explain": settings.max_predict_bytes + _MULTIPART_OVERHEAD,
            "/feedback": settings.max_image_bytes + _MULTIPART_OVERHEAD,
            "/evaluate": settings.max_archive_bytes + _MULTIPART_OVERHEAD,
        }
        if settings.allow_uploads:
            self.limits[_UPLOAD] = settings.max_archive_bytes + _MULTIPART_OVERHEAD
        self.pending = FairShares(settings.max_pending_bytes)
        """Bytes received for all requests in progress, per client network."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with a limited body."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        path = route_path(scope)
        limit = self.limits.get(path) or self.limits.get(_pattern(path), _OTHER_BYTES)
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            await _too_large(limit)(scope, receive, send)
            return
        is_empty = declared == b"0" and b"transfer-encoding" not in headers
        codings = _codings(scope) if b"content-encoding" in headers and not is_empty else []
        if len(codings) > 1 or not _SUPPORTED.keys() >= set(codings):
            await _unsupported(codings)(scope, receive, send)
            return
        body = _LimitedBody(
            scope, receive, send, limit, self.pending, is_empty, _SUPPORTED[codings[0]] if codings else None
        )
        try:
            await self.app(scope, body.receive, body.send)
        except ClientDisconnect:
            if not body.refusal:
                raise
        finally:
            body.release()
        if body.refusal:
            await body.refusal(scope, receive, send)


class _LimitedBody:
    """The body of one request, and the response that refuses it.

    Args:
        scope: ASGI scope of the request.
        receive: ASGI function that returns the next part of the body.
        send: ASGI function that sends the response of the application.
        limit: Largest size of the body in bytes.
        pending: Bytes of all bodies in progress.
        is_complete: True if the request has no body.
        coding: Content coding of the body, None if it has none.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        limit: int,
        pending: FairShares,
        is_complete: bool,
        coding: Coding | None,
    ):
        self.refusal: JSONResponse | None = None
        """The response to send instead of the application's response."""
        self._scope = scope
        self._receive = receive
        self._send = send
        self._limit = limit
        self._pending = pending
        self._client = client_network(scope["client"][0] if scope.get("client") else "")
        self._is_complete = is_complete
        self._receive_piece = CompressedBody(self._receive_part, coding).receive if coding else self._receive_part
        self._received = 0  # bytes on the wire
        self._pending_bytes = 0  # bytes that the application has received
        self._budget_s = _BUDGET_S

    async def receive(self) -> Message:
        """Return the next message of the request.

        Raises:
            ClientDisconnect: The body is refused. Routes already handle this error for a body that ends early.
        """
        if self._is_complete:
            return await self._receive()  # only the disconnect can follow, which has no time limit
        try:
            message = await self._receive_piece()
        except Problem as problem:
            self._refuse(_refusal(problem.status, problem.detail))
        self._count(len(message.get("body", b"")))
        self._is_complete = not message.get("more_body", False)
        return message

    async def _receive_part(self) -> Message:
        """Return the next message of the server, and check the size of the body on the wire."""
        message = await self._receive() if BODY_RECEIVED in self._scope else await self._receive_in_time()
        self._received += len(message.get("body", b""))
        if self._received > self._limit:
            self._refuse(_too_large(self._limit))
        return message

    def _count(self, size: int) -> None:
        """Count bytes that the application may keep."""
        has_place = self._pending.allows(self._client, size, self._pending.total + size)
        self._pending.add(self._client, size)
        self._pending_bytes += size
        if self._pending_bytes > self._limit:
            self._refuse(_too_large(self._limit))
        if not has_place:
            refusal = _refusal(
                HTTPStatus.SERVICE_UNAVAILABLE, "too much data is being sent; try again later", "bodies_full"
            )
            refusal.headers["Retry-After"] = "1"
            self._refuse(refusal)

    def _refuse(self, refusal: JSONResponse) -> NoReturn:
        self.refusal = refusal
        raise ClientDisconnect

    async def _receive_in_time(self) -> Message:
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._budget_s):
                message = await self._receive()
        except TimeoutError:
            self._refuse(_refusal(HTTPStatus.REQUEST_TIMEOUT, "the request body arrives too slowly"))
        gained_s = len(message.get("body", b"")) / SLOWEST_BYTES_PER_S
        self._budget_s = min(_BUDGET_S, self._budget_s + started - time.monotonic() + gained_s)
        return message

    async def send(self, message: Message) -> None:
        """Send a message of the application's response, unless the body is refused."""
        if message["type"] == "http.response.start" and not self._is_complete:
            MutableHeaders(scope=message)["Connection"] = "close"  # the rest of the body is not read
        if not self.refusal:
            await self._send(message)

    def release(self) -> None:
        """Stop counting the bytes of this body."""
        self._pending.remove(self._client, self._pending_bytes)


def _pattern(path: str) -> str:
    """Return the path of the limit that a path with a name shares."""
    if is_open_inference(path) and path.endswith("/infer"):
        return "/predict"
    return _UPLOAD if _MODEL.fullmatch(path) else path


def _codings(scope: Scope) -> list[str]:
    """Return the content codings of a body except `identity`, in the order in which they were applied."""
    names = ",".join(Headers(scope=scope).getlist("content-encoding")).lower().split(",")
    return [name.strip() for name in names if name.strip() not in ("", "identity")]


def _unsupported(codings: list[str]) -> JSONResponse:
    detail = f"the Content-Encoding {quote(', '.join(codings))} is not supported; send gzip, deflate, or no coding"
    refusal = _refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, detail)
    refusal.headers["Accept-Encoding"] = "gzip, deflate, identity"
    return refusal


def _too_large(limit: int) -> JSONResponse:
    return _refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the request body is larger than {limit:,} bytes")


def _refusal(status: HTTPStatus, detail: str, reason: str | None = None) -> JSONResponse:
    return problem_response(status, detail, {"Connection": "close"}, reason)
