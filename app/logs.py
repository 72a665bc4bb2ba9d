"""Configures logging and logs every request.

A log line is a JSON object with the id of its request, or plain text on a terminal. Log lines contain no image content,
no query string and no API key.
"""

import logging
import re
import sys
import time
from contextvars import ContextVar
from random import getrandbits

from pythonjsonlogger.json import JsonFormatter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.settings import Style

log = logging.getLogger(__name__)

LEFT = 499
"""Status of a request whose client disconnected before the response, as in nginx."""

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PROBES = ("/health/live", "/health/ready", "/metrics")  # called every few seconds
_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


def configure(style: Style, level: str) -> None:
    """Send all logs of the process to stderr.

    Args:
        style: Log format. "auto" is text on a terminal and JSON elsewhere.
        level: Lowest level to log.
    """
    handler = logging.StreamHandler()
    if style == "json" or (style == "auto" and not sys.stderr.isatty()):
        handler.setFormatter(
            JsonFormatter(
                "%(levelname)s %(name)s %(process)d %(message)s %(request_id)s",
                rename_fields={"levelname": "level", "name": "logger"},
                timestamp="time",
            )
        )
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(_with_request_id)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a bad form gets a response, not a log line


def _with_request_id(record: logging.LogRecord) -> bool:
    record.request_id = _request_id.get()
    return True


class RequestLog:
    """ASGI middleware that gives every request an id, returns it as X-Request-ID, and logs one line per request.

    It keeps the X-Request-ID of a client that has 1 to 64 letters, digits, dots, underscores or hyphens.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        request_id = given if _SANE_ID.fullmatch(given) else f"{getrandbits(128):032x}"  # no secret, so no system call
        _request_id.set(request_id)
        status = LEFT

        async def identified(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, identified)
        finally:
            path = scope.get("raw_path", b"").decode("ascii", "replace")
            level = logging.DEBUG if path in _PROBES else logging.INFO
            if log.isEnabledFor(level):
                client = scope["client"][0] if scope.get("client") else None
                milliseconds = round((time.perf_counter() - started) * 1000, 3)
                extra = {"client": client, "milliseconds": milliseconds}
                log.log(level, "%s %s %d", scope["method"], path, status, extra=extra)
