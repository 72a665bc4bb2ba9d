"""Split an ordinary multipart form that is in memory as a whole.

Browsers, curl and the HTTP libraries of most languages write parts of one shape. Splitting such a form takes a fifth of
the time of the streaming parser, which reads every other form and words every error.
"""

import re
from typing import NamedTuple

_BOUNDARY = re.compile(r'multipart/form-data; *boundary=(?:([\w.-]{1,70})|"([\w.-]{1,70})")', re.ASCII | re.IGNORECASE)
_HEADERS = re.compile(
    rb'\r\nContent-Disposition: form-data; name="([\w.-]{1,64})"'
    rb'(?:; filename="([^"\\%\x00-\x1f\x7f-\xff]{1,255})")?'
    rb"(?:\r\nContent-Type: [\w.+/-]{1,255})?\r\n\r\n",
    re.IGNORECASE | re.ASCII,
)


class Part(NamedTuple):
    """A part of a form: its name, its file name if it is a file, and its content."""

    name: str
    filename: str | None
    content: bytes


def split(content_type: str, body: bytes) -> list[Part] | None:
    """Split a form into its parts.

    Args:
        content_type: Value of the request's Content-Type header.
        body: The whole body.

    Returns:
        The parts in the order of the body. None if the form has any other than the ordinary shape, such as further
        headers, escaped names, bytes after the closing boundary or no closing boundary.
    """
    found = _BOUNDARY.fullmatch(content_type)
    if not found:
        return None
    boundary = b"--" + (found[1] or found[2]).encode()
    if not body.startswith(boundary):
        return None
    delimiter, position, parts = b"\r\n" + boundary, len(boundary), []
    while headers := _HEADERS.match(body, position):
        end = body.find(delimiter, headers.end() - 2)
        if end < headers.end():
            return None
        name, filename = headers.groups()
        parts.append(Part(name.decode(), None if filename is None else filename.decode(), body[headers.end() : end]))
        position = end + len(delimiter)
    return parts if parts and body[position:] in (b"--\r\n", b"--") else None
