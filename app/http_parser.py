"""A parser of HTTP/1.1 requests for which `Upgrade` does not end HTTP."""

from array import array
from typing import Protocol

import httptools
from typing_extensions import override


class Connection(Protocol):
    """Gets the callbacks of its parser."""

    parser: httptools.HttpRequestParser
    url: bytes
    """Target of the latest request."""
    headers: list[tuple[bytes, bytes]]
    """Headers of the latest request, with names in lower case."""


class RequestParser(httptools.HttpRequestParser):
    """httptools' parser, which goes on where a client offers another protocol.

    llhttp takes a head with `Connection: upgrade` and `Upgrade` for the end of HTTP: it skips the body and parses what
    follows as the next request. This service takes no such offer, and a server that ignores it reads the request as
    if the offer was not there (RFC 9110, section 7.8). So such a head is read twice. The second time it has no
    `Upgrade` lines, and a new parser of the connection reads it. `should_upgrade` is true in the callbacks of the first
    time only.

    Args:
        connection: whose bytes are parsed.
    """

    def __init__(self, connection: Connection):
        super().__init__(connection)
        self._connection = connection
        # Without this, what follows a request with `Connection: close` keeps that request from being answered.
        self.set_dangerous_leniencies(lenient_data_after_close=True)

    @override
    def feed_data(self, data: "bytes | bytearray | memoryview[int] | array[int]") -> None:
        """Parse what has been received.

        Raises:
            httptools.HttpParserError: it is no HTTP/1.1 request, or a callback failed.
        """
        parser, rest = self, memoryview(data)
        while True:
            try:
                httptools.HttpRequestParser.feed_data(parser, rest)
                return
            except httptools.HttpParserUpgrade as offer:
                rest = rest[offer.args[0] :]
            head = parser._head_without_offer()
            parser = self._connection.parser = RequestParser(self._connection)
            httptools.HttpRequestParser.feed_data(parser, head)

    def _head_without_offer(self) -> bytes:
        lines = [b"%s %s HTTP/%s" % (self.get_method(), self._connection.url, self.get_http_version().encode())]
        lines += [b"%s: %s" % header for header in self._connection.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])
