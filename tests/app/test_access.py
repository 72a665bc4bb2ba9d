"""Who is let in: API keys, the rule for services without any, rate limits; and what protects the page's visitors."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError

from app import logs
from app.main import create_app
from app.settings import Settings

KEYS = ("first-secret-0123456789", "second-secret-0123456789")
COSTLY = (
    ("POST", "/train"),
    ("DELETE", "/train/x"),
    ("PUT", "/models/resnet/live"),
    ("POST", "/evaluate"),
)


def client(
    models: Path, runs: Path, address: str = "127.0.0.1", host: str = "127.0.0.1", **settings: Any
) -> TestClient:
    """A client at `address` that calls the service by the name `host`."""
    app = create_app(Settings(models=models, runs=runs, data="synthetic:4", **settings))
    return TestClient(app, base_url=f"http://{host}", client=(address, 50000))


def call(service: TestClient, method: str, path: str, **headers: str) -> httpx.Response:
    body: dict[str, Any] | None = None if path == "/evaluate" else {}
    answer: httpx.Response = service.request(method, path, headers=headers, json=body)
    return answer


def test_costly_calls_need_a_key_and_nothing_else_does(models: Path, tmp_path: Path) -> None:
    with client(models, tmp_path, api_keys=",".join(KEYS)) as service:
        for method, path in COSTLY:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEYS[0]}"}):
                refused = call(service, method, path, **headers)
                assert refused.status_code == 401
                assert refused.headers["www-authenticate"] == "Bearer"
                assert refused.headers["content-type"] == "application/problem+json"
            for key in KEYS:
                allowed = call(service, method, path, Authorization=f"Bearer {key}")
                assert allowed.status_code in (200, 404, 422), allowed.text
        for path in ("/", "/docs", "/health", "/models", "/evaluate", "/train", "/metrics"):
            assert service.get(path).status_code == 200
        assert service.post("/predict", files={"file": b"x"}).status_code == 415


def test_predicting_needs_a_key_where_that_is_wanted(models: Path, tmp_path: Path) -> None:
    with client(models, tmp_path, api_keys=KEYS[0], predict_needs_key=True) as service:
        assert service.post("/predict", files={"file": b"x"}).status_code == 401
        headers = {"Authorization": f"Bearer {KEYS[0]}"}
        assert service.post("/predict", files={"file": b"x"}, headers=headers).status_code == 415
    with pytest.raises(ValidationError, match="CIFAR100_API_KEYS"):
        Settings(predict_needs_key=True)
    with pytest.raises(ValidationError, match="at least 16"):
        Settings.model_validate({"api_keys": "short"})


@pytest.mark.parametrize(
    ("place", "headers", "reason"),
    [
        ({}, {}, None),
        ({"host": "localhost"}, {}, None),
        ({"host": "[::1]", "address": "::1"}, {}, None),
        ({}, {"Origin": "http://127.0.0.1"}, None),
        ({"address": "192.0.2.7"}, {}, "another machine"),
        ({}, {"X-Forwarded-For": "192.0.2.7"}, "another machine"),
        ({}, {"Origin": "https://evil.example"}, "a page of 'https://evil.example'"),
        ({}, {"Origin": "null"}, "a page of 'null'"),
        ({}, {"Host": "evil.example"}, "'evil.example'"),
        ({"host": "192.0.2.1"}, {}, "does not listen on a loopback address"),
    ],
)
def test_without_keys_only_this_machine_may_make_costly_calls(
    models: Path, tmp_path: Path, place: dict[str, str], headers: dict[str, str], reason: str | None
) -> None:
    with client(models, tmp_path, **place) as service:
        for method, path in COSTLY:
            answer = call(service, method, path, **headers)
            if reason is None:
                assert answer.status_code in (200, 404, 422), answer.text
            else:
                assert answer.status_code == 403
                assert reason in answer.json()["detail"]
                assert "CIFAR100_API_KEYS" in answer.json()["detail"]


def test_a_service_that_listens_everywhere_needs_keys_even_for_local_calls(models: Path, tmp_path: Path) -> None:
    with TestClient(
        create_app(Settings(models=models, runs=tmp_path, host="0.0.0.0")),  # noqa: S104
        base_url="http://127.0.0.1",
        client=("127.0.0.1", 50000),
    ) as service:
        assert call(service, "POST", "/train").status_code == 403


def test_too_many_costly_calls_are_429_per_client(models: Path, tmp_path: Path) -> None:
    with client(models, tmp_path, operator_rate_limit="3/minute", predict_rate_limit="2/minute") as service:
        statuses = [call(service, "DELETE", "/train/x").status_code for _ in range(4)]
        assert statuses == [404, 404, 404, 429]
        refused = call(service, "POST", "/train")  # all costly calls count together
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert [service.post("/predict", files={"file": b"x"}).status_code for _ in range(3)] == [415, 415, 429]
        assert service.get("/health").status_code == 200
        other = TestClient(service.app, base_url="http://127.0.0.1", client=("127.0.0.2", 50000))
        assert call(other, "DELETE", "/train/x").status_code == 404
        for host in ("127.0.0.1", "::ffff:127.0.0.1"):  # the same one
            again = TestClient(service.app, base_url="http://127.0.0.1", client=(host, 50000))
            assert call(again, "DELETE", "/train/x").status_code == 429
        others = TestClient(service.app, base_url="http://127.0.0.1", client=("::ffff:127.0.0.3", 50000))
        assert call(others, "DELETE", "/train/x").status_code != 429


def test_answers_carry_security_headers_and_pages_load_only_what_they_need(models: Path, tmp_path: Path) -> None:
    with client(models, tmp_path) as service:
        for path in ("/", "/docs", "/health", "/nowhere", "/web/page.js"):
            headers = service.get(path).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["x-frame-options"] == "DENY"
            policy = headers["content-security-policy"]
            assert policy.startswith("default-src 'none'")
            assert "frame-ancestors 'none'" in policy
            assert "access-control-allow-origin" not in headers
            scripts = re.search("script-src ([^;]*)", policy)
            assert (scripts is not None) == (path in ("/", "/docs"))
            assert not scripts or "unsafe" not in scripts[1]


def test_other_sites_may_call_only_where_that_is_set(models: Path, tmp_path: Path) -> None:
    with client(models, tmp_path, cors_origins="https://friend.example") as service:
        answer = service.get("/health", headers={"Origin": "https://friend.example"})
        assert answer.headers["access-control-allow-origin"] == "https://friend.example"
        answer = service.get("/health", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in answer.headers


def test_every_line_of_the_log_names_its_request_and_no_secret(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = logging.getLogger().handlers[:]
    try:
        logs.configure("json", "INFO")
        with client(models, tmp_path, api_keys=KEYS[0]) as service:
            headers = {"Authorization": f"Bearer {KEYS[0]}", "X-Request-ID": "from-a-proxy.1"}
            named = service.delete("/train/x?token=untold", headers=headers)
            own = service.get("/nowhere", headers={"X-Request-ID": "line\tbreak"})
            service.get("/health/live")
    finally:
        logging.getLogger().handlers[:] = before
    assert named.headers["x-request-id"] == "from-a-proxy.1"
    assert re.fullmatch("[0-9a-f]{32}", own.headers["x-request-id"])
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    lines = [line for line in lines if line["logger"] != "httpx"]  # the test's own
    answered = [line for line in lines if line["logger"] == "app.logs"]
    assert [line["message"] for line in answered] == ["DELETE /train/x 404", "GET /nowhere 404"]
    assert [line["request_id"] for line in answered] == ["from-a-proxy.1", own.headers["x-request-id"]]
    assert all(line["milliseconds"] > 0 and line["client"] == "127.0.0.1" for line in answered)
    assert "untold" not in str(lines)
    assert KEYS[0] not in str(lines)


def test_an_unexpected_error_is_a_problem_and_its_traceback_is_logged(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with client(models, tmp_path) as service:
        monkeypatch.setattr("training.store.Store.names", lambda _: 1 / 0)
        answer = service.get("/models")
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-request-id"]
    assert "ZeroDivisionError" in caplog.text
    assert "ZeroDivision" not in answer.text
