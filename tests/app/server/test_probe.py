"""Test the health check of the image: the service is ready only if /health/ready is 200."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import nginx
import pytest

from app.server import probe


@contextmanager
def answering(status: int) -> Iterator[int]:
    """Answer every request for /health/ready with this status. Yield the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health/ready" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("status", "ready"), [(200, True), (503, False)])
def test_service_is_ready_if_it_says_so(status: int, ready: bool) -> None:
    with answering(status) as port:
        assert probe.is_ready(port) is ready


def test_service_that_does_not_listen_is_not_ready(tmp_path: Path) -> None:
    assert not probe.is_ready(nginx.find_free_port())
    assert not probe.is_ready(0, str(tmp_path / "service.sock"))
