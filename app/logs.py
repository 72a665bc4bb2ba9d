"""Logs: one line of JSON per event, each with the id of the request it belongs to; plain text on a terminal.

Lines hold no image content, no query and no key.
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
"""Stands for the status of a request whose client has left before the answer, as with nginx."""

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PROBES = ("/health/live", "/health/ready", "/metrics")  # asked every few seconds
_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


def configure(style: Style, level: str) -> None:
    """Send all logs of the process to stderr.

    Args:
        style: auto is text on a terminal and JSON elsewhere.
        level: the lowest that is written.
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
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a client's broken form is answered, not logged


def _with_request_id(record: logging.LogRecord) -> bool:
    record.request_id = _request_id.get()
    return True


class RequestLog:
    """ASGI middleware: gives every request an id, sends it back as X-Request-ID, and logs one line per answer.

    A client's own X-Request-ID is kept if it is short and plain.
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
