"""Give every request an id and log one line per request."""

import logging
import re
import time
from collections.abc import Callable
from random import getrandbits

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.logs import request_id
from app.middleware.proxy import route_path

log = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499
"""Status of a request whose client disconnected before the response, as in nginx."""

_VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
PROBES = ("/health/live", "/health/ready", "/metrics")
"""Paths that monitors call every few seconds."""


class RequestLogMiddleware:
    """ASGI middleware that gives every request an id, returns it as X-Request-ID, and logs one line per request.

    It keeps the X-Request-ID of a client that has 1 to 64 letters, digits, dots, underscores or hyphens.

    Args:
        app: Next ASGI application.
        trace_id: Function that returns the id of the trace of the current request. None if there are no traces.
    """

    def __init__(self, app: ASGIApp, trace_id: Callable[[], str] | None = None):
        self.app = app
        self._trace_id = trace_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, then log it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        own = given if _VALID_ID.fullmatch(given) else f"{getrandbits(128):032x}"  # no secret, so no system call
        request_id.set(own)
        status = CLIENT_CLOSED_REQUEST

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", own.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            path = scope.get("raw_path", b"").decode("ascii", "replace")
            level = logging.DEBUG if route_path(scope) in PROBES else logging.INFO
            if log.isEnabledFor(level):
                client = scope["client"][0] if scope.get("client") else None
                milliseconds = round((time.perf_counter() - started) * 1000, 3)
                extra = {"client": client, "milliseconds": milliseconds}
                extra |= {"trace_id": self._trace_id()} if self._trace_id else {}
                log.log(level, "%s %s %d", scope["method"], path, status, extra=extra)
