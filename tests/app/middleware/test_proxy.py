"""Test the forwarding headers of proxies: which proxies are trusted, and the path prefix of the service."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.middleware import request_log
from app.routes.page import STATIC
from app.settings import Settings

KEY = "first-secret-0123456789"
OPERATOR = {"Authorization": f"Bearer {KEY}"}
PROXY = "192.0.2.1"
BY_SETTING: tuple[dict[str, str], dict[str, str]] = ({"root_path": "/ml"}, {})
BY_HEADER = ({"trusted_proxies": PROXY}, {"X-Forwarded-Prefix": "/ml"})
SOURCES = pytest.mark.parametrize(("settings", "headers"), [BY_SETTING, BY_HEADER], ids=["setting", "header"])
# The two common set-ups: the proxy removes the prefix from the path, or passes the whole path on.
PASSED = pytest.mark.parametrize("passed", ["", "/ml"], ids=["removed", "passed on"])


@contextmanager
def service(models: Path, tmp_path: Path, headers: dict[str, str], peer: str = PROXY, **settings: Any) -> Iterator[Any]:
    """Yield a client at the address `peer` that sends these headers and does not follow redirects."""
    chosen = {"models": models, "runs": tmp_path, "data": "synthetic:4", "api_keys": KEY} | settings
    app = create_app(Settings.model_validate(chosen))
    with TestClient(app, headers=headers, client=(peer, 50000), follow_redirects=False) as client:
        yield client


@SOURCES
@PASSED
def test_every_url_of_an_answer_has_the_prefix(
    settings: dict[str, str], headers: dict[str, str], passed: str, published_store: Path, tmp_path: Path
) -> None:
    with service(published_store, tmp_path, headers, **settings) as client:
        page = client.get(f"{passed}/")
        assert page.status_code == 200
        links = re.findall('(?:href|src)="([^"]+)"', page.text)
        assert len(links) == 11
        for link in links:
            url = httpx.URL("http://proxy/ml/").join(link).path
            assert url.startswith("/ml/")
            assert client.get(passed + url.removeprefix("/ml")).status_code == 200, link
        for script in STATIC.glob("*.js"):
            assert not re.search(r"[\"'`]/[a-z]", script.read_text().replace("// ", "")), script

        for path in ("docs", "errors"):
            for link in re.findall('(?:href|src)="([^"]+)"', client.get(f"{passed}/{path}").text):
                assert client.get(passed + str(httpx.URL("/").join(link))).status_code == 200, link
        assert 'new URL("./openapi.json", location)' in client.get(f"{passed}/static/docs.js").text
        document = client.get(f"{passed}/openapi.json").json()
        assert document["servers"] == [{"url": "/ml"}]
        assert "/predict" in document["paths"]

        queued = client.post(f"{passed}/train", json={"recipe": "resnet"}, headers=OPERATOR)
        assert queued.status_code == 202
        assert queued.headers["location"] == f"/ml/train/{queued.json()['id']}"
        job = passed + queued.headers["location"].removeprefix("/ml")
        assert client.get(job).status_code == 200
        assert client.delete(job, headers=OPERATOR).status_code == 200
        stream = client.get(f"{job}/events")
        assert "event: end" in stream.text


@SOURCES
@PASSED
def test_prefix_changes_neither_limits_nor_metrics_nor_errors(
    settings: dict[str, str], headers: dict[str, str], passed: str, published_store: Path, tmp_path: Path
) -> None:
    with service(published_store, tmp_path, headers, **settings, max_predict_bytes=3 << 20) as client:
        image = {"Content-Type": "image/png"}
        assert client.post(f"{passed}/predict", content=bytes(2 << 20), headers=image).status_code == 415
        assert client.post(f"{passed}/predict", content=bytes(4 << 20), headers=image).status_code == 413
        assert client.post(f"{passed}/train", content=bytes(2 << 20), headers=OPERATOR).status_code == 413
        missing = client.get(f"{passed}/nowhere").json()
        assert (missing["status"], missing["type"]) == (404, "/ml/errors#404")
        assert client.get(f"{passed}/v2/nowhere").json()["type"] == "/ml/errors#404"
        assert client.get(f"{passed}/errors").status_code == 200
        assert client.get(f"{passed}/static/../main.py").status_code == 404
        assert client.post(f"{passed}/train", json={}).status_code == 401
        assert 'route="/predict",status="415"} 1.0' in client.get(f"{passed}/metrics").text


@SOURCES
def test_bare_prefix_is_redirected_to_the_page(
    settings: dict[str, str], headers: dict[str, str], published_store: Path, tmp_path: Path
) -> None:
    with service(published_store, tmp_path, headers, **settings) as client:
        for url, target in (("/ml", "/ml/"), ("/ml?a=%2F", "/ml/?a=%2F")):
            answer = client.get(url)
            assert answer.status_code == 308
            assert answer.headers["location"] == target
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["x-request-id"]
        assert client.get("/mlx").status_code == 404
        assert client.get("/ml/ml").status_code == 404


@pytest.mark.parametrize("settings", [{}, {"trusted_proxies": "192.0.2.2"}, {"trusted_proxies": "unix"}])
def test_prefix_of_others_is_ignored(settings: dict[str, str], published_store: Path, tmp_path: Path) -> None:
    with service(published_store, tmp_path, {"X-Forwarded-Prefix": "/ml"}, **settings) as client:
        assert "servers" not in client.get("/openapi.json").json()
        assert client.get("/ml/health").status_code == 404


def test_invalid_prefix_of_a_trusted_proxy_is_refused(published_store: Path, tmp_path: Path) -> None:
    with service(published_store, tmp_path, {}, trusted_proxies=PROXY) as client:
        for prefix in ("//example.org", "http://example.org", "/a b", "/ml/..", "/ml,/x", "/predict"):
            answer = client.get("/health", headers={"X-Forwarded-Prefix": prefix})
            assert answer.status_code == 400
            assert answer.json()["detail"].startswith("X-Forwarded-Prefix: ")
            assert answer.headers["x-request-id"]


def test_header_replaces_the_setting_and_proxies_in_a_row_add_up(published_store: Path, tmp_path: Path) -> None:
    with service(published_store, tmp_path, {}, root_path="/ml", trusted_proxies=PROXY) as client:
        for headers, root_path in (
            ([], "/ml"),
            ([("X-Forwarded-Prefix", "/a")], "/a"),
            ([("X-Forwarded-Prefix", "/a/"), ("X-Forwarded-Prefix", "/b")], "/a/b"),
            ([("X-Forwarded-Prefix", "/")], ""),
        ):
            servers = client.get("/openapi.json", headers=headers).json().get("servers")
            assert servers == ([{"url": root_path}] if root_path else None)


def test_prefix_that_is_also_the_name_of_a_model_is_removed_once(published_store: Path, tmp_path: Path) -> None:
    with service(published_store, tmp_path, {}, root_path="/models/resnet") as client:
        assert client.get("/models/resnet/models/resnet").json()["name"] == "resnet"
        assert client.get("/models").status_code == 200


def test_probes_behind_a_prefix_are_logged_as_probes(
    published_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with service(published_store, tmp_path, {}, root_path="/ml") as client:
        for path in ("/health/ready", "/ml/health/ready", "/ml/health"):
            client.get(path)
    lines = [each.getMessage() for each in caplog.records if each.name == request_log.__name__]
    assert lines == ["GET /ml/health 200"]


def test_trusted_proxy_names_the_client_and_the_scheme(
    published_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for peer, client_address in ((PROXY, "203.0.113.9"), ("192.0.2.2", "192.0.2.2")):
        caplog.clear()
        headers = {"X-Forwarded-For": "1.2.3.4, 203.0.113.9", "X-Forwarded-Proto": "https"}
        with service(published_store, tmp_path, headers, peer, trusted_proxies=PROXY) as client:
            client.get("/health")
        (line,) = [each for each in caplog.records if each.name == request_log.__name__]
        assert vars(line)["client"] == client_address


@pytest.mark.parametrize("settings", [{}, {"root_path": "/ml"}, {"trusted_proxies": "127.0.0.1"}])
def test_request_with_a_prefix_header_is_never_local(
    settings: dict[str, str], published_store: Path, tmp_path: Path
) -> None:
    own = {"api_keys": (), "operator_rate_limit": ""} | settings
    with service(published_store, tmp_path, {"X-Forwarded-Prefix": "/ml"}, "127.0.0.1", **own) as client:
        answer = client.delete("http://127.0.0.1/train/x")
        assert answer.status_code == 403
        assert "'x-forwarded-prefix'" in answer.json()["detail"]
