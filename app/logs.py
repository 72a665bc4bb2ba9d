"""Configure logging.

A log line is a JSON object with the id of its request, or plain text on a terminal. Log lines contain no image content,
no query string and no API key.
"""

import asyncio
import logging
import sys
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any, TextIO

from pythonjsonlogger.json import JsonFormatter
from typing_extensions import override

from app.settings import LogStyle
from training.encoding import replace_surrogates

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Id of the request that the current task serves."""


class _TextFormatter(logging.Formatter):
    """A formatter of plain text that shows file names with any characters."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        return replace_surrogates(super().format(record))


class _JsonFormatter(JsonFormatter):
    """A formatter of JSON that shows file names with any characters."""

    @override
    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        return {key: replace_surrogates(value) if isinstance(value, str) else value for key, value in log_data.items()}


def configure(style: LogStyle, level: str) -> None:
    """Send all logs of the process to stderr.

    Args:
        style: Log format. "auto" is text on a terminal and JSON elsewhere.
        level: Lowest level to log.
    """
    handler = _BatchHandler()
    if style == "json" or (style == "auto" and not sys.stderr.isatty()):
        handler.setFormatter(
            _JsonFormatter(
                "%(levelname)s %(name)s %(process)d %(message)s %(request_id)s",
                rename_fields={"levelname": "level", "name": "logger"},
                timestamp="time",
            )
        )
    else:
        handler.setFormatter(_TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(_add_request_id)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a bad form gets a response, not a log line
    for library in ("aiobotocore", "botocore"):
        logging.getLogger(library).setLevel(logging.WARNING)  # they log where they have found their credentials


class _BatchHandler(logging.StreamHandler[TextIO]):
    """A handler that writes the lines of one iteration of the event loop in one call.

    A write releases the global interpreter lock, which the event loop then waits for while other threads compute.
    Warnings, and lines from other threads, are written at once. A killed process loses the lines of one iteration.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[str] = []
        self._flushing_loop: asyncio.AbstractEventLoop | None = None

    @override
    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.append(self.format(record) + self.terminator)
            loop = asyncio._get_running_loop() if record.levelno < logging.WARNING else None
            if loop is None:
                self.flush()
            elif loop is not self._flushing_loop:
                self._flushing_loop = loop
                loop.call_soon(self.flush)
        except Exception:
            self.handleError(record)

    @override
    def flush(self) -> None:
        with self.lock or nullcontext():
            lines, self._lines, self._flushing_loop = self._lines, [], None
            if lines:
                self.stream.write("".join(lines))
            super().flush()


def _add_request_id(record: logging.LogRecord) -> bool:
    record.request_id = request_id.get()
    return True
