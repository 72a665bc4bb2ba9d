"""Test clients and proxies that offer a protocol upgrade: a real nginx, the HTTP client of the JDK, and curl."""

import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import nginx
import pytest
from service import service

from training.store import Store

pytestmark = pytest.mark.slow

_JAVA = """
import java.net.URI;
import java.net.http.*;
import java.nio.file.Path;

class Predict {
    public static void main(String[] arguments) throws Exception {
        var client = HttpClient.newHttpClient();
        for (int turn = 0; turn < 3; turn++) {
            var request = HttpRequest.newBuilder(URI.create(arguments[0] + "/predict"))
                .header("Content-Type", "image/png")
                .POST(HttpRequest.BodyPublishers.ofFile(Path.of(arguments[1]))).build();
            System.out.println(client.send(request, HttpResponse.BodyHandlers.ofString()).statusCode());
        }
    }
}
"""


def two_versions(models: Path) -> Store:
    """Return a store with two versions, of which the second is live."""
    store = Store(models)
    with store.draft("resnet") as draft:
        (draft / "model.pt").write_bytes((models / "resnet" / "1" / "model.pt").read_bytes())
        store.publish(draft, store.card("resnet", 1))
    store.promote("resnet", 2)
    return store


@pytest.mark.skipif(not nginx.is_installed(), reason="needs nginx")
@pytest.mark.parametrize("expect", ["", "Expect: 100-continue\r\n"])
def test_request_hidden_in_body_behind_nginx_is_not_carried_out(tmp_path: Path, models: Path, expect: str) -> None:
    store = two_versions(models)
    hidden = b"PUT /models/resnet/live HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    hidden += b'Content-Length: 13\r\n\r\n{"version":1}'
    empty_lines = b"\r\n" * 22_500
    head = f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\n{expect}"
    head += f"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: {len(empty_lines + hidden)}\r\n\r\n"
    last = b"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    with service(models, tmp_path / "runs", tmp_path / "log") as (client, _):
        for more in ("", "proxy_request_buffering off;"):
            with nginx.proxy(tmp_path, str(client.base_url), more) as proxy:
                for _ in range(3):
                    with socket.create_connection(nginx.address(proxy), timeout=20) as connection:
                        connection.sendall(head.encode() + empty_lines)
                        time.sleep(0.02)  # the hidden request must arrive apart from the head
                        connection.sendall(hidden + last)
                        received = b""
                        while data := connection.recv(65536):
                            received += data
                    statuses = re.findall(rb"HTTP/1.1 (\d+)", received)
                    assert [status for status in statuses if status != b"100"] == [b"415", b"200"]
        assert client.get("/models/resnet").json()["live"] == 2
    assert store.live("resnet") == 2
    assert "PUT /models" not in (tmp_path / "log").read_text()


@pytest.mark.skipif(not shutil.which("java"), reason="needs Java")
def test_client_of_jdk_which_offers_h2c_is_served(tmp_path: Path, models: Path, image: Path) -> None:
    source = tmp_path / "Predict.java"
    source.write_text(_JAVA)
    with service(models, tmp_path / "runs", tmp_path / "log") as (client, _):
        command = ["java", "-XX:TieredStopAtLevel=1", str(source), str(client.base_url), str(image)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.stdout.split() == ["200"] * 3, ran.stderr


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_curl_that_offers_http2_is_served(tmp_path: Path, models: Path, image: Path) -> None:
    with service(models, tmp_path / "runs", tmp_path / "log") as (client, _):
        command = ["curl", "--silent", "--http2", "--form", f"file=@{image}", "--write-out", "\n%{http_code}"]
        for more in ([], ["--header", "Expect: 100-continue"]):
            ran = subprocess.run([*command, *more, f"{client.base_url}/predict"], capture_output=True, text=True)
            assert ran.stdout.splitlines()[-1] == "200", ran.stdout
