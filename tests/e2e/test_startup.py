"""Test startup and shutdown: errors that the service reports before it loads models, and signals that end it."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from processes import list_children
from server import Server, wait_for
from service import TINY, list_processes, run_service
from sockets import make_upload

from app.server.startup import format_authority

pytestmark = pytest.mark.slow

END_S = 60.0  # ample for a shutdown on a busy machine; models that never load take longer
STOPPED = {signal.SIGTERM: 0, signal.SIGHUP: 0, signal.SIGINT: 130}
ALONE, SEVERAL = "1", "2"


@pytest.fixture(autouse=True)
def hang_up_is_not_ignored() -> Iterator[None]:
    """Reset SIGHUP to its default, so that servers do not inherit an ignored SIGHUP from tests under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def endless(models: Path) -> Path:
    """A store whose models never finish loading."""
    live = models / "resnet" / "live"
    live.unlink()
    os.mkfifo(live)  # a reader blocks until a writer opens the pipe
    return models


@contextmanager
def starting(models: Path, runs: Path, log: Path, **settings: str) -> Iterator[Server]:
    """Start a server and yield it without waiting until it is ready."""
    server = Server(models, runs, log, **settings)
    try:
        yield server
    finally:
        server.kill()


def serving(server: Server, workers: str) -> set[int]:
    """Return the ids of the processes that serve or are about to serve."""
    return {server.process.pid} if workers == ALONE else list_children(server.process.pid)


def wait_until_loading(server: Server, workers: str) -> set[int]:
    begun = "Waiting for application startup"
    wait_for(lambda: server.log.read_text().count(begun) == int(workers), END_S, server.log)
    return serving(server, workers)


def running(process: int) -> bool:
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def none_running(processes: set[int]) -> Callable[[], bool]:
    return lambda: not any(map(running, processes))


def metrics_folders(runs: Path) -> list[Path]:
    return list((runs / "metrics").glob("*/"))


@pytest.mark.parametrize("number", STOPPED)
@pytest.mark.parametrize("workers", [ALONE, SEVERAL])
def test_a_service_that_loads_models_ends_at_once(
    workers: str, number: signal.Signals, tmp_path: Path, endless: Path
) -> None:
    with starting(endless, tmp_path / "runs", tmp_path / "log", workers=workers) as server:
        processes = wait_until_loading(server, workers)
        server.process.send_signal(number)
        assert server.process.wait(END_S) == STOPPED[number]
        assert not any(map(running, processes))
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_signal_between_the_starts_of_workers_ends_them_all(tmp_path: Path, endless: Path) -> None:
    with starting(endless, tmp_path / "runs", tmp_path / "log", workers=SEVERAL) as server:
        started = wait_for(lambda: list_children(server.process.pid), END_S, server.log)
        server.process.terminate()
        assert server.process.wait(END_S) == 0
        wait_for(none_running(started), END_S)
    assert not metrics_folders(tmp_path / "runs")


def test_workers_whose_supervisor_is_killed_do_not_go_on_loading(tmp_path: Path, endless: Path) -> None:
    for is_early in (True, False):
        with starting(endless, tmp_path / "runs", tmp_path / f"log{is_early}", workers=SEVERAL) as server:
            if is_early:
                workers = wait_for(lambda: list_children(server.process.pid), END_S, server.log)
            else:
                workers = wait_until_loading(server, SEVERAL)
            server.kill()
            wait_for(none_running(workers), END_S, server.log)


def test_nothing_is_left_in_the_temporary_folder_and_the_next_start_clears_the_runs_folder(
    tmp_path: Path, endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary, runs = tmp_path / "temporary", tmp_path / "runs"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))

    with starting(endless, runs, tmp_path / "log", workers=SEVERAL) as first:
        workers = wait_until_loading(first, SEVERAL)
        (left,) = metrics_folders(runs)
        first.kill()
        wait_for(none_running(workers), END_S)
        assert metrics_folders(runs) == [left]
    with (
        starting(endless, runs, tmp_path / "log2", workers=SEVERAL) as second,
        starting(endless, runs, tmp_path / "log3", workers=SEVERAL) as third,  # uses the same runs folder
    ):
        wait_until_loading(second, SEVERAL)
        wait_until_loading(third, SEVERAL)
        assert len(metrics_folders(runs)) == 2
        assert left not in metrics_folders(runs)
        assert second.stop() == third.stop() == 0
    assert not metrics_folders(runs)
    assert not [path for path in temporary.iterdir() if "cifar100" in path.name]


def test_workers_serve_where_the_runs_folder_cannot_be_used(tmp_path: Path, models: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with run_service(models, tmp_path / "runs", tmp_path / "log", workers=SEVERAL) as (client, supervisor):
        assert "cifar100_live_version" in client.get("/metrics").text
        supervisor.terminate()
        assert supervisor.wait(END_S) == 0


@pytest.mark.parametrize("workers", [ALONE, SEVERAL])
def test_a_taken_port_is_told_before_anything_is_loaded(workers: str, tmp_path: Path, endless: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "app", "--port", str(port)],
            env=os.environ | {"CIFAR100_WORKERS": workers, "CIFAR100_MODELS": str(endless)},
            capture_output=True,
            text=True,
            timeout=END_S,
        )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot listen on 127.0.0.1:{port}: Address already in use")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("workers", "host", "addresses"),
    [
        (ALONE, "::1", ["::1"]),
        (ALONE, "localhost", ["127.0.0.1", "::1"]),
        (SEVERAL, "localhost", ["127.0.0.1", "::1"]),
        (ALONE, "::", ["127.0.0.1", "::1"]),
        (SEVERAL, "::", ["127.0.0.1", "::1"]),
    ],
)
def test_a_service_listens_on_every_address_of_its_host(
    workers: str, host: str, addresses: list[str], tmp_path: Path, models: Path
) -> None:
    log = tmp_path / "log"
    with run_service(models, tmp_path / "runs", log, workers=workers, host=host) as (client, _):
        for address in addresses:
            url = f"http://{format_authority(address, client.base_url.port or 0)}"
            assert httpx.get(f"{url}/health/ready").status_code == 200
            assert httpx.delete(f"{url}/train/x").status_code == (403 if host == "::" else 404)
        wait_for(lambda: set(re.findall('"client": "([^"]+)"', log.read_text())) == set(addresses), END_S, log)


@pytest.fixture
def socket_path() -> Iterator[Path]:
    """A path that is short enough for a socket, in an empty folder."""
    with tempfile.TemporaryDirectory(prefix="cifar100-") as folder:
        yield Path(folder) / "service.sock"


@pytest.mark.parametrize("workers", [ALONE, SEVERAL])
def test_a_service_listens_on_a_unix_socket_only(
    workers: str, tmp_path: Path, models: Path, image: Path, socket_path: Path
) -> None:
    chosen = {"workers": workers, "uds": str(socket_path), "host": "192.0.2.1"}  # not an address of this machine
    with Server(models, tmp_path / "runs", tmp_path / "log", **chosen) as server, server.client() as client:
        assert client.get("/health/ready").status_code == 200
        assert client.post("/predict", files={"file": image.read_bytes()}).status_code == 200
        refused = client.delete("/train/x")
        assert refused.status_code == 403
        assert "unix socket" in refused.json()["detail"]
        if curl := shutil.which("curl"):
            command = [curl, "--silent", "--fail", "--unix-socket", str(socket_path), "http://localhost/health/ready"]
            assert subprocess.run(command, capture_output=True).stdout == b'{"status":"ready"}'
        second = Server(models, tmp_path / "runs", tmp_path / "log2", **chosen)
        assert second.process.wait(END_S) == 1
        assert (tmp_path / "log2").read_text() == (
            f"error: cannot listen on unix:{socket_path}: another server listens on it; choose another path by "
            "CIFAR100_UDS\n"
        )
        assert client.get("/health/live").status_code == 200
        assert server.stop() == 0
    assert not list(socket_path.parent.iterdir())


@pytest.mark.parametrize("workers", [ALONE, SEVERAL])
def test_a_unix_socket_is_removed_at_exit_and_replaced_after_a_crash(
    workers: str, tmp_path: Path, endless: Path, socket_path: Path
) -> None:
    chosen = {"workers": workers, "uds": str(socket_path)}
    with starting(endless, tmp_path / "runs", tmp_path / "log", **chosen) as killed:
        left = wait_until_loading(killed, workers)
        killed.kill()
        wait_for(none_running(left), END_S)
        assert socket_path.is_socket()
    with starting(endless, tmp_path / "runs", tmp_path / "log2", **chosen) as stopped:
        wait_until_loading(stopped, workers)
        assert stopped.stop() == 0
    assert not list(socket_path.parent.iterdir())


def test_the_option_for_a_unix_socket_precedes_the_variable(tmp_path: Path, endless: Path, socket_path: Path) -> None:
    variables = {"CIFAR100_MODELS": str(endless), "CIFAR100_UDS": str(tmp_path / "no" / "such.sock")}
    command = [sys.executable, "-m", "app", "--uds", str(socket_path), "--port", "0"]
    process = subprocess.Popen(command, env=os.environ | variables, stderr=subprocess.DEVNULL)
    try:
        wait_for(socket_path.is_socket, END_S)
        process.terminate()
        assert process.wait(END_S) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("workers", [ALONE, SEVERAL])
def test_a_signal_drains_and_the_next_one_ends_the_service(
    workers: str, number: signal.Signals, tmp_path: Path, models: Path
) -> None:
    with run_service(models, tmp_path / "runs", tmp_path / "log", workers=workers, drain_s="1000") as (client, server):
        address = client.base_url
        server.send_signal(number)
        wait_for(lambda: all(httpx.get(f"{address}/health/ready").status_code == 503 for _ in range(10)), END_S)
        assert httpx.get(f"{address}/health/live").status_code == 200
        server.send_signal(number)
        assert server.wait(END_S) == 0


@pytest.mark.parametrize("workers", [ALONE, SEVERAL])
def test_an_interrupt_ends_the_service_without_draining(workers: str, tmp_path: Path, models: Path) -> None:
    with run_service(models, tmp_path / "runs", tmp_path / "log", workers=workers, drain_s="1000") as (_, server):
        server.send_signal(signal.SIGINT)
        assert server.wait(END_S) == 130
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("workers", [ALONE, SEVERAL])
def test_a_service_under_nohup_outlives_its_terminal(workers: str, tmp_path: Path, models: Path) -> None:
    server = Server(models, tmp_path / "runs", tmp_path / "log", ("nohup",), workers=workers, drain_s="1000")
    with server, server.client() as client:
        for process in serving(server, workers) | {server.process.pid}:
            os.kill(process, signal.SIGHUP)
        server.process.send_signal(signal.SIGTERM)  # still obeyed after SIGHUP
        wait_for(lambda: client.get("/health/ready").status_code == 503, END_S, server.log)
        assert len([process for process in serving(server, workers) if running(process)]) == int(workers)


@pytest.mark.parametrize("workers", [ALONE, SEVERAL])
def test_a_further_signal_leaves_what_is_under_way_but_no_training_process(
    workers: str, tmp_path: Path, models: Path
) -> None:
    log, runs = tmp_path / "log", tmp_path / "runs"
    with run_service(models, runs, log, workers=workers) as (client, server):
        client.post("/train", json={"recipe": "resnet", "overrides": TINY | {"epochs": 400}}).raise_for_status()
        wait_for(lambda: list_processes(runs), END_S, log)
        with socket.create_connection(("127.0.0.1", client.base_url.port or 0)) as half_sent:
            half_sent.settimeout(END_S)
            half_sent.sendall(make_upload(9, b"Expect: 100-continue"))
            assert half_sent.recv(1000).startswith(b"HTTP/1.1 100 ")
            server.terminate()
            wait_for(lambda: "Waiting for connections to close" in log.read_text(), END_S, log)
            server.terminate()
            assert server.wait(END_S) == 0
    assert not list_processes(runs)
    assert "does not end and is killed" not in log.read_text()
    assert "Cancel " not in log.read_text()  # uvicorn logs this after 20 s
