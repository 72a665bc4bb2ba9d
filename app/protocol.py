"""HTTP connections with bounds: uvicorn's protocol has none on the size of a head, nor on how slowly a client may be.

Bodies are bounded by `app.limits`. What an overloaded service would refuse anyway is refused here, before it costs more
than reading its bytes.
"""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

from fastapi.responses import JSONResponse
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.errors import Unavailable, problem

_MAX_HEAD_BYTES = 32 << 10
_HEAD_TIMEOUT_S = 10.0
_READ_TIMEOUT_S = 30.0
_MAX_CONNECTIONS = 900  # fewer than the file descriptors that a process usually may open
_MAX_PIPELINED = 32


ON_LEAVING = "cifar100.on_leaving"
"""Key of a request's scope: what is to be called if its client leaves before it is answered."""


ARRIVED = "cifar100.arrived"
"""Key of a request's scope that is there once its whole body is."""


class BoundedHttp(HttpToolsProtocol):
    """Cuts off clients that send too large a head, too many requests ahead of the answers, or send or read too slowly.

    Where there are too many connections, the one that has been idle for longest makes room for a new one.

    Args:
        sheds: whether a request for this URL is to be refused at once with 503, as the service has too much to do.
    """

    def __init__(self, *args: Any, sheds: Callable[[bytes, str], bool], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._sheds = sheds
        self._shedding = False
        self._in_head = True
        self._head_bytes = 0  # since the head began, or after it since the last piece of the body
        self._unread = 0  # of what has just been received
        self._head_timer: asyncio.TimerHandle | None = None
        self._stalled_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _MAX_CONNECTIONS and not self._close_another():
            self._refuse(_unavailable("too many connections; try again later"))
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.cycle and (leave := cast(dict[str, Any], self.cycle.scope).get(ON_LEAVING)):
            leave()
        self._end_head()
        self._end_stall()

    def data_received(self, data: bytes) -> None:
        self._unread = len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        self._head_bytes += self._unread
        if self._head_bytes > _MAX_HEAD_BYTES:
            self.send_400_response("")
        elif self._in_head or (self._idle and not self.timeout_keep_alive_task):  # by an empty line before a head
            self._time_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # what follows a chunked body in the form of headers is dropped
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > _MAX_HEAD_BYTES:
            self._head_bytes = size
            raise ValueError(size)  # which uvicorn answers with `send_400_response`
        self._count_anew()
        if len(self.pipeline) >= _MAX_PIPELINED:
            self.transport.abort()
            raise ValueError(len(self.pipeline))
        self._unset_keepalive_if_required()
        if (
            self._idle
            and self.parser.get_method() == b"POST"
            and not self._from_page
            and self._sheds(self.url, self.client[0] if self.client else "")
        ):
            self._shedding = True  # the head counts as going on until the body is there
            if self.expect_100_continue:
                self._refuse(_unavailable(_OVERLOADED))
            return
        self._end_head()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._count_anew()
        if not self._shedding:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._count_anew()
        if not self._shedding:
            super().on_message_complete()
            cast(dict[str, Any], self.cycle.scope)[ARRIVED] = True
            return
        self._shedding = False
        self._end_head()
        self.transport.write(_ANSWER_OVERLOADED)
        if not self.parser.should_keep_alive():
            self._close()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be read as a request, and close the connection."""
        if self.transport.is_closing():
            return
        if self._head_bytes > _MAX_HEAD_BYTES:
            detail = f"the request's line and headers are larger than {_MAX_HEAD_BYTES:,} bytes"
            self._refuse(problem(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, detail))
        else:
            self._refuse(problem(HTTPStatus.BAD_REQUEST, msg))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._time_reading()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._time_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._end_stall()

    def _close_another(self) -> bool:
        """Close the connection that has been idle for longest, if there is one."""
        idle = {
            each: each.timeout_keep_alive_task.when()
            for each in cast("set[BoundedHttp]", self.connections)
            if each.timeout_keep_alive_task and not each.transport.is_closing()
        }
        if idle:
            min(idle, key=idle.__getitem__).transport.close()
        return bool(idle)

    @property
    def _idle(self) -> bool:
        """Whether all requests so far have been answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def _from_page(self) -> bool:
        """Whether a web page made the request, which sees only answers with its origin: those of the application."""
        return any(name == b"origin" for name, _ in self.headers)

    def _count_anew(self) -> None:
        self._unread = self._head_bytes = 0

    def _time_head(self) -> None:
        if not self._head_timer:
            self._head_timer = self.loop.call_later(_HEAD_TIMEOUT_S, self._give_up)

    def _give_up(self) -> None:
        if self._shedding:  # its answer is known without the rest of its body
            self._refuse(_unavailable(_OVERLOADED))
        else:
            self.transport.abort()

    def _end_head(self) -> None:
        self._in_head = False
        if self._head_timer:
            self._head_timer.cancel()
            self._head_timer = None

    def _time_reading(self) -> None:
        if not self._stalled_timer:
            self._stalled_timer = self.loop.call_later(_READ_TIMEOUT_S, self.transport.abort)

    def _end_stall(self) -> None:
        if self._stalled_timer:
            self._stalled_timer.cancel()
            self._stalled_timer = None

    def _refuse(self, answer: JSONResponse) -> None:
        """Answer, and close the connection."""
        answer.headers["Connection"] = "close"
        self.transport.write(_encoded(answer))
        self._close()

    def _close(self) -> None:
        """Close the connection once the client has read what is still to be sent, or has had time enough to."""
        self.transport.close()
        self._time_reading()


def _unavailable(detail: str) -> JSONResponse:
    return problem(Unavailable.status, detail, Unavailable.default_headers)


def _encoded(answer: JSONResponse) -> bytes:
    head = [b"HTTP/1.1 %d %s" % (answer.status_code, HTTPStatus(answer.status_code).phrase.encode())]
    head += [name + b": " + value for name, value in answer.raw_headers]
    return b"\r\n".join([*head, b"", bytes(answer.body)])


_OVERLOADED = "too many images are waiting; try again later"
_ANSWER_OVERLOADED = _encoded(_unavailable(_OVERLOADED))
