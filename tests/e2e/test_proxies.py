"""Test real clients and proxies: nginx, the HTTP client of the JDK, and curl.

They offer a protocol upgrade, publish the service under a path prefix, and connect over a unix socket.
"""

import http.client
import json
import re
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from contextlib import closing, nullcontext
from pathlib import Path

import httpx
import nginx
import pytest
from server import Server
from service import TINY, run_service
from sockets import make_head, make_upload, read_response

from app.server import probe
from training.store import LocalStore

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

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


def two_versions(models: Path) -> LocalStore:
    """Return a store with two versions, of which the second is live."""
    store = LocalStore(models)
    with store.draft("resnet") as draft:
        (draft / "model.pt").write_bytes((models / "resnet" / "1" / "model.pt").read_bytes())
        store.publish(draft, store.card("resnet", 1))
    store.promote("resnet", 2)
    return store


@pytest.mark.skipif(not nginx.is_installed(), reason="needs nginx")
@pytest.mark.parametrize("expect", [b"", b"Expect: 100-continue"])
def test_request_hidden_in_body_behind_nginx_is_not_carried_out(tmp_path: Path, models: Path, expect: bytes) -> None:
    store = two_versions(models)
    host = "127.0.0.1"  # the hidden request would count as local
    json_lines = (b"Content-Type: application/json", b"Content-Length: 13")
    hidden = make_head("PUT /models/resnet/live", *json_lines, host=host) + b'{"version":1}'
    empty_lines = b"\r\n" * 22_500
    offer = (expect, b"Connection: Upgrade", b"Upgrade: h2c")
    first = make_upload(len(empty_lines + hidden), *offer, host=host)
    last = make_head("GET /health/live", b"Connection: close", host=host)
    with run_service(models, tmp_path / "runs", tmp_path / "log") as (client, _):
        for more in ("", "proxy_request_buffering off;"):
            with nginx.run_nginx(tmp_path, str(client.base_url), more) as proxy:
                for _ in range(3):
                    with socket.create_connection(nginx.parse_address(proxy), timeout=20) as connection:
                        connection.sendall(first + empty_lines)
                        time.sleep(0.02)  # the hidden request must arrive apart from the head
                        connection.sendall(hidden + last)
                        received = read_response(connection)
                    statuses = re.findall(rb"HTTP/1.1 (\d+)", received)
                    assert [status for status in statuses if status != b"100"] == [b"415", b"200"]
        assert client.get("/models/resnet").json()["live"] == 2
    assert store.live("resnet") == 2
    assert "PUT /models" not in (tmp_path / "log").read_text()


KEY = "first-secret-0123456789"
# nginx's directives and the service's settings, for the two ways to name the prefix.
BY_SETTING = ("", {"root_path": "/ml"})
BY_HEADER: tuple[str, dict[str, str]] = ("proxy_set_header X-Forwarded-Prefix /ml;", {})


@pytest.mark.skipif(not nginx.is_installed(), reason="needs nginx")
@pytest.mark.parametrize(
    ("directives", "settings", "is_unix"),
    [(*BY_SETTING, False), (*BY_HEADER, True)],
    ids=["setting-tcp", "header-unix"],
)
def test_service_works_under_a_path_prefix_of_nginx(
    directives: str, settings: dict[str, str], is_unix: bool, tmp_path: Path, models: Path, image: Path
) -> None:
    # The path of a unix socket may have 107 characters.
    folder = tempfile.TemporaryDirectory(prefix="cifar100-") if is_unix else nullcontext()
    with folder as socket_folder:
        chosen = {"api_keys": KEY, "trusted_proxies": "unix" if is_unix else "127.0.0.1", "evaluate_wait_s": "0"}
        if socket_folder:
            chosen["uds"] = f"{socket_folder}/service.sock"
        with Server(models, tmp_path / "runs", tmp_path / "log", **chosen | settings) as server:
            upstream = f"http://{server.address}" if is_unix else str(server.address)
            removing = f"{upstream}:/" if is_unix else f"{upstream}/"
            for url in (removing, upstream):  # nginx replaces /ml/ by /, or passes the whole path on
                with nginx.run_nginx(tmp_path, url, directives, "/ml/") as proxy:
                    check_prefixed(proxy, image)
            if socket_folder:
                assert probe.is_ready(port=0, uds=chosen["uds"])
                check_shipped_site(tmp_path, chosen["uds"], image)
    assert '"client": "127.0.0.1"' in (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()


def check_prefixed(proxy: str, image: Path) -> None:
    """Check that a browser and an API client find everything from the page at /ml/ on."""
    operator = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=proxy, headers=operator, timeout=60) as client:
        page = client.get("/ml", follow_redirects=True)
        assert page.url.path == "/ml/"
        links = re.findall('(?:href|src)="([^"]+)"', page.text)
        assert len(links) == 11
        for link in links:
            assert client.get(page.url.join(link)).status_code == 200, link
        assert client.post(page.url.join("predict"), files={"file": image.read_bytes()}).status_code == 200
        assert client.get("/health").status_code == 404  # nginx forwards the prefix only

        docs = client.get("/ml/docs")
        for link in re.findall('(?:href|src)="([^"]+)"', docs.text):
            assert client.get(docs.url.join(link)).status_code == 200, link
        document = client.get(docs.url.join("openapi.json")).json()  # docs.js names it
        (server,) = document["servers"]
        assert client.get(f"{server['url']}/metrics").status_code == 200

        for begun in (
            client.post("/ml/train", json={"recipe": "resnet", "overrides": TINY}),
            client.post("/ml/evaluate"),
        ):
            assert begun.status_code == 202
            job = begun.headers["location"]
            assert job.startswith("/ml/")
            assert client.delete(job).status_code == 200
            with client.stream("GET", f"{job}/events") as events:
                assert any(line == "event: end" for line in events.iter_lines())
        refused = client.post("/ml/train", headers={"Authorization": ""}, json={})
        assert refused.status_code == 401


def check_shipped_site(folder: Path, socket_path: str, image: Path) -> None:
    """Check that deploy/nginx/cifar100.conf publishes the service with TLS, and names each client by its address."""
    plain, port = nginx.find_free_port(), nginx.find_free_port()
    site = (ROOT / "deploy" / "nginx" / "cifar100.conf").read_text()
    for old, new in {
        "/run/cifar100/service.sock": socket_path,
        "/etc/ssl/cifar100": str(folder),
        "listen 80;": f"listen 127.0.0.1:{plain};",
        "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
    }.items():
        assert site.count(old) >= 1, old
        site = site.replace(old, new)
    certificate = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=example.org"]
    certificate += ["-addext", "subjectAltName=IP:127.0.0.1"]
    certificate += ["-keyout", str(folder / "privkey.pem"), "-out", str(folder / "fullchain.pem")]
    subprocess.run(certificate, check=True, capture_output=True)
    trusted = ssl.create_default_context(cafile=folder / "fullchain.pem")
    with (
        nginx.run_servers(folder, site, port),
        httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trusted, timeout=60) as client,
    ):
        assert httpx.get(f"http://127.0.0.1:{plain}/ml/").headers["location"] == "https://127.0.0.1/ml/"
        assert client.get("/ml", follow_redirects=True).url == f"https://127.0.0.1:{port}/ml/"
        forged = {"X-Forwarded-For": "192.0.2.7", "X-Forwarded-Prefix": "/other", "X-Request-ID": "forged-headers"}
        answer = client.post("/ml/predict", headers=forged, files={"file": image.read_bytes()})
        assert answer.status_code == 200
        refused = http.client.HTTPSConnection("127.0.0.1", port, timeout=60, context=trusted)
        with closing(refused):
            refused.putrequest("POST", "/ml/evaluate")
            refused.putheader("Content-Length", str((256 << 20) + 1))
            refused.endheaders()
            assert refused.getresponse().status == 413
        assert "cifar100_requests_total" in client.get("/ml/metrics").text
    records = [json.loads(line) for line in (folder / "log").read_text().splitlines() if line.startswith("{")]
    (record,) = (each for each in records if each.get("request_id") == "forged-headers" and "client" in each)
    assert record["client"] == "127.0.0.1"


@pytest.mark.skipif(not shutil.which("java"), reason="needs Java")
def test_client_of_jdk_which_offers_h2c_is_served(tmp_path: Path, models: Path, image: Path) -> None:
    source = tmp_path / "Predict.java"
    source.write_text(_JAVA)
    with run_service(models, tmp_path / "runs", tmp_path / "log") as (client, _):
        command = ["java", "-XX:TieredStopAtLevel=1", str(source), str(client.base_url), str(image)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.stdout.split() == ["200"] * 3, ran.stderr


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_curl_that_offers_http2_is_served(tmp_path: Path, models: Path, image: Path) -> None:
    with run_service(models, tmp_path / "runs", tmp_path / "log") as (client, _):
        command = ["curl", "--silent", "--http2", "--form", f"file=@{image}", "--write-out", "\n%{http_code}"]
        for more in ([], ["--header", "Expect: 100-continue"]):
            ran = subprocess.run([*command, *more, f"{client.base_url}/predict"], capture_output=True, text=True)
            assert ran.stdout.splitlines()[-1] == "200", ran.stdout
