"""Limits the head size and the slowness of HTTP connections, because uvicorn's protocol limits neither.

`app.middleware.body_limit` limits the bodies and `app.server.connections` the number of connections.
`app.server.http_parser` finds the boundaries of requests. When the service is overloaded, this module refuses
predictions after reading their bytes, before they cost more.
"""

import asyncio
from collections.abc import Callable
from functools import cache
from http import HTTPStatus
from typing import Any, NoReturn, cast

from fastapi.responses import JSONResponse
from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.clients import UNIX_CLIENT
from app.errors import ProblemResponse, problem_response
from app.exceptions import Unavailable
from app.server.connections import SLOWEST_BYTES_PER_S, ConnectionTable
from app.server.http_parser import RequestParser
from app.server.joined_writes import JOINED_WRITES, JoinedWrites

_MAX_HEAD_BYTES = 32 << 10
_HEAD_TIMEOUT_S = 10.0
_READ_TIMEOUT_S = 30.0
_MAX_PIPELINED = 32
_RETRY_AFTER_S = 1.0
_CREDIT_S = 5.0  # maximum progress of a client ahead of the clock


ON_DISCONNECT = "cifar100.on_leaving"
"""Key in a request's scope: a function to call if the client disconnects before the response."""


BODY_RECEIVED = "cifar100.arrived"
"""Key that is added to a request's scope when its whole body has arrived."""


class BoundedHttp(HttpToolsProtocol):
    """A uvicorn protocol with limits for each connection.

    It limits the head size, the number of pipelined requests, and the time that a client takes to send a head or to
    read a response. It ignores protocol upgrades, and refuses a head that other servers may parse differently.

    Args:
        sheds: Function of a URL and a client address. It returns True if the service is too busy, so that the request
            must be refused with 503.
        exceeds_share: Function of a client address. It returns True if the client has its full share of images waiting.
            After a 503 its connection is not read for the second that Retry-After names.
        count_refusal: Callback with the reason of a refusal that no other object counts.
        table: Connections of this process.
        root_path: Path prefix of the service in its settings. It is a part of the types of the problems that the
            protocol itself sends.
    """

    def __init__(
        self,
        *args: Any,
        should_shed: Callable[[bytes, str], bool],
        table: ConnectionTable,
        exceeds_share: Callable[[str], bool] = lambda _: False,
        count_refusal: Callable[[str], None] = lambda _: None,
        root_path: str = "",
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.parser = RequestParser(self)
        self.progress = 0.0
        self._table = table
        self._from_proxy = False
        self._should_shed = should_shed
        self._exceeds_share = exceeds_share
        self._count_refusal = count_refusal
        self._root_path = root_path
        self._is_shedding = False
        self._is_refused = False
        self._in_head = True
        self._head_bytes = 0  # bytes since the start of the head, or since the last part of the body
        self._unread = 0  # bytes of the last read that no callback has counted
        self._head_timer: asyncio.TimerHandle | None = None
        self._stalled_timer: asyncio.TimerHandle | None = None

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.server and self.server[1] is None:
            self.client = (UNIX_CLIENT, 0)
        host = self.client[0] if self.client else ""
        self._from_proxy = self._table.is_proxy(host)
        self.progress = self.loop.time()
        if not self._table.admit(self, host):
            self._refuse(_unavailable(_TOO_MANY_CONNECTIONS, "connections_full"))
        self._start_head_timer()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._table.remove(self)
        if self.cycle and (on_disconnect := cast(dict[str, Any], self.cycle.scope).get(ON_DISCONNECT)):
            on_disconnect()
        self._finish_head()
        self._stop_stall_timer()

    @override
    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._unread = len(data)
        latest = self.loop.time() + _CREDIT_S
        self.progress = min(self.progress + len(data) / SLOWEST_BYTES_PER_S, latest)
        super().data_received(data)
        if self.transport.is_closing() or self._is_refused:
            return
        self._head_bytes += self._unread
        if self._head_bytes > _MAX_HEAD_BYTES:
            self.send_400_response("")
        elif self._in_head or (self._idle and not self.timeout_keep_alive_task):  # an empty line came before a head
            self._start_head_timer()

    @override
    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0

    @override
    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # trailers of a chunked body are dropped
            super().on_header(name, value)

    @override
    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > _MAX_HEAD_BYTES:
            self._head_bytes = size
            raise ValueError(size)  # uvicorn calls `send_400_response` for it
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                self._reject(HTTPStatus.NOT_IMPLEMENTED, "this service is no proxy: CONNECT is not supported")
            return  # the parser reads the head again without `Upgrade`
        self._reset_head_bytes()
        if len(self.pipeline) >= _MAX_PIPELINED:
            self.transport.abort()
            raise ValueError(len(self.pipeline))
        self._check_framing()
        if self._from_proxy:
            self._charge_client()
        self._unset_keepalive_if_required()
        if (
            self._idle
            and self.parser.get_method() == b"POST"
            and not self._has_origin
            and self._should_shed(self.url, self.client[0] if self.client else "")
        ):
            self._is_shedding = True  # the head timer runs until the body has arrived
            if self.expect_100_continue:
                self._refuse(_unavailable(_OVERLOADED))
            return
        self._finish_head()
        super().on_headers_complete()
        self.cycle.transport = writes = cast(asyncio.Transport, JoinedWrites(self.transport))
        cast(dict[str, Any], self.cycle.scope)[JOINED_WRITES] = writes

    @override
    def on_body(self, body: bytes) -> None:
        self._reset_head_bytes()
        if not self._is_shedding:
            super().on_body(body)

    @override
    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._reset_head_bytes()
        if not self._is_shedding:
            super().on_message_complete()
            cast(dict[str, Any], self.cycle.scope)[BODY_RECEIVED] = True
            return
        self._is_shedding = False
        self._finish_head()
        if self._from_proxy:
            self._table.discharge(self)
        self.transport.write(_encode_overloaded(self._root_path, is_open_inference=b"/v2/" in self.url))
        if not self._from_proxy and self.client and self._exceeds_share(self.client[0]):
            self.flow.pause_reading()
            self.loop.call_later(_RETRY_AFTER_S, self.flow.resume_reading)
        if not self.parser.should_keep_alive():
            self._close()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    @override
    def send_400_response(self, msg: str) -> None:
        """Send an error response to a malformed request, and close the connection."""
        if self.transport.is_closing():
            return
        if self._head_bytes > _MAX_HEAD_BYTES:
            detail = f"the request's line and headers are larger than {_MAX_HEAD_BYTES:,} bytes"
            self._refuse(problem_response(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, detail))
        else:
            self._refuse(problem_response(HTTPStatus.BAD_REQUEST, msg))

    @override
    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.progress = self.loop.time()
        if self._from_proxy and self._idle:
            self._table.discharge(self)
        if self.transport.is_closing():
            self._start_stall_timer()

    @override
    def timeout_keep_alive_handler(self) -> None:
        self._close()

    @override
    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_stall_timer()

    @override
    def resume_writing(self) -> None:
        super().resume_writing()
        self.progress = self.loop.time()
        if not self.transport.is_closing():
            self._stop_stall_timer()

    @property
    def is_busy(self) -> bool:
        """True if the client waits for the service: it has sent a whole request and reads the response."""
        is_complete = bool(self.pipeline) or (not self._idle and not self.cycle.more_body)
        return is_complete and not self.flow.write_paused

    def evict(self) -> None:
        """Close the connection at once and drop the unsent bytes."""
        self.transport.abort()

    @property
    def _idle(self) -> bool:
        """True if every request so far has its response."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def _has_origin(self) -> bool:
        """True if a web page made the request.

        A page of another origin can only read a response with CORS headers, which the application adds. This protocol
        therefore never sheds such a request.
        """
        return any(name == b"origin" for name, _ in self.headers)

    def _check_framing(self) -> None:
        """Refuse a head that a proxy in front may parse differently (RFC 9112, sections 3.2 and 6.1)."""
        names = [name for name, _ in self.headers]
        hosts = names.count(b"host")
        if hosts != 1 and (hosts or self.parser.get_http_version() != "1.0"):
            self._reject(HTTPStatus.BAD_REQUEST, f"the request has {hosts} Host headers; send exactly one")
        if b"transfer-encoding" in names:
            codings = [value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"]
            if codings != [b"chunked"]:
                self._reject(HTTPStatus.BAD_REQUEST, "the only supported Transfer-Encoding is chunked")
            if self.parser.get_http_version() != "1.1":
                self._reject(HTTPStatus.BAD_REQUEST, "Transfer-Encoding needs HTTP/1.1")

    def _charge_client(self) -> None:
        """Count the request for the client that the proxy names."""
        forwarded = [value for name, value in self.headers if name == b"x-forwarded-for"]
        if forwarded and not self._table.charge(self, b", ".join(forwarded).decode("latin-1")):
            self._refuse(_unavailable(_TOO_MANY_CONNECTIONS, "connections_full"))
            raise ValueError(_TOO_MANY_CONNECTIONS)  # stops the parser

    def _reject(self, status: HTTPStatus, detail: str) -> NoReturn:
        """Send an error response to a head, and stop the parser."""
        self._refuse(problem_response(status, detail))
        raise ValueError(detail)

    def _reset_head_bytes(self) -> None:
        self._unread = self._head_bytes = 0

    def _start_head_timer(self) -> None:
        if not self._head_timer:
            self._head_timer = self.loop.call_later(_HEAD_TIMEOUT_S, self._on_head_timeout)

    def _on_head_timeout(self) -> None:
        if self._is_shedding:  # its response does not depend on the rest of the body
            self._refuse(_unavailable(_OVERLOADED))
        else:
            self.transport.abort()

    def _finish_head(self) -> None:
        self._in_head = False
        if self._head_timer:
            self._head_timer.cancel()
            self._head_timer = None

    def _start_stall_timer(self) -> None:
        if not self._stalled_timer:
            self._stalled_timer = self.loop.call_later(_READ_TIMEOUT_S, self.transport.abort)

    def _stop_stall_timer(self) -> None:
        if self._stalled_timer:
            self._stalled_timer.cancel()
            self._stalled_timer = None

    def _refuse(self, response: ProblemResponse) -> None:
        """Send a response and close the connection.

        If earlier requests are in progress, they get their responses first. The connection then closes without
        `response`.
        """
        if self._is_refused:
            return
        self._is_refused = True
        if response.refusal and not self._is_shedding:  # `should_shed` counts the predictions that it refuses
            self._count_refusal(response.refusal)
        is_earlier_under_way = self._in_head and not self._idle
        self._finish_head()
        if is_earlier_under_way:
            self.cycle.keep_alive = False
            return
        if self._idle or not self.cycle.response_started:
            response.headers["Connection"] = "close"
            self.transport.write(_encode_response(response.adapt(self._root_path)))
        self._close()

    def _close(self) -> None:
        """Close the connection after the client has read the pending bytes, or after 30 s."""
        self.transport.close()
        self._start_stall_timer()


def _unavailable(detail: str, refusal: str | None = None) -> ProblemResponse:
    return problem_response(Unavailable.status, detail, Unavailable.default_headers, refusal)


def _encode_response(response: JSONResponse) -> bytes:
    head = [b"HTTP/1.1 %d %s" % (response.status_code, HTTPStatus(response.status_code).phrase.encode())]
    head += [name + b": " + value for name, value in response.raw_headers]
    return b"\r\n".join([*head, b"", bytes(response.body)])


_TOO_MANY_CONNECTIONS = "too many connections; try again later"
_OVERLOADED = "too many images are waiting; try again later"


@cache
def _encode_overloaded(root_path: str, is_open_inference: bool) -> bytes:
    return _encode_response(_unavailable(_OVERLOADED).adapt(root_path, is_open_inference))
