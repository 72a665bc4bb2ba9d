"""Run a server with the protocol class of this service in a thread, and send it raw requests."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from app.server.connections import ConnectionTable
from app.server.protocol import BoundedHttp

Address = tuple[str, int]


@contextmanager
def run_server(
    app: ASGIApp,
    should_shed: Callable[[bytes, str], bool] = lambda *_: False,
    table: ConnectionTable | None = None,
    keep_alive_s: int = 60,
    trusted_proxies: str = "",
    stop_s: int = 20,
    exceeds_share: Callable[[str], bool] = lambda _: False,
    root_path: str = "",
) -> Iterator[socket.socket]:
    """Start a server in a thread and yield its listening socket once the server accepts connections."""
    http = partial(
        BoundedHttp,
        should_shed=should_shed,
        table=table or ConnectionTable(900, trusted_proxies),
        exceeds_share=exceeds_share,
        root_path=root_path,
    )
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        http=http,  # type: ignore[arg-type]
        ws="none",
        log_config=None,
        timeout_keep_alive=keep_alive_s,
        timeout_graceful_shutdown=stop_s,
        proxy_headers=bool(trusted_proxies),
        forwarded_allow_ips=trusted_proxies,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0]
    finally:
        server.should_exit = True
        thread.join()


def connect(address: Address, source: str = "127.0.0.1") -> socket.socket:
    """Open a TCP connection from the loopback address `source`."""
    return socket.create_connection(address, timeout=10, source_address=(source, 0))


def read_response(connection: socket.socket) -> bytes:
    """Return all bytes that the server sends until it closes or resets the connection."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def exchange(address: Address, request: bytes, source: str = "127.0.0.1") -> bytes:
    """Send bytes over a new connection and return all bytes that the server sends until it closes the connection."""
    with connect(address, source) as connection:
        connection.sendall(request)
        return read_response(connection)


def make_head(route: str, *lines: bytes, host: str = "x") -> bytes:
    """Return a complete head of HTTP/1.1.

    Args:
        route: Method and path, such as "GET /health".
        lines: Further header lines without their line ends; empty lines are left out.
        host: Value of the header `Host`.
    """
    first = [f"{route} HTTP/1.1".encode(), f"Host: {host}".encode()]
    return b"\r\n".join([*first, *filter(None, lines), b"", b""])


def make_upload(length: int, *lines: bytes, host: str = "x") -> bytes:
    """Return the head of a prediction with a body of `length` bytes. The other arguments are those of `head`."""
    return make_head("POST /predict", b"Content-Type: image/png", b"Content-Length: %d" % length, *lines, host=host)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
