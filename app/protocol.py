"""HTTP connections with bounds: uvicorn's protocol has none on the size of a head, nor on how slowly a client may be.

Bodies are bounded by `app.limits`.
"""

import asyncio
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.errors import problem

_MAX_HEAD_BYTES = 32 << 10
_HEAD_TIMEOUT_S = 10.0
_READ_TIMEOUT_S = 30.0
_MAX_CONNECTIONS = 900  # fewer than the file descriptors that a process usually may open


class BoundedHttp(HttpToolsProtocol):
    """Cuts off clients that send too large a head, or send or read too slowly, and refuses too many connections."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._stalled_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _MAX_CONNECTIONS:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections; try again later")
        self._start_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end_head()
        self._end_stall()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_timer and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES:
                self.send_400_response("")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._start_head()

    def on_headers_complete(self) -> None:
        self._end_head()
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > _MAX_HEAD_BYTES:
            self._head_bytes = size
            raise ValueError(size)  # which uvicorn answers with `send_400_response`
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be read as a request, and close the connection."""
        if self._head_bytes > _MAX_HEAD_BYTES:
            detail = f"the request's line and headers are larger than {_MAX_HEAD_BYTES:,} bytes"
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, detail)
        else:
            self._refuse(HTTPStatus.BAD_REQUEST, msg)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled_timer = self.loop.call_later(_READ_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._end_stall()

    def _start_head(self) -> None:
        if not self._head_timer:
            self._head_bytes = 0
            self._head_timer = self.loop.call_later(_HEAD_TIMEOUT_S, self.transport.abort)

    def _end_head(self) -> None:
        if self._head_timer:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_stall(self) -> None:
        if self._stalled_timer:
            self._stalled_timer.cancel()
            self._stalled_timer = None

    def _refuse(self, status: HTTPStatus, detail: str) -> None:
        answer = problem(status, detail, {"Connection": "close"})
        head = [b"HTTP/1.1 %d %s" % (status, status.phrase.encode())]
        head += [name + b": " + value for name, value in answer.raw_headers]
        self.transport.write(b"\r\n".join([*head, b"", bytes(answer.body)]))
        self.transport.close()
