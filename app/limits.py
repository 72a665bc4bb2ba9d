"""Limits request bodies while they arrive: the size and pace of each body, and the total size of all bodies."""

import asyncio
import time
from http import HTTPStatus

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.clients import FairShares, client_network
from app.connections import SLOWEST_BYTES_PER_S
from app.errors import problem
from app.protocol import ARRIVED
from app.settings import MIB, Settings

_OTHER_BYTES = MIB
_MULTIPART_OVERHEAD = 64 << 10
# Time budget of a body, in seconds. Waiting for data uses it up; each 64 KiB received adds one second, up to 30 s.
_GRACE_S = 30.0


class BodyLimit:
    """ASGI middleware that refuses bodies over the limit of their route (413), too slow (408) or too many (503).

    A body whose Content-Length is over the limit is refused before it is read. A chunked body is refused as soon as it
    exceeds the limit.
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app = app
        self.limits = {
            "/predict": settings.max_predict_bytes + _MULTIPART_OVERHEAD,
            "/evaluate": settings.max_archive_bytes + _MULTIPART_OVERHEAD,
        }
        self.pending = FairShares(settings.max_pending_bytes)
        """Bytes received for all requests in progress, per client network."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limit = self.limits.get(scope["path"], _OTHER_BYTES)
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit:
            await _too_large(limit)(scope, receive, send)
            return

        client = client_network(scope["client"][0] if scope.get("client") else "")
        refusal: JSONResponse | None = None
        patience_s = _GRACE_S
        received = 0
        complete = declared == "0" and "transfer-encoding" not in headers

        async def in_time() -> Message:
            nonlocal refusal, patience_s
            asked = time.monotonic()
            try:
                async with asyncio.timeout(patience_s):
                    message = await receive()
            except TimeoutError:
                refusal = _refusal(HTTPStatus.REQUEST_TIMEOUT, "the request body arrives too slowly")
                raise ClientDisconnect from None  # routes already handle this for a body that ends early
            gained = len(message.get("body", b"")) / SLOWEST_BYTES_PER_S
            patience_s = min(_GRACE_S, patience_s + asked - time.monotonic() + gained)
            return message

        async def bounded() -> Message:
            nonlocal refusal, received, complete
            if complete:
                return await receive()  # only the disconnect can follow, which has no time limit
            message = await receive() if ARRIVED in scope else await in_time()
            size = len(message.get("body", b""))
            received += size
            has_place = self.pending.allows(client, size, self.pending.total + size)
            self.pending.add(client, size)
            complete = not message.get("more_body", False)
            if received > limit:
                refusal = _too_large(limit)
            elif not has_place:
                refusal = _refusal(HTTPStatus.SERVICE_UNAVAILABLE, "too much is being sent; try again later")
                refusal.headers["Retry-After"] = "1"
            if refusal:
                raise ClientDisconnect
            return message

        async def unless_refused(message: Message) -> None:
            if message["type"] == "http.response.start" and not complete:
                MutableHeaders(scope=message)["Connection"] = "close"  # the rest of the body is not read
            if not refusal:
                await send(message)

        try:
            await self.app(scope, bounded, unless_refused)
        except ClientDisconnect:
            if not refusal:
                raise
        finally:
            self.pending.remove(client, received)
        if refusal:
            await refusal(scope, receive, send)


def _too_large(limit: int) -> JSONResponse:
    return _refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the request body is larger than {limit:,} bytes")


def _refusal(status: HTTPStatus, detail: str) -> JSONResponse:
    return problem(status, detail, {"Connection": "close"})
