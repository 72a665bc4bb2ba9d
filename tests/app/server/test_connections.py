"""Test connections over real sockets: large heads, slow and stalled clients, bodies of all sizes and speeds."""

import asyncio
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, suppress
from functools import wraps
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from numpy.typing import NDArray
from PIL import Image
from sockets import Address, connect, exchange, make_head, make_upload, read_response, run_server, wait_until
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from app.clients import FairShares
from app.dependencies import Services
from app.inference.batching import Batcher
from app.main import create_app
from app.middleware import body_limit
from app.middleware.body_limit import BodyLimitMiddleware
from app.server import connections, protocol
from app.server.connections import ConnectionTable
from app.settings import Settings
from training.runtimes.engine import Engine

pytestmark = pytest.mark.slow


@pytest.fixture
def app(models: Path, tmp_path: Path) -> FastAPI:
    return create_app(Settings(models=models, runs=tmp_path / "runs", max_predict_bytes=300_000))


@pytest.fixture
def keep_alive_s() -> int:
    return 1


@pytest.fixture
def listening(app: FastAPI, monkeypatch: pytest.MonkeyPatch, keep_alive_s: int) -> Iterator[socket.socket]:
    """The listening socket of a server with timeouts of 0.5 s and at most five connections."""
    monkeypatch.setattr(protocol, "_HEAD_TIMEOUT_S", 0.5)
    monkeypatch.setattr(protocol, "_READ_TIMEOUT_S", 0.5)
    monkeypatch.setattr(body_limit, "_BUDGET_S", 0.5)
    with run_server(app, app.state.services.shedder.should_shed, ConnectionTable(5, ""), keep_alive_s) as listening:
        yield listening


@pytest.fixture
def address(listening: socket.socket) -> Address:
    return cast(Address, listening.getsockname())


HEALTH = make_head("GET /health/live", b"Connection: close")


def alive(address: Address, source: str = "127.0.0.1") -> bool:
    return exchange(address, HEALTH, source).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("part", [b"", b"GET /health HTTP/1.1\r\n", b"GET /health HTTP/1.1\r\nX-Slow: abc"])
def test_a_head_that_does_not_end_is_cut_off(address: Address, part: bytes) -> None:
    with connect(address) as connection:
        connection.sendall(part)
        started = time.monotonic()
        assert read_response(connection) == b""
        assert time.monotonic() - started < 30
    assert alive(address)


def test_a_second_head_that_does_not_end_is_cut_off(address: Address) -> None:
    with connect(address) as connection:
        connection.sendall(make_head("GET /health/live") + b"GET /hea")
        assert read_response(connection).count(b"HTTP/1.1 200") == 1


@pytest.mark.parametrize(
    "large",
    [
        b"GET /health HTTP/1.1\r\nX-Large: " + b"a" * 40_000,
        b"GET /health HTTP/1.1\r\nX-Large: " + b"a" * 40_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"A: bbbbbbbb\r\n" * 4_000 + b"\r\n",
        b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n\r\n",
    ],
)
def test_a_large_head_is_431(address: Address, large: bytes) -> None:
    assert exchange(address, large).startswith(b"HTTP/1.1 431 ")
    assert alive(address)


def test_a_huge_head_ends_the_connection(address: Address) -> None:
    """The server closes before it has read everything, so its response may be lost."""
    with connect(address) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 1_000_000 + b"\r\n")
        received = read_response(connection)
        assert not received or received.startswith(b"HTTP/1.1 431 ")

        def send_more() -> None:
            for _ in range(600):
                connection.sendall(b"A: b\r\n")
                time.sleep(0.05)

        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            send_more()
    assert alive(address)


def test_an_empty_line_after_an_answer_does_not_keep_the_connection_open(address: Address) -> None:
    with connect(address) as connection:
        connection.sendall(make_head("GET /health/live"))
        assert status_line(connection).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"\r\n")
        started = time.monotonic()
        assert read_response(connection) == b""
        assert time.monotonic() - started < 30


def test_headers_after_a_body_are_bounded_and_dropped(address: Address) -> None:
    request = make_head("POST /predict", b"Content-Type: image/png", b"Transfer-Encoding: chunked")
    with connect(address) as connection:
        connection.sendall(request + b"1\r\nx\r\n0\r\nX-Request-ID: late\r\n\r\n")
        received = status_line(connection)
        assert received.startswith(b"HTTP/1.1 415 ")
    with connect(address) as connection:
        for part in (request + b"1\r\nx\r\n0\r\n", b"X-Large: " + b"a" * 40_000):
            connection.sendall(part)
            time.sleep(0.1)  # bytes that arrive together with a piece of the body do not count
        assert read_response(connection).startswith(b"HTTP/1.1 431 ")
    assert alive(address)


def test_what_is_no_http_is_400(address: Address) -> None:
    received = exchange(address, b"\x16\x03\x01 hello\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 400 ")
    assert b"application/problem+json" in received


def test_a_body_that_does_not_come_is_408(address: Address) -> None:
    received = exchange(address, make_upload(1000) + b"abc")
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b"too slowly" in received


def test_a_body_that_comes_steadily_may_take_longer(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_limit, "SLOWEST_BYTES_PER_S", 1000)
    with connect(address) as connection:
        connection.sendall(make_upload(3000))
        for _ in range(6):
            connection.sendall(bytes(500))
            time.sleep(0.2)
        assert connection.recv(100).startswith(b"HTTP/1.1 415 ")


def test_a_body_that_begins_fast_may_not_be_silent_for_longer(
    address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_limit, "SLOWEST_BYTES_PER_S", 1000)
    with connect(address) as connection:
        connection.sendall(make_upload(100_001) + bytes(100_000))  # at 1,000 bytes/s this body may take 100 s
        started = time.monotonic()
        assert read_response(connection).startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - started < 30


def test_bodies_of_all_requests_together_are_bounded() -> None:
    async def read_all(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        await Response()(scope, receive, send)

    bounded = BodyLimitMiddleware(read_all, Settings(max_pending_bytes=400_000))
    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [(b"content-length", b"250000")]}

    async def post(last: asyncio.Event) -> Message:
        """Send a body whose last byte waits for an event, and return the first message of the answer."""
        parts = iter([(bytes(249_999), True), (b"\0", False)])
        answer: list[Message] = []

        async def receive() -> Message:
            body, more = next(parts)
            if not more:
                await last.wait()
            return {"type": "http.request", "body": body, "more_body": more}

        async def send(message: Message) -> None:
            answer.append(message)

        await bounded(dict(scope), receive, send)
        return answer[0]

    async def scenario() -> None:
        complete, now = asyncio.Event(), asyncio.Event()
        now.set()
        first = asyncio.create_task(post(complete))
        await asyncio.sleep(0)
        refused = await post(now)
        assert refused["status"] == 503
        assert (b"retry-after", b"1") in refused["headers"]
        complete.set()
        assert (await first)["status"] == 200
        assert (await post(now))["status"] == 200  # the bytes of the first body are released
        assert bounded.pending.total == 0

    asyncio.run(scenario())


def test_bodies_of_one_address_do_not_keep_another_address_from_sending() -> None:
    async def wait_for_body(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        await Response()(scope, receive, send)

    bounded = BodyLimitMiddleware(wait_for_body, Settings(max_pending_bytes=1_000_000))
    head = {"type": "http", "method": "POST", "path": "/predict", "headers": [(b"content-length", b"60000")]}

    async def post(host: str, last: asyncio.Event) -> int:
        """Send a body whose last byte waits for an event, and return the status of the answer."""
        parts = iter([(bytes(59_999), True), (b"\0", False)])
        statuses: list[int] = []

        async def receive() -> Message:
            body, more = next(parts)
            if not more:
                await last.wait()
            return {"type": "http.request", "body": body, "more_body": more}

        async def send(message: Message) -> None:
            statuses.extend([message["status"]] if "status" in message else [])

        await bounded(head | {"client": (host, 1)}, receive, send)
        return statuses[0]

    async def scenario() -> None:
        later, now = asyncio.Event(), asyncio.Event()
        now.set()
        held = [asyncio.create_task(post(f"2001:db8::{number}", later)) for number in range(20)]
        await asyncio.sleep(0.1)
        assert [task.done() for task in held].count(False) == 12  # one network may hold three quarters of the bytes
        assert await post("127.0.0.3", now) == 200
        later.set()
        assert sorted(await asyncio.gather(*held)) == [200] * 12 + [503] * 8
        assert not bounded.pending.held

    asyncio.run(scenario())


@pytest.fixture
def overloaded(app: FastAPI, address: Address) -> Batcher:
    """The batcher of the live model, with a queue that appears full."""
    batcher: Batcher = app.state.services.pool.live()["resnet"].batcher
    batcher.queued = batcher.max_queue
    return batcher


@pytest.mark.usefixtures("address")
def test_requests_that_come_at_once_count_before_they_are_queued(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    services: Services = app.state.services
    limit = services.pool.live()["resnet"].batcher.max_queue

    async def scenario() -> None:
        assert not any(services.shedder.should_shed(b"/predict?top_k=1", "127.0.0.1") for _ in range(limit))
        assert services.shedder.should_shed(b"/predict", "127.0.0.1")
        assert services.shedder.should_shed(b"/ml/predict", "127.0.0.1")  # behind a path prefix
        assert not services.shedder.should_shed(b"/health", "127.0.0.1")
        await asyncio.sleep(0)
        assert not services.shedder.should_shed(b"/predict", "127.0.0.1")
        monkeypatch.setattr(services.decoders, "is_full_for", lambda client: client == "127.0.0.1")
        assert services.shedder.should_shed(b"/predict", "127.0.0.1")
        assert not services.shedder.should_shed(b"/predict", "127.0.0.2")  # each client has its own share of the queue
        assert not services.shedder.should_shed(b"/predict?version=1", "127.0.0.1")  # has its own queue
        refused = b'cifar100_requests_total{method="POST",route="/predict",status="503"} 3.0'
        content, _ = services.metrics.render("", await services.read_state())
        assert refused in content
        assert b'cifar100_refusals_total{reason="queue_full"} 2.0' in content
        assert b'cifar100_refusals_total{reason="decoders_full"} 1.0' in content

    asyncio.run(scenario())


def status_line(connection: socket.socket) -> bytes:
    """Read one answer to its end and return its status line."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65536)
    if b" 503 " in head:
        assert b"retry-after: 1" in head
        assert json.loads(body)["detail"] == "too many images are waiting; try again later"
    return head.partition(b"\r\n")[0]


def test_an_early_refusal_has_the_form_of_the_open_inference_protocol(address: Address, overloaded: Batcher) -> None:
    with connect(address) as connection:
        connection.sendall(make_upload(3).replace(b"/predict", b"/v2/models/resnet/infer") + b"abc")
        received = b""
        while not received.endswith(b"}"):
            received += connection.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert b"content-type: application/json" in head.lower()
    assert b"retry-after: 1" in head.lower()
    assert json.loads(body)["error"] == "too many images are waiting; try again later"


def test_an_early_refusal_names_its_description_below_the_path_prefix(app: FastAPI) -> None:
    with run_server(app, should_shed=lambda *_: True, root_path="/ml") as listening:
        for request in (make_upload(3, b"Connection: close") + b"abc", b"GET / HTTP/1.1\r\n\r\n"):
            head, _, body = exchange(listening.getsockname(), request).partition(b"\r\n\r\n")
            assert json.loads(body)["type"] == f"/ml/errors#{head.split()[1].decode()}"


def test_predictions_are_refused_before_they_cost_anything_while_the_queue_is_full(
    address: Address, overloaded: Batcher
) -> None:
    with connect(address) as connection:
        for _ in range(2):
            connection.sendall(make_upload(3) + b"abc")
            assert status_line(connection) == b"HTTP/1.1 503 Service Unavailable"
        connection.sendall(make_upload(3).replace(b"/predict", b"/predict?model=other") + b"abc")
        assert status_line(connection) == b"HTTP/1.1 404 Not Found"  # an unknown model has no queue
        connection.sendall(make_upload(3).replace(b"Host", b"Origin: https://friend.example\r\nHost") + b"abc")
        # A page sees only answers with its origin, and only the application adds it.
        assert status_line(connection) == b"HTTP/1.1 415 Unsupported Media Type"
        connection.sendall(make_upload(100_000))
        for _ in range(10):
            time.sleep(0.01)
            connection.sendall(bytes(10_000))
        assert status_line(connection) == b"HTTP/1.1 503 Service Unavailable"
        overloaded.queued = 0
        connection.sendall(make_upload(3) + b"abc")
        assert status_line(connection) == b"HTTP/1.1 415 Unsupported Media Type"  # the queue has room again
    assert alive(address)


def test_connection_of_client_over_its_share_is_not_read_for_a_second_after_a_refusal(app: FastAPI) -> None:
    read: list[bytes] = []

    def should_shed(url: bytes, _: str) -> bool:
        read.append(url)
        return True

    with (
        run_server(app, should_shed, exceeds_share=lambda _: True) as listening,
        connect(listening.getsockname()) as connection,
    ):
        for number in range(2):
            connection.sendall(make_upload(3) + b"abc")
            assert status_line(connection) == b"HTTP/1.1 503 Service Unavailable"
            assert len(read) == number + 1
            paused = time.monotonic()
        connection.sendall(make_upload(3) + b"abc")
        assert status_line(connection) == b"HTTP/1.1 503 Service Unavailable"
        assert time.monotonic() - paused > 0.9


@pytest.mark.parametrize("line", [b"Expect: 100-continue", b"Connection: close", b"A: b"])
def test_a_refused_prediction_does_not_hold_its_connection(address: Address, overloaded: Batcher, line: bytes) -> None:
    with connect(address) as connection:
        body = b"abc" if line.startswith(b"Connection") else b"ab"
        connection.sendall(make_upload(3, line) + body)
        assert read_response(connection).count(b"HTTP/1.1 503 ") == 1


def test_only_predictions_are_refused_early(address: Address, overloaded: Batcher) -> None:
    with connect(address) as connection:
        connection.sendall(make_head("GET /predict"))
        assert status_line(connection) == b"HTTP/1.1 405 Method Not Allowed"
    assert overloaded.queued


def test_what_waits_for_a_client_that_leaves_is_not_computed(app: FastAPI, address: Address) -> None:
    batcher: Batcher = app.state.services.pool.live()["resnet"].batcher
    engine, computed, started, gate = batcher.engine, list[int](), threading.Event(), threading.Event()

    class GatedEngine:
        name = engine.name

        def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
            computed.append(len(images))
            started.set()
            assert gate.wait(10)
            return engine(images)

    batcher.engine = cast(Engine, GatedEngine())
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "PNG")
    request = make_upload(len(file.getvalue())) + file.getvalue()
    with connect(address) as stays:
        stays.sendall(request)
        assert started.wait(10)
        leaving = [connect(address) for _ in range(2)]
        for connection in leaving:
            connection.sendall(request)
        wait_until(lambda: batcher.queued == 2)
        for connection in leaving:
            connection.close()
        left = {
            'cifar100_requests_total{method="POST",route="/predict",status="499"} 2.0',
            'cifar100_images_total{model="resnet",outcome="abandoned"} 2.0',
        }
        url = f"http://{address[0]}:{address[1]}/metrics"
        wait_until(lambda: left <= set(httpx.get(url).text.splitlines()))
        gate.set()
        assert status_line(stays) == b"HTTP/1.1 200 OK"
    wait_until(lambda: batcher.queued == 0)
    assert computed == [1]


def test_only_so_many_requests_are_taken_ahead_of_their_answers(address: Address) -> None:
    request = make_head("GET /health/live")
    with connect(address) as connection:
        connection.sendall(20 * request)
        assert status_line(connection) == b"HTTP/1.1 200 OK"
    with connect(address) as connection:
        connection.sendall(4000 * request)
        assert read_response(connection).count(b"HTTP/1.1 200 OK") < 40
    assert alive(address)


def test_a_client_that_does_not_read_is_cut_off(address: Address) -> None:
    with connect(address) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        try:
            for _ in range(4000):
                connection.sendall(make_head("GET /openapi.json"))
        except (BrokenPipeError, ConnectionResetError):
            return
        except TimeoutError:
            pytest.fail("the server waits for a client that does not read")
        assert alive(address)


@pytest.mark.parametrize("line", [b"Connection: close", b"Connection: keep-alive"])
def test_a_client_that_leaves_the_rest_of_an_answer_unread_is_cut_off(
    address: Address, listening: socket.socket, line: bytes
) -> None:
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # the rest of the answer waits in the server
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(address)
        connection.sendall(make_head("GET /openapi.json", line))
        time.sleep(3)
        start, _, body = read_response(connection).partition(b"\r\n\r\n")
    assert start.startswith(b"HTTP/1.1 200 ")
    assert len(body) < int(start.lower().partition(b"content-length: ")[2].split()[0])


ATTACKS = {
    "silent": b"",
    "slow head": b"GET /health HTTP/1.1\r\nX-Slow: ",
    "slow body": make_upload(1000) + b"a",
    "chunked body": make_upload(1000).replace(b"Content-Length: 1000", b"Transfer-Encoding: chunked") + b"3\r\na",
    "slow reader": make_head("GET /openapi.json") * 30,
    "hoarded": make_head("GET /health/live"),
}


@pytest.fixture
def patient(app: FastAPI) -> Iterator[Address]:
    """The address of a server with at most twelve connections and the default timeouts."""
    with run_server(app, app.state.services.shedder.should_shed, ConnectionTable(12, "")) as listening:
        yield cast(Address, listening.getsockname())


def attack(address: Address, closed: ExitStack, source: str, sends: bytes) -> socket.socket:
    connection = closed.enter_context(socket.socket())
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(10)
    connection.bind((source, 0))
    connection.connect(address)
    connection.sendall(sends)
    return connection


@pytest.mark.parametrize("sends", ATTACKS.values(), ids=ATTACKS)
def test_connections_of_one_address_shut_no_other_address_out(patient: Address, sends: bytes) -> None:
    with ExitStack() as closed:
        for _ in range(20):
            attack(patient, closed, "127.0.0.2", sends)
            time.sleep(0.01)
        assert all(alive(patient, f"127.0.0.{number}") for number in range(3, 23))
        held = [connect(patient, f"127.0.0.{number}") for number in range(3, 6)]
        assert all(alive(patient, f"127.0.0.{number}") for number in range(3, 23))
        for connection in held:
            connection.sendall(HEALTH)
            assert read_response(connection).startswith(b"HTTP/1.1 200 ")
            connection.close()


def test_connections_of_several_addresses_shut_no_other_address_out(patient: Address) -> None:
    with ExitStack() as closed:
        for number in range(30):
            attack(patient, closed, f"127.0.1.{number % 4 + 1}", ATTACKS["slow body"])
            time.sleep(0.01)
        assert all(alive(patient, f"127.0.0.{number}") for number in range(3, 23))


def in_loop(scenario: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Turn a coroutine function into a test that runs in an event loop."""

    @wraps(scenario)
    def test(*args: Any, **kwargs: Any) -> None:
        asyncio.run(scenario(*args, **kwargs))

    return test


class Held:
    """A stand-in for a connection in a connection table."""

    def __init__(self, progress: float = 0.0, is_busy: bool = False):
        self.progress = progress
        self.is_busy = is_busy
        self.is_evicted = False

    def evict(self) -> None:
        self.is_evicted = True


def filled(table: ConnectionTable, **counts: int) -> dict[str, list[Held]]:
    """Fill a table with `counts` connections per network, each with more progress than the one before."""
    made = {network: [Held(float(number)) for number in range(count)] for network, count in counts.items()}
    assert all(table.admit(connection, network) for network, each in made.items() for connection in each)
    return made


def evicted(*connections: Held) -> list[bool]:
    return [connection.is_evicted for connection in connections]


@in_loop
async def test_network_that_holds_most_loses_connection_with_least_progress() -> None:
    table = ConnectionTable(10, "")
    held = filled(table, a=4, b=3, c=2, d=1)
    held["a"][0].progress = 9.0
    assert table.admit(Held(), "e")
    assert evicted(*held["a"]) == [False, True, False, False]
    assert not any(evicted(*held["b"], *held["c"], *held["d"]))
    assert len(table) == 10


@in_loop
async def test_connection_with_request_that_is_worked_on_is_not_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_SCAN_PAUSE_S", 0.0)
    table = ConnectionTable(10, "")
    held = filled(table, a=4, b=3, c=2, d=1)
    for connection in held["a"]:
        connection.is_busy = True
    assert table.admit(Held(), "e")
    assert evicted(*held["a"], *held["b"]) == [False] * 4 + [True, False, False]
    for connection in [*held["b"], *held["c"], *held["d"]]:
        connection.is_busy = True
    assert table.admit(Held(is_busy=True), "f") is True  # replaces the connection of `e`
    assert table.admit(Held(), "g") is False


@in_loop
async def test_network_takes_no_place_of_one_that_holds_fewer() -> None:
    table = ConnectionTable(10, "")
    held = filled(table, a=4, b=3, c=2, d=1)
    for connection in held["a"]:
        connection.is_busy = True
    assert not table.admit(Held(), "a")
    assert not any(evicted(*held["b"], *held["c"], *held["d"]))


@in_loop
async def test_limit_of_a_network_applies_only_above_three_quarters() -> None:
    table = ConnectionTable(100, "")
    held = filled(table, a=75)
    held["a"].append(Held())
    assert table.admit(held["a"][-1], "a")
    assert evicted(held["a"][0]) == [True]
    assert len(table) == 75
    for connection in held["a"]:
        connection.progress = asyncio.get_running_loop().time()
    assert not table.admit(Held(), "a")  # all connections of the network are making progress
    filled(table, b=25)
    assert len(table) == 100


@in_loop
async def test_addresses_of_one_ipv6_network_are_one_client() -> None:
    table = ConnectionTable(100, "")
    held = [Held(float(number)) for number in range(75)]
    assert all(table.admit(each, f"2001:db8::{number:x}") for number, each in enumerate(held))
    assert table.admit(Held(), "2001:db8::ffff")
    assert evicted(held[0]) == [True]
    assert table.admit(Held(), "2001:db8:0:1::1")
    assert len(table) == 76


@in_loop
async def test_connections_of_trusted_proxy_count_for_its_clients() -> None:
    table = ConnectionTable(100, "10.0.0.0/8")
    proxied = filled(table, **{"10.0.0.1": 100})["10.0.0.1"]
    assert len(table) == 100
    for connection in proxied[:50]:
        assert table.charge(connection, "1.1.1.1")
    assert not any(evicted(*proxied))
    assert table.charge(proxied[99], "2.2.2.2")  # this client has no other connection
    assert evicted(*proxied).count(True) == 0
    assert table.charge(proxied[60], "6.6.6.6, 1.1.1.1")
    assert evicted(proxied[0]) == [True]  # closes the client's connection with the least progress
    for connection in [*proxied[1:50], proxied[60]]:
        connection.is_busy = True
    assert not table.charge(proxied[61], "1.1.1.1")
    table.discharge(proxied[1])
    table.remove(proxied[2])
    assert len(table) == 98


@in_loop
async def test_scan_is_rare_while_nothing_can_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    table = ConnectionTable(100, "")
    for connection in filled(table, **{f"network{number}": 1 for number in range(100)}).values():
        connection[0].is_busy = True
    scans = 0
    scan = table._scan

    def counted() -> list[tuple[int, float, connections.Connection]]:
        nonlocal scans
        scans += 1
        return scan()

    monkeypatch.setattr(table, "_scan", counted)
    monkeypatch.setattr(connections, "_SCAN_PAUSE_S", 60.0)
    assert not any(table.admit(Held(), "b") for _ in range(1000))
    assert scans == 1


def test_bytes_of_bodies_are_shared_among_networks() -> None:
    shares = FairShares(1000)

    def take(network: str, amount: int) -> bool:
        allowed = shares.allows(network, amount, shares.total + amount)
        if allowed:
            shares.add(network, amount)
        return allowed

    assert take("a", 750)
    assert not take("a", 1)
    assert take("b", 250)
    assert not take("c", 1)
    shares.remove("a", 750)
    assert shares.held == {"b": 250}
    assert take("c", 333)


def test_half_sent_body_at_the_end_of_a_server_is_503_without_traceback(
    app: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    with ExitStack() as closed:
        with run_server(app, stop_s=0) as listening:
            held = [closed.enter_context(connect(listening.getsockname())) for _ in range(2)]
            held[0].sendall(make_upload(1000) + b"abc")
            form = b"Content-Type: multipart/form-data; boundary=x"
            held[1].sendall(make_upload(1000).replace(b"Content-Type: image/png", form) + b"--x\r\n")
            time.sleep(0.2)
        assert all(read_response(connection).startswith(b"HTTP/1.1 503 ") for connection in held)
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("path", ["/predict/", "/static", "/models/"])
def test_host_of_client_does_not_reach_an_answer(address: Address, path: str) -> None:
    received = exchange(address, make_head(f"GET {path}", b"Connection: close", host="evil.example"))
    assert received.startswith(b"HTTP/1.1 404 ")
    assert b"evil" not in received
