"""Parses HTTP/1.1 requests and ignores `Upgrade` headers."""

from array import array
from typing import Protocol

import httptools
from typing_extensions import override


class Connection(Protocol):
    """The interface of a connection that receives the callbacks of its parser."""

    parser: httptools.HttpRequestParser
    url: bytes
    """Request target of the latest request."""
    headers: list[tuple[bytes, bytes]]
    """Headers of the latest request, with names in lower case."""


class RequestParser(httptools.HttpRequestParser):
    """The httptools parser, extended to continue with HTTP when a client requests a protocol upgrade.

    llhttp treats a head with `Connection: upgrade` and `Upgrade` as the end of HTTP. It skips the body and parses the
    bytes that follow as the next request. This service supports no upgrade. A server that ignores an upgrade must read
    the request as if the header were absent (RFC 9110, section 7.8). The parser therefore reads such a head twice. For
    the second pass it removes the `Upgrade` lines and gives the head to a new parser of the connection.
    `should_upgrade` is true only in the callbacks of the first pass.

    Args:
        connection: Connection whose bytes are parsed.
    """

    def __init__(self, connection: Connection):
        super().__init__(connection)
        self._connection = connection
        # Without this, bytes after a request with `Connection: close` are an error, and the request gets no response.
        self.set_dangerous_leniencies(lenient_data_after_close=True)

    @override
    def feed_data(self, data: "bytes | bytearray | memoryview[int] | array[int]") -> None:
        """Parse received bytes.

        Raises:
            httptools.HttpParserError: The bytes are not an HTTP/1.1 request, or a callback failed.
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
