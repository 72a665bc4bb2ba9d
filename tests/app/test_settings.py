"""Test invalid settings and the other startup errors that are found before models load."""

import errno
import logging
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError

from app.main import create_app
from app.server import workers
from app.server.startup import StartupError, check_store, format_authority, listen, read_settings
from app.settings import TRAINING_VARIABLES, Settings

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("CIFAR100_PORT", "http", "CIFAR100_PORT: Input should be a valid integer"),
        ("CIFAR100_MAX_QUEUE", "0", "CIFAR100_MAX_QUEUE: Input should be greater than 0"),
        ("CIFAR100_API_KEYS", "short-secret", "CIFAR100_API_KEYS_0: Value should have at least 16 items"),
        ("CIFAR100_DATABASE", "mysql://user:a-password@host/name", "CIFAR100_DATABASE: it is not a PostgreSQL URL"),
        ("CIFAR100_JOB_LEASE_S", "1", "CIFAR100_JOB_LEASE_S: Input should be greater than or equal to 5"),
        ("CIFAR100_PREDICT_NEEDS_KEY", "yes", "CIFAR100_PREDICT_NEEDS_KEY needs CIFAR100_API_KEYS"),
        ("CIFAR100_DRAIN_S", "inf", "CIFAR100_DRAIN_S: Input should be a finite number"),
        ("CIFAR100_WORKERS", "999", "CIFAR100_WORKERS: 999 workers are more than this machine can run; use at most "),
        ("CIFAR100_WORKRES", "2", "CIFAR100_WORKRES: no such setting; did you mean CIFAR100_WORKERS?"),
        ("CIFAR100_MODELS", __file__, f"the model store {__file__} cannot be read: Not a directory"),
        ("CIFAR100_HOST", "192.0.2.1", "cannot listen on 192.0.2.1:0: Cannot assign requested address"),
    ],
)
def test_a_service_that_cannot_start_says_why_in_one_line(name: str, value: str, fault: str) -> None:
    environment = os.environ | {"CIFAR100_PORT": "0"} | {name: value}
    command = [sys.executable, "-m", "app"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert fault in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "short-secret" not in done.stderr


def fault_of(name: str, value: str, environment: pytest.MonkeyPatch) -> str:
    environment.setenv(f"CIFAR100_{name.upper()}", value)
    with pytest.raises(StartupError) as refused:
        read_settings()
    return str(refused.value)


def numbers() -> list[str]:
    return [name for name, field in Settings.model_fields.items() if field.annotation in (int, float, int | None)]


@pytest.mark.parametrize("value", ["inf", "nan", "1e18", "-1", "1000000000000000000"])
@pytest.mark.parametrize("name", numbers())
def test_every_number_is_bounded(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fault_of(name, value, monkeypatch).startswith(f"CIFAR100_{name.upper()}: Input should be")


@pytest.mark.parametrize("name", ["deadline_s", "store_poll_s"])
def test_a_time_that_must_not_be_zero_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fault_of(name, "0", monkeypatch).startswith(f"CIFAR100_{name.upper()}: Input should be greater than")


@pytest.mark.parametrize("value", ["0/minute", "0 per second", "60", "often", "5/minute;9/hour", "1/99year"])
@pytest.mark.parametrize("name", ["operator_rate_limit", "predict_rate_limit"])
def test_a_rate_that_cannot_be_kept_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = fault_of(name, value, monkeypatch)
    assert fault.startswith(f"CIFAR100_{name.upper()}: {value!r} is ")
    assert fault.endswith("or an empty value for no limit")


@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_rate_is_no_limit(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR100_OPERATOR_RATE_LIMIT", value)
    assert read_settings().operator_rate_limit is None


@pytest.mark.parametrize("letter", ["ä", "\u2003", "\x7f", "\t", "\udce4"])
def test_a_key_that_no_client_can_send_is_refused_without_its_value(
    letter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = fault_of("api_keys", f"0123456789abcdef{letter}0123456789", monkeypatch)
    assert fault.startswith("CIFAR100_API_KEYS_0: a key may contain only printable ASCII characters")
    assert "0123456789" not in fault


@pytest.mark.parametrize(
    "value", ["10.0.0.0/33", "10.0.0.1/8", "proxy.local", "10.0.0.1,", "*,10.0.0.1", "unix:", "/s.sock"]
)
def test_a_proxy_that_is_no_address_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fault_of("trusted_proxies", value, monkeypatch).startswith("CIFAR100_TRUSTED_PROXIES: ")


def test_spaces_around_proxies_are_ignored() -> None:
    assert Settings(trusted_proxies=" unix , 10.0.0.0/8 ").trusted_proxies == "unix,10.0.0.0/8"


def test_an_empty_unix_socket_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR100_UDS", "")
    assert read_settings().uds is None


@pytest.mark.parametrize("value", ["example.org", "https://example.org/", "https://a@example.org", "null"])
def test_a_site_that_no_browser_sends_as_its_origin_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fault_of("cors_origins", value, monkeypatch).startswith("CIFAR100_CORS_ORIGINS_0: ")


@pytest.mark.parametrize("name", ["CIFAR100_MODLES", "cifar100_modles"])
def test_an_unknown_name_is_refused_with_the_nearest_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "elsewhere")
    with pytest.raises(ValidationError, match=f"{name}: no such setting; did you mean CIFAR100_MODELS"):
        Settings()


def test_every_variable_of_training_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    read = {
        name for path in (ROOT / "training").rglob("*.py") for name in re.findall('"(CIFAR100_\\w+)"', path.read_text())
    }
    assert read >= set(TRAINING_VARIABLES)
    monkeypatch.setattr("app.settings.find_spec", lambda _: True)  # CIFAR100_CLUSTER needs an extra
    for name in read:
        monkeypatch.setenv(name, "anything")
    read_settings()


def test_names_that_kubernetes_makes_of_services_are_let_be(monkeypatch: pytest.MonkeyPatch) -> None:
    links = {"WEB_SERVICE_HOST": "10.0.0.1", "WEB_PORT": "tcp://10.0.0.1:80", "WEB_PORT_80_TCP_ADDR": "10.0.0.1"}
    for name, value in links.items():
        monkeypatch.setenv(f"CIFAR100_{name}", value)
    with pytest.raises(StartupError):
        read_settings()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.2")
    read_settings()
    monkeypatch.setenv("CIFAR100_PROT", "8000")
    with pytest.raises(StartupError, match="did you mean CIFAR100_PORT"):
        read_settings()


@pytest.mark.parametrize(
    ("default", "fault"),
    [(None, None), ("resnet", None), ("vgg", "there is no model 'vgg' in .*, give one of resnet$")],
)
def test_a_default_model_that_the_store_lacks_is_refused(default: str | None, fault: str | None, models: Path) -> None:
    settings = Settings(models=models, default_model=default)
    if fault is None:
        check_store(settings)
    else:
        with pytest.raises(StartupError, match=fault):
            check_store(settings)


def test_a_store_that_cannot_be_read_is_refused_in_one_line(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = models / "loop"
    loop.symlink_to(loop)
    for path, reason in {models / "resnet" / "live": "Not a directory", loop: "Too many"}.items():
        with pytest.raises(StartupError, match=f"{path} cannot be read: {reason}"):
            check_store(Settings(models=path))
    with pytest.raises(StartupError, match=f"there is no model store {models}/no/such"):
        check_store(Settings(models=models / "no" / "such"))
    with pytest.raises(StartupError, match="CIFAR100_MODELS: ftpx://host/models: the scheme is unknown"):
        check_store(Settings(models="ftpx://host/models"))

    def refuse(_: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    # File permissions have no effect on root, which is the user in some containers.
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(StartupError, match=f"{models} cannot be read: Permission denied"):
        check_store(Settings(models=models))


@pytest.mark.parametrize("exists", [False, True])
def test_an_empty_store_starts_not_ready_with_a_warning_that_names_it(
    exists: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store"
    if exists:
        store.mkdir()
    settings = Settings(models=store, runs=tmp_path / "runs", default_model="vgg")
    check_store(settings)
    with caplog.at_level(logging.WARNING), TestClient(create_app(settings)) as service:
        assert service.get("/health/ready").status_code == 503
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line for line in warned if str(store) in line and "not ready" in line]


def test_a_taken_port_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use; choose"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "no-such-host.invalid", "a" * 64, "127.0.0.1:80"])
def test_a_host_that_is_not_of_this_machine_is_refused(host: str) -> None:
    with pytest.raises(StartupError, match=re.escape(f"cannot listen on {format_authority(host, 0)}: ")):
        listen(host, 0)


def test_all_addresses_of_a_name_share_a_port_and_a_missing_one_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*_: Any, **__: Any) -> list[Any]:
        addresses = ("127.0.0.1", "192.0.2.1", "127.0.0.2")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    sockets = listen("several.example", 0)
    names = [each.getsockname() for each in sockets]
    for each in sockets:
        each.close()
    assert [host for host, _ in names] == ["127.0.0.1", "127.0.0.2"]
    assert len({port for _, port in names}) == 1


@pytest.mark.parametrize(
    ("host", "addresses"),
    [
        ("localhost", ["127.0.0.1", "::1"]),
        ("LocalHost", ["127.0.0.1", "::1"]),
        ("::", ["::", "0.0.0.0"]),  # noqa: S104
        ("0:0::0", ["::", "0.0.0.0"]),  # noqa: S104
        ("0.0.0.0", ["0.0.0.0"]),  # noqa: S104
        ("::1", ["::1"]),
        ("::ffff:127.0.0.1", ["127.0.0.1"]),
    ],
)
def test_a_host_has_these_addresses_with_one_port(host: str, addresses: list[str]) -> None:
    sockets = listen(host, 0)
    names = [each.getsockname()[:2] for each in sockets]
    for each in sockets:
        each.close()
    assert [address for address, _ in names] == [each for each in addresses if ":" not in each or socket.has_ipv6]
    assert len({port for _, port in names}) == 1


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        (Settings(host="several.example"), ["--host", "several.example", "--port", "{port}"]),
        (Settings(uds=Path("a b.sock")), ["--uds", "a b.sock"]),
    ],
)
def test_workers_are_told_where_the_supervisor_listens(settings: Settings, options: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        given = workers.address_options(settings, [listening])
    assert given == [option.format(port=port) for option in options]


def test_workers_are_bounded_by_processors_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1 << 30
    for processors, memory, most, default in ((2, 64 * gib, 8, 2), (8, 2 * gib, 4, 4), (1, gib // 4, 1, 1)):
        monkeypatch.setattr(workers, "cpu_count", lambda number=processors: number)
        monkeypatch.setattr(workers, "memory_bytes", lambda number=memory: number)
        assert workers.choose_count(0) == default
        assert workers.choose_count(most) == most
        with pytest.raises(StartupError, match=f"CIFAR100_WORKERS: {most + 1} workers .* at most {most}: "):
            workers.choose_count(most + 1)
