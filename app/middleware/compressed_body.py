"""Decode a compressed request body in small pieces, so that neither its size nor its expansion blocks the event loop.

The content codings are gzip (RFC 1952) and deflate, which is the zlib format (RFC 1950, RFC 9110 section 8.4.1.2).
"""

import asyncio
import zlib
from typing import Literal

from starlette.types import Message, Receive

from app.exceptions import MalformedBody, TooLarge
from app.machine import MIB

PIECE = 64 << 10
"""Largest number of bytes that one call decodes, so that a call is short."""

Coding = Literal["gzip", "deflate"]

_WINDOW_BITS = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}  # 16 selects the gzip format
_INPUT = 16 << 10
_MAX_MEMBERS = 100  # each takes a new decoder
_MAX_RATIO = 100
_ANY_RATIO_BYTES = MIB  # a decoded body of this size may have any ratio


class CompressedBody:
    """A compressed request body that is decoded while it is received.

    Args:
        receive: ASGI function that returns the next part of the encoded body.
        coding: Content coding of the body.
    """

    def __init__(self, receive: Receive, coding: Coding = "gzip"):
        self._receive = receive
        self._decoder = BodyDecoder(coding)
        self._has_arrived = False

    async def receive(self) -> Message:
        """Return the next message of the request with up to `PIECE` bytes of the decoded body.

        Raises:
            MalformedBody: The body does not have its coding, is incomplete, or consists of too many gzip members.
            TooLarge: The body expands too far.
        """
        while True:
            if self._decoder.needs_input:
                message = await self._receive()
                if message["type"] != "http.request":
                    return message
                self._decoder.feed(message.get("body", b""))
                self._has_arrived = not message.get("more_body", False)
            else:
                await asyncio.sleep(0)  # other requests have their turn
            piece = self._decoder.read()
            is_last = self._has_arrived and self._decoder.needs_input
            if is_last:
                self._decoder.finish()
            if piece or is_last:
                return {"type": "http.request", "body": piece, "more_body": not is_last}


class BodyDecoder:
    """A decoder of one body, which is fed with its parts as they arrive. Only a gzip body may have several members."""

    def __init__(self, coding: Coding):
        self._coding = coding
        self._member = self._new_member()
        self._members = 1
        self._input = memoryview(b"")
        self._may_have_more = False  # the decoder may hold decoded bytes that did not fit into the last piece
        self._encoded = self._decoded = 0

    @property
    def needs_input(self) -> bool:
        """True if all parts so far are decoded."""
        return not self._input and not self._may_have_more

    def feed(self, data: bytes) -> None:
        """Take the next part of the body, after `needs_input` has become true."""
        self._input = memoryview(data)
        self._encoded += len(data)

    def read(self) -> bytes:
        """Decode and return up to `PIECE` bytes. The result may be empty.

        Raises:
            MalformedBody: The body does not have its coding, or consists of too many gzip members.
            TooLarge: The body expands too far.
        """
        if self._member.eof and self._input and self._coding == "deflate":
            raise MalformedBody("bytes follow the end of the deflate body; send it again")
        if self._member.eof and self._input:
            self._members += 1
            if self._members > _MAX_MEMBERS:
                raise MalformedBody(f"the gzip body has more than {_MAX_MEMBERS} members")
            self._member = self._new_member()
        taken = self._input[:_INPUT]
        try:
            piece = self._member.decompress(taken, PIECE)
        except zlib.error as error:
            raise MalformedBody(f"the body is not {self._coding}, as its Content-Encoding says: {error}") from None
        left = len(self._member.unconsumed_tail) + len(self._member.unused_data)
        self._input = self._input[len(taken) - left :]
        self._may_have_more = len(piece) == PIECE
        self._decoded += len(piece)
        if self._decoded > _ANY_RATIO_BYTES + _MAX_RATIO * self._encoded:
            raise TooLarge(
                f"the {self._coding} body expands to more than {_MAX_RATIO} times its size; send it uncompressed"
            )
        return piece

    def finish(self) -> None:
        """Check that the body is complete.

        Raises:
            MalformedBody: The body ends before its compressed data do.
        """
        if not self._member.eof:
            raise MalformedBody(f"the {self._coding} body ends before its end marker; send it again")

    def _new_member(self) -> "zlib._Decompress":
        return zlib.decompressobj(_WINDOW_BITS[self._coding])
