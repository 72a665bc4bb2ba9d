"""Test request framing: upgrade offers, and ambiguous heads that two parsers would read differently.

Each test sends bytes over a real socket and checks the requests that the application receives.
"""

import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
from sockets import Address, connect, exchange, make_head, read_response, run_server
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from app.main import create_app
from app.settings import Settings

HIDDEN = make_head("PUT /models/resnet/live", b"Content-Length: 13") + b'{"version":1}'
LAST = make_head("GET /last", b"Connection: close")
OFFERS = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk",
    "websocket": b"Connection: keep-alive, upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13",
    "anything": b"upgrade: a, b\r\nconnection: upgrade\r\nUpgrade: c/1",
    "proxy": b"Proxy-Connection: upgrade\r\nUpgrade: h2c",
}


@dataclass
class Recorder:
    """An ASGI application that records the requests it receives."""

    requests: list[tuple[str, str, bytes]]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body = await Request(scope, receive).body()
        self.requests.append((scope["method"], scope["path"], body))
        await PlainTextResponse("answered")(scope, receive, send)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder([])


@pytest.fixture
def address(recorder: Recorder) -> Iterator[Address]:
    with run_server(recorder) as listening:
        yield cast(Address, listening.getsockname())


def chunked(body: bytes) -> bytes:
    return b"%x;name=value\r\n%s\r\n0\r\n\r\n" % (len(body), body)


def send_in_pieces(data: bytes, size: int, connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for start in range(0, len(data), size):
        connection.sendall(data[start : start + size])


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
def test_body_of_request_with_upgrade_is_its_body(
    address: Address, recorder: Recorder, offer: bytes, framing: str, size: int
) -> None:
    body = b"\r\n" * 20 + HIDDEN
    if framing == "length":
        request = make_head("POST /predict", b"Content-Length: %d" % len(body), offer) + body
    else:
        request = make_head("POST /predict", b"Transfer-Encoding: chunked", offer) + chunked(body)
    with connect(address) as connection:
        send_in_pieces(request + LAST, size, connection)
        assert read_response(connection).count(b"HTTP/1.1 200 OK") == 2
    assert recorder.requests == [("POST", "/predict", body), ("GET", "/last", b"")]


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
def test_body_that_comes_after_head_with_upgrade_is_its_body(
    address: Address, recorder: Recorder, offer: bytes
) -> None:
    body = b"\r\n" * 22_500 + HIDDEN
    with connect(address) as connection:
        request = make_head("POST /predict", b"Content-Length: %d" % len(body), b"Expect: 100-continue", offer)
        connection.sendall(request)
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body + LAST)
        assert read_response(connection).count(b"HTTP/1.1 200 OK") == 2
    assert recorder.requests == [("POST", "/predict", body), ("GET", "/last", b"")]


def test_requests_with_upgrade_and_without_body_are_answered_in_turn(address: Address, recorder: Recorder) -> None:
    upgrade = make_head("GET /events", OFFERS["websocket"])
    assert exchange(address, upgrade * 3 + LAST).count(b"HTTP/1.1 200 OK") == 4
    assert recorder.requests == [("GET", "/events", b"")] * 3 + [("GET", "/last", b"")]


def test_connection_is_closed_after_request_with_upgrade_that_says_so(address: Address, recorder: Recorder) -> None:
    offer = b"Connection: close, Upgrade\r\nUpgrade: h2c"
    received = exchange(address, make_head("POST /predict", b"Content-Length: 3", offer) + b"abc" + LAST)
    assert received.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in received
    assert recorder.requests == [("POST", "/predict", b"abc")]


def test_what_follows_an_upgrade_without_body_is_no_other_protocol(address: Address, recorder: Recorder) -> None:
    frame = b"\x81\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58"  # the WebSocket message "Hello"
    assert exchange(address, make_head("GET /events", OFFERS["websocket"]) + frame).count(b"HTTP/1.1 ") == 1
    assert recorder.requests == [("GET", "/events", b"")]


def test_large_head_with_upgrade_is_431(address: Address, recorder: Recorder) -> None:
    request = make_head("POST /predict", b"X-Large: " + b"a" * 40_000, OFFERS["h2c"])
    assert exchange(address, request).startswith(b"HTTP/1.1 431 ")
    assert recorder.requests == []


@pytest.mark.parametrize("line", [b"", b"Connection: Upgrade\r\nUpgrade: h2c", b"Content-Length: 5"])
def test_connect_is_refused_and_closes_the_connection(address: Address, recorder: Recorder, line: bytes) -> None:
    received = exchange(address, make_head("CONNECT other:443", line, host="other:443") + LAST)
    assert received.startswith(b"HTTP/1.1 501 ")
    assert received.count(b"HTTP/1.1 ") == 1
    assert recorder.requests == []


REFUSED = {
    "two lengths": b"Host: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
    "same length twice": b"Host: x\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "list of lengths": b"Host: x\r\nContent-Length: 3, 3\r\n\r\nabc",
    "length with sign": b"Host: x\r\nContent-Length: +3\r\n\r\nabc",
    "negative length": b"Host: x\r\nContent-Length: -3\r\n\r\nabc",
    "hexadecimal length": b"Host: x\r\nContent-Length: 0x3\r\n\r\nabc",
    "empty length": b"Host: x\r\nContent-Length: \r\n\r\nabc",
    "length of 65 bits": b"Host: x\r\nContent-Length: 18446744073709551619\r\n\r\nabc",
    "length, then chunked": b"Host: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "chunked, then length": b"Host: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "xchunked": b"Host: x\r\nTransfer-Encoding: xchunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "identity": b"Host: x\r\nTransfer-Encoding: identity\r\n\r\n",
    "chunked, identity": b"Host: x\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "gzip, chunked": b"Host: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": b"Host: x\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked after a vertical tab": b"Host: x\r\nTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "empty coding": b"Host: x\r\nTransfer-Encoding:\r\nContent-Length: 3\r\n\r\nabc",
    "folded line": b"Host: x\r\nA: b\r\n c\r\n\r\n",
    "folded coding": b"Host: x\r\nTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "line feed alone": b"Host: x\nContent-Length: 3\r\n\r\nabc",
    "carriage return alone": b"Host: x\rContent-Length: 3\r\n\r\nabc",
    "space before colon": b"Host: x\r\nContent-Length : 3\r\n\r\nabc",
    "space before name": b" Content-Length: 3\r\nHost: x\r\n\r\nabc",
    "no colon": b"Host: x\r\nTransfer-Encoding\r\n\r\n",
    "zero byte": b"Host: x\r\nA: b\0c\r\n\r\n",
    "two hosts": b"Host: x\r\nHost: y\r\n\r\n",
    "same host twice": b"Host: x\r\nHost: x\r\n\r\n",
    "no host": b"A: b\r\n\r\n",
}


@pytest.mark.parametrize("offer", [b"", b"Connection: upgrade\r\nUpgrade: h2c\r\n"], ids=["plain", "upgrade"])
@pytest.mark.parametrize("rest", REFUSED.values(), ids=REFUSED)
def test_head_that_is_read_in_two_ways_is_400(address: Address, recorder: Recorder, rest: bytes, offer: bytes) -> None:
    received = exchange(address, b"POST /predict HTTP/1.1\r\n" + offer + rest + HIDDEN + LAST)
    assert received.startswith(b"HTTP/1.1 400 ")
    assert received.count(b"HTTP/1.1 ") == 1
    assert recorder.requests == []


BROKEN_CHUNKS = {
    "line feed alone": b"3\nabc\n0\n\n",
    "line feed in extension": b"3;a=b\nabc\r\n0\r\n\r\n",
    "space after size": b"3 \r\nabc\r\n0\r\n\r\n",
    "prefix of size": b"0x3\r\nabc\r\n0\r\n\r\n",
    "size of 65 bits": b"10000000000000003\r\nabc\r\n0\r\n\r\n",
    "longer than its size": b"3\r\nabcde\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("offer", [b"", b"Connection: upgrade\r\nUpgrade: h2c"], ids=["plain", "upgrade"])
@pytest.mark.parametrize("body", BROKEN_CHUNKS.values(), ids=BROKEN_CHUNKS)
def test_broken_chunk_is_400_and_ends_the_connection(
    address: Address, recorder: Recorder, body: bytes, offer: bytes
) -> None:
    request = make_head("POST /predict", b"Transfer-Encoding: chunked", offer) + body
    received = exchange(address, request + HIDDEN + LAST)
    assert received.startswith(b"HTTP/1.1 400 ")
    assert received.count(b"HTTP/1.1 ") == 1
    assert recorder.requests == []


def test_chunked_request_of_http_1_0_is_400(address: Address, recorder: Recorder) -> None:
    request = b"POST /predict HTTP/1.0\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    assert exchange(address, request + HIDDEN).startswith(b"HTTP/1.1 400 ")
    assert recorder.requests == []


def test_request_of_http_1_0_needs_no_host(address: Address, recorder: Recorder) -> None:
    assert exchange(address, b"GET /last HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    assert recorder.requests == [("GET", "/last", b"")]


def test_request_before_broken_one_gets_its_own_answer(address: Address, recorder: Recorder) -> None:
    received = exchange(address, make_head("GET /first") + b"GET /second HTTP/1.1\r\n\r\n" + LAST)
    assert received.startswith(b"HTTP/1.1 200 ")
    assert received.count(b"HTTP/1.1 ") == 1
    assert recorder.requests == [("GET", "/first", b"")]


ROUTES = [
    "POST /predict",
    "POST /evaluate",
    "POST /train",
    "PUT /models/resnet/live",
    "DELETE /train/1",
    "GET /",
    "POST /",
]


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_answers_request_with_upgrade_once(route: str, models: Path, tmp_path: Path) -> None:
    app = create_app(Settings(models=models, runs=tmp_path / "runs"))
    body = b"\r\n" * 100 + HIDDEN
    offers = [offer for name, offer in OFFERS.items() if name != "proxy"]  # a proxy's header makes the call non-local
    lines = (b"Content-Type: image/png", b"Content-Length: %d" % len(body))
    with run_server(app) as listening:
        answers = []
        for offer in (b"", *offers):
            request = make_head(route, *lines, offer, host="127.0.0.1") + body + LAST
            answers.append(re.findall(rb"HTTP/1.1 (\d+)", exchange(listening.getsockname(), request)))
    assert answers == [answers[0]] * (1 + len(offers))
    assert answers[0][1:] in ([], [b"404"])  # some routes answer without reading the body and close
