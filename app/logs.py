"""Configure logging.

A log line is a JSON object with the id of its request, or plain text on a terminal. Log lines contain no image content,
no query string and no API key.
"""

import logging
import sys
from contextvars import ContextVar

from pythonjsonlogger.json import JsonFormatter

from app.settings import LogStyle

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Id of the request that the current task serves."""


def configure(style: LogStyle, level: str) -> None:
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
    handler.addFilter(_add_request_id)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a bad form gets a response, not a log line


def _add_request_id(record: logging.LogRecord) -> bool:
    record.request_id = request_id.get()
    return True
