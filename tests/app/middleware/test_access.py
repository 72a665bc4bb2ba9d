"""Test access control.

The tests cover API keys, the local-only rule of a service without keys, rate limits, and the headers and origin checks
that protect visitors of the web page.
"""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import ValidationError
from starlette.types import Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from app import logs
from app.main import create_app
from app.settings import Settings

KEYS = ("first-secret-0123456789", "second-secret-0123456789")
# Calls that need an operator, with empty bodies, and the status that an operator gets.
COSTLY = {
    ("POST", "/train"): 422,
    ("DELETE", "/train/x"): 404,
    ("GET", "/train/x/files/output.log"): 404,
    ("PUT", "/models/resnet/live"): 422,
    ("DELETE", "/models/resnet/9"): 404,
    ("GET", "/models/resnet/9/files/model.pt"): 404,
    ("GET", "/models/resnet/9/zip"): 404,
    ("POST", "/models/resnet"): 403,
    ("GET", "/feedback"): 200,
    ("DELETE", "/feedback/x"): 404,
    ("POST", "/evaluate"): 200,
    ("DELETE", "/evaluate/x"): 404,
}


def client(
    models: Path, runs: Path, address: str = "127.0.0.1", host: str = "127.0.0.1", **settings: Any
) -> TestClient:
    """Return a client at the IP address `address` that calls the service by the host name `host`."""
    app = create_app(Settings(models=models, runs=runs, data="synthetic:4", **settings))
    return TestClient(app, base_url=f"http://{host}", client=(address, 50000))


def call(service: TestClient, method: str, path: str, **headers: str) -> httpx.Response:
    body: dict[str, Any] | None = None if path == "/evaluate" else {}
    answer: httpx.Response = service.request(method, path, headers=headers, json=body)
    return answer


def test_costly_calls_need_a_key_and_nothing_else_does(models: Path, tmp_path: Path) -> None:
    with client(models, tmp_path, api_keys=",".join(KEYS)) as service:
        for (method, path), status in COSTLY.items():
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEYS[0]}"}):
                refused = call(service, method, path, **headers)
                assert refused.status_code == 401
                assert refused.headers["www-authenticate"] == "Bearer"
                assert refused.headers["content-type"] == "application/problem+json"
            for key in KEYS:
                allowed = call(service, method, path, Authorization=f"Bearer {key}")
                assert allowed.status_code == status, allowed.text
        for path in ("/", "/docs", "/health", "/models", "/evaluate", "/train", "/metrics"):
            assert service.get(path).status_code == 200
        assert service.post("/predict", files={"file": b"x"}).status_code == 415


def test_predicting_needs_a_key_where_that_is_wanted(models: Path, tmp_path: Path) -> None:
    with client(models, tmp_path, api_keys=KEYS[0], predict_needs_key=True) as service:
        assert service.post("/predict", files={"file": b"x"}).status_code == 401
        headers = {"Authorization": f"Bearer {KEYS[0]}"}
        assert service.post("/predict", files={"file": b"x"}, headers=headers).status_code == 415
    for setting in ("predict_needs_key", "allow_uploads"):
        with pytest.raises(ValidationError, match=f"CIFAR100_{setting.upper()} needs CIFAR100_API_KEYS"):
            Settings.model_validate({setting: True})
    with pytest.raises(ValidationError, match="at least 16"):
        Settings.model_validate({"api_keys": "short"})


def test_every_printable_character_may_be_in_a_key(models: Path, tmp_path: Path) -> None:
    key = "".join(map(chr, range(0x20, 0x7F))).strip().replace(",", "")
    with client(models, tmp_path, api_keys=key) as service:
        assert call(service, "DELETE", "/train/x", Authorization=f"Bearer {key}").status_code == 404


@pytest.mark.parametrize(
    ("place", "headers", "reason"),
    [
        ({}, {}, None),
        ({"host": "localhost"}, {}, None),
        ({"host": "[::1]", "address": "::1"}, {}, None),
        ({"address": "192.0.2.7"}, {}, "another machine"),
        ({"address": "::ffff:192.0.2.7"}, {}, "another machine"),
        ({"address": "::1%lo"}, {}, "another machine"),
        ({"address": "127.1"}, {}, "another machine"),
        ({"address": "0.0.0.0"}, {}, "another machine"),  # noqa: S104
        ({"address": "localhost"}, {}, "another machine"),
        ({"host": "192.0.2.1"}, {}, "does not listen on a loopback address"),
    ],
)
def test_without_keys_only_this_machine_may_make_costly_calls(
    models: Path, tmp_path: Path, place: dict[str, str], headers: dict[str, str], reason: str | None
) -> None:
    with client(models, tmp_path, **place) as service:
        for (method, path), status in COSTLY.items():
            answer = call(service, method, path, **headers)
            if reason is None:
                assert answer.status_code == status, answer.text
            else:
                assert answer.status_code == 403
                assert reason in answer.json()["detail"]
                assert "CIFAR100_API_KEYS" in answer.json()["detail"]


@pytest.fixture(scope="module")
def local_app(published_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    """A running service without API keys, to be called on 127.0.0.1."""
    app = create_app(Settings(models=published_store, runs=tmp_path_factory.mktemp("runs"), operator_rate_limit=None))
    with TestClient(app):
        yield app


def status_of_raw(app: FastAPI, *headers: tuple[bytes, bytes], **scope: Any) -> int:
    """Return the status of a local DELETE with exactly these headers; `scope` overrides further ASGI scope entries."""
    local = {"client": ("127.0.0.1", 50000), "server": ("127.0.0.1", 8000)}

    async def changed(own: Scope, receive: Receive, send: Send) -> None:
        await app({**own, **local, "headers": list(headers), **scope}, receive, send)

    answer: httpx.Response = TestClient(changed).delete("/train/x")
    return answer.status_code


ALLOWED, REFUSED = 404, 403  # a call that passes gets 404: the job does not exist
HOST = (b"host", b"127.0.0.1:8000")


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.0.1:1",
        "127.0.0.1:65535",
        "127.9.9.9:8000",
        "localhost",
        "LocalHost:8000",
        "[::1]",
        "[::1]:8000",
        "[0:0:0:0:0:0:0:1]:8000",
        "[::ffff:127.0.0.1]:8000",
    ],
)
def test_a_host_that_always_means_this_machine_is_local(host: str, local_app: FastAPI) -> None:
    assert status_of_raw(local_app, (b"host", host.encode())) == ALLOWED
    assert status_of_raw(local_app, (b"host", host.encode()), (b"origin", f"http://{host}".encode())) == ALLOWED


@pytest.mark.parametrize(
    "host",
    [
        "",
        " ",
        "evil.example",
        "evil.example:",
        "evil.example:99999",
        "[evil]",
        "127.0.0.1@evil.example",
        "evil com",
        "\xe9vil",
        "localhost.",
        "localhost.evil.example",
        "evil.localhost",
        "localhost:",
        "localhost:0",
        "localhost:08",
        "localhost:65536",
        "localhost:8000:8000",
        "localhost:+80",
        "localhost:\xb2",
        "localhost ",
        " localhost",
        "127.0.0.1/",
        "127.0.0.1#",
        "127.0.0.1?",
        "http://127.0.0.1",
        "user@127.0.0.1",
        "127.0.0.1,127.0.0.1",
        "127.1",
        "0177.0.0.1",
        "127.0.0.01",
        "2130706433",
        "0x7f000001",
        "0.0.0.0",  # noqa: S104
        "::1",
        "[::1",
        "::1]",
        "[::1]8000",
        "[127.0.0.1]",
        "[::1%25lo]",
        "[::1%lo]",
        "[::]",
        "[::127.0.0.1]",
        "[::ffff:192.0.2.1]",
        "[v1.x]",
        "127.0.0.1\t",
    ],
)
def test_every_other_host_is_not_local(host: str, local_app: FastAPI) -> None:
    assert status_of_raw(local_app, (b"host", host.encode("latin-1"))) == REFUSED


def test_no_host_and_two_hosts_are_not_local(local_app: FastAPI) -> None:
    assert status_of_raw(local_app) == REFUSED
    assert status_of_raw(local_app, HOST, HOST) == REFUSED
    assert status_of_raw(local_app, HOST, (b"host", b"evil.example")) == REFUSED
    assert status_of_raw(local_app, (b"host", b"evil.example"), HOST) == REFUSED


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8000", ALLOWED),
        ("http://localhost:8000", REFUSED),
        ("http://127.0.0.1", REFUSED),
        ("http://127.0.0.1:8001", REFUSED),
        ("https://127.0.0.1:8000", REFUSED),
        ("HTTP://127.0.0.1:8000", REFUSED),
        ("http://127.0.0.1:8000/", REFUSED),
        ("http://127.0.0.1:8000 ", REFUSED),
        ("http://user@127.0.0.1:8000", REFUSED),
        ("127.0.0.1:8000", REFUSED),
        ("null", REFUSED),
        ("", REFUSED),
        ("https://evil.example", REFUSED),
    ],
)
def test_only_the_service_s_own_page_is_local(origin: str, status: int, local_app: FastAPI) -> None:
    assert status_of_raw(local_app, HOST, (b"origin", origin.encode())) == status


def test_origins_are_compared_with_default_ports_and_all_of_several_must_be_right(local_app: FastAPI) -> None:
    right, wrong = (b"origin", b"http://127.0.0.1:8000"), (b"origin", b"https://evil.example")
    assert status_of_raw(local_app, HOST, right, wrong) == status_of_raw(local_app, HOST, wrong, right) == REFUSED
    assert status_of_raw(local_app, (b"host", b"localhost"), (b"origin", b"http://localhost:80")) == ALLOWED
    assert status_of_raw(local_app, (b"host", b"LOCALHOST:8000"), (b"origin", b"http://localhost:8000")) == ALLOWED


@pytest.mark.parametrize(
    ("site", "status"),
    [
        ("same-origin", ALLOWED),
        ("none", ALLOWED),
        ("same-site", REFUSED),
        ("cross-site", REFUSED),
        ("", REFUSED),
        ("None", REFUSED),
        ("same-origin, none", REFUSED),
    ],
)
def test_a_browser_must_say_that_no_other_site_has_asked(site: str, status: int, local_app: FastAPI) -> None:
    fetched = (b"sec-fetch-site", site.encode())
    assert status_of_raw(local_app, HOST, fetched) == status
    assert status_of_raw(local_app, HOST, fetched, (b"origin", b"http://127.0.0.1:8000")) == status
    assert status_of_raw(local_app, HOST, (b"sec-fetch-site", b"none"), fetched) == status


@pytest.mark.parametrize(
    "header",
    [
        "Forwarded",
        "Via",
        "X-Forwarded",
        "X-Forwarded-For",
        "X-Forwarded-Host",
        "X-Forwarded-Proto",
        "X-Forwarded-Port",
        "X-Forwarded-Prefix",
        "X-Forwarded-Client-Cert",
        "X_Forwarded_For",
        "Forwarded-For",
        "Max-Forwards",
        "X-Real-IP",
        "X-Client-IP",
        "X-Cluster-Client-IP",
        "True-Client-IP",
        "Fastly-Client-IP",
        "Fastly-FF",
        "CF-Connecting-IP",
        "CF-Connecting-IPv6",
        "CF-Ray",
        "CDN-Loop",
        "X-Original-URL",
        "X-Original-Host",
        "X-Original-Forwarded-For",
        "X-Envoy-External-Address",
        "X-Envoy-Internal",
        "X-Remote-Addr",
        "X-Azure-ClientIP",
        "X-Azure-Ref",
        "X-ARR-LOG-ID",
        "Proxy-Connection",
        "X-ProxyUser-Ip",
        "X-Amz-Cf-Id",
        "Tailscale-User-Login",
        "X-Varnish",
        "Akamai-Origin-Hop",
        "X-Rewrite-URL",
    ],
)
def test_any_sign_of_a_proxy_ends_local(header: str, local_app: FastAPI) -> None:
    for value in (b"127.0.0.1", b""):
        assert status_of_raw(local_app, HOST, (header.lower().encode(), value)) == REFUSED


@pytest.mark.parametrize(
    "headers",
    [
        # Chromium sends these from the service's own page.
        "accept accept-encoding accept-language cache-control connection content-length content-type cookie dnt "
        "pragma referer sec-ch-ua sec-ch-ua-mobile sec-ch-ua-platform sec-fetch-dest sec-fetch-mode sec-gpc user-agent "
        "upgrade-insecure-requests x-requested-with",
        # HTTP clients and tracing libraries send these.
        "authorization expect idempotency-key if-match last-event-id priority range te traceparent tracestate "
        "transfer-encoding x-api-key x-b3-traceid x-correlation-id x-request-id",
    ],
)
def test_headers_of_ordinary_clients_are_no_sign_of_a_proxy(headers: str, local_app: FastAPI) -> None:
    assert status_of_raw(local_app, HOST, *((name.encode(), b"1") for name in headers.split())) == ALLOWED


def test_a_unix_socket_is_never_local(local_app: FastAPI) -> None:
    assert status_of_raw(local_app, HOST) == ALLOWED
    assert status_of_raw(local_app, HOST, client=None, server=("/run/service", None)) == REFUSED
    assert status_of_raw(local_app, HOST, client=None) == REFUSED
    assert status_of_raw(local_app, HOST, server=("/run/service", None)) == REFUSED
    assert status_of_raw(local_app, HOST, server=("localhost", None)) == REFUSED
    assert status_of_raw(local_app, HOST, server=None) == REFUSED


@pytest.mark.parametrize("trusted", ["127.0.0.1", "127.0.0.0/8", "*"])
def test_a_trusted_proxy_makes_nobody_local(trusted: str, local_app: FastAPI) -> None:
    proxied = cast(FastAPI, ProxyHeadersMiddleware(cast(Any, local_app), trusted))
    for client_of_proxy in (b"127.0.0.1", b"::1", b"localhost", b"127.0.0.1:1, 127.0.0.1", b"192.0.2.7", b""):
        assert status_of_raw(proxied, HOST, (b"x-forwarded-for", client_of_proxy)) == REFUSED
    assert status_of_raw(proxied, HOST, (b"x-forwarded-proto", b"https")) == REFUSED


def test_a_service_that_listens_everywhere_needs_keys_even_for_local_calls(models: Path, tmp_path: Path) -> None:
    with TestClient(
        create_app(Settings(models=models, runs=tmp_path, host="0.0.0.0")),  # noqa: S104
        base_url="http://127.0.0.1",
        client=("127.0.0.1", 50000),
    ) as service:
        assert call(service, "POST", "/train").status_code == 403


def statuses(service: TestClient, calls: int, key: str | None = None, **headers: str) -> list[int]:
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    return [call(service, "DELETE", "/train/x", **headers).status_code for _ in range(calls)]


def from_address(service: TestClient, address: str) -> TestClient:
    return TestClient(service.app, base_url="http://127.0.0.1", client=(address, 50000))


def test_refused_calls_of_other_sites_do_not_use_up_the_operator_s_rate(models: Path, tmp_path: Path) -> None:
    with client(models, tmp_path, operator_rate_limit="3/minute") as service:
        assert statuses(service, 5, Origin="https://evil.example") == [403] * 5
        assert statuses(service, 5, **{"Sec-Fetch-Site": "cross-site"}) == [403] * 5
        assert statuses(service, 5, Host="evil.example") == [403] * 5
        assert statuses(from_address(service, "127.0.0.1"), 4) == [404, 404, 404, 429]
        assert statuses(service, 1, Origin="https://evil.example") == [403]  # the origin check precedes the rate limit


def test_calls_without_a_key_or_with_wrong_ones_lock_no_holder_out(models: Path, tmp_path: Path) -> None:
    with client(models, tmp_path, api_keys=",".join(KEYS), operator_rate_limit="3/minute") as service:
        assert statuses(service, 5) == [401] * 5  # a call without a key does not count as a guess
        assert statuses(service, 1, KEYS[0]) == [404]
        assert statuses(service, 5, "a wrong key of 16") == [401, 401, 401, 429, 429]
        assert statuses(service, 3, KEYS[0]) == [404, 404, 429]  # this key has its own rate limit
        assert statuses(service, 1, KEYS[1]) == [429]  # this address has not used the key before: it could be a guess
        elsewhere = from_address(service, "127.0.0.2")
        assert statuses(elsewhere, 4, KEYS[1]) == [404, 404, 404, 429]
        assert statuses(elsewhere, 1, KEYS[0]) == [404]
        assert statuses(elsewhere, 1, "a wrong key of 16") == [401]


def test_guesses_beyond_the_limit_are_refused_even_when_right(models: Path, tmp_path: Path) -> None:
    with client(models, tmp_path, api_keys=KEYS[0], operator_rate_limit="3/minute") as service:
        assert statuses(service, 4, "a wrong key of 16") == [401, 401, 401, 429]
        wrong = call(service, "DELETE", "/train/x", Authorization="Bearer a wrong key of 16")
        right = call(service, "DELETE", "/train/x", Authorization=f"Bearer {KEYS[0]}")
        assert wrong.status_code == right.status_code == 429
        assert wrong.json()["detail"] == right.json()["detail"]
        assert "3 per 1 minute wrong keys from 127.0.0.1" in right.json()["detail"]
        assert 1 <= int(right.headers["retry-after"]) <= 60


def test_guesses_are_counted_together_wherever_they_are_sent(models: Path, tmp_path: Path) -> None:
    limits = {"operator_rate_limit": "3/minute", "predict_rate_limit": "2/minute"}
    settings: dict[str, Any] = {"api_keys": ",".join(KEYS), "predict_needs_key": True} | limits
    with client(models, tmp_path, **settings) as service:

        def predicted(calls: int, key: str) -> list[int]:
            headers = {"Authorization": f"Bearer {key}"}
            sent = (service.post("/predict", files={"file": b"x"}, headers=headers) for _ in range(calls))
            return [answer.status_code for answer in sent]

        assert predicted(1, KEYS[0]) == [415]
        assert statuses(service, 2, "a wrong key of 16") == [401, 401]
        assert predicted(3, "a wrong key of 16") == [401, 429, 429]
        assert service.post("/predict", files={"file": b"x"}).status_code == 401
        assert predicted(2, KEYS[0]) == [415, 429]  # refused calls did not count against its rate
        assert statuses(service, 1, KEYS[0]) == [404]
        assert predicted(1, KEYS[1]) == [429]


def test_without_a_limit_nothing_is_429(models: Path, tmp_path: Path) -> None:
    with client(models, tmp_path, api_keys=KEYS[0], operator_rate_limit="") as service:
        assert statuses(service, 70, "a wrong key of 16") == [401] * 70
        assert statuses(service, 70, KEYS[0]) == [404] * 70


def test_too_many_costly_calls_are_429_per_client(models: Path, tmp_path: Path) -> None:
    with client(models, tmp_path, operator_rate_limit="3/minute", predict_rate_limit="2/minute") as service:
        statuses = [call(service, "DELETE", "/train/x").status_code for _ in range(4)]
        assert statuses == [404, 404, 404, 429]
        refused = call(service, "POST", "/train")  # all costly calls share one rate limit
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert [service.post("/predict", files={"file": b"x"}).status_code for _ in range(3)] == [415, 415, 429]
        assert service.get("/health").status_code == 200
        other = TestClient(service.app, base_url="http://127.0.0.1", client=("127.0.0.2", 50000))
        assert call(other, "DELETE", "/train/x").status_code == 404
        for host in ("127.0.0.1", "::ffff:127.0.0.1"):  # both forms are one client
            again = TestClient(service.app, base_url="http://127.0.0.1", client=(host, 50000))
            assert call(again, "DELETE", "/train/x").status_code == 429
        others = TestClient(service.app, base_url="http://127.0.0.1", client=("::ffff:127.0.0.3", 50000))
        assert call(others, "DELETE", "/train/x").status_code != 429


def test_answers_carry_security_headers_and_pages_load_only_what_they_need(models: Path, tmp_path: Path) -> None:
    with client(models, tmp_path) as service:
        for path in ("/", "/docs", "/errors", "/health", "/nowhere", "/static/main.js"):
            headers = service.get(path).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["x-frame-options"] == "DENY"
            policy = headers["content-security-policy"]
            assert policy.startswith("default-src 'none'")
            assert "frame-ancestors 'none'" in policy
            assert "access-control-allow-origin" not in headers
            scripts = re.search("script-src ([^;]*)", policy)
            assert (scripts is not None) == (path in ("/", "/docs", "/errors"))
            assert "unsafe" not in policy
            assert "http" not in policy


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
    lines = [line for line in lines if line["logger"] != "httpx"]  # drop the records of the test's own client
    answered = [line for line in lines if line["logger"] == "app.middleware.request_log"]
    assert [line["message"] for line in answered] == ["DELETE /train/x 422", "GET /nowhere 404"]
    assert [line["request_id"] for line in answered] == ["from-a-proxy.1", own.headers["x-request-id"]]
    assert all(line["milliseconds"] > 0 and line["client"] == "127.0.0.1" for line in answered)
    assert "untold" not in str(lines)
    assert KEYS[0] not in str(lines)


def test_an_unexpected_error_is_a_problem_and_its_traceback_is_logged(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with client(models, tmp_path) as service:
        monkeypatch.setattr("training.store.LocalStore.names", lambda _: 1 / 0)
        answer = service.get("/models")
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-request-id"]
    assert "ZeroDivisionError" in caplog.text
    assert "ZeroDivision" not in answer.text
