"""Test one service with two workers: shared state, replaced workers, and shutdown."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from processes import list_children
from server import wait_for
from service import TINY, find_finished_job, run_service

from app.server.workers import BEAT, LOADING, Worker

pytestmark = pytest.mark.slow

WORKERS = 2


def running(process: int) -> bool:
    status = Path(f"/proc/{process}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):  # the process has ended, perhaps while its file was read
        return False


def heard_by(log: Path, message: str) -> Counter[int]:
    """Return how many times each process has logged a message."""
    lines = [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return Counter(line["process"] for line in lines if line["message"] == message)


def ready(log: Path, workers: set[int], address: httpx.URL) -> bool:
    return workers <= set(heard_by(log, f"running on {address}"))


def live(address: httpx.URL) -> bool:
    """Return whether a new connection gets an answer within 2 s."""
    try:
        return httpx.get(f"{address}/health/live", timeout=2).status_code == 200
    except httpx.TimeoutException:
        return False


def read_metrics(address: httpx.URL) -> set[str]:
    """Return the lines of /metrics, over a new connection."""
    return set(httpx.get(f"{address}/metrics").text.splitlines())


def test_workers_answer_as_one_service(tmp_path: Path, models: Path, image: Path) -> None:
    log = tmp_path / "log"
    sent: dict[str, Any] = {"content": image.read_bytes(), "headers": {"Content-Type": "image/png"}}
    with run_service(models, tmp_path / "runs", log, workers=str(WORKERS)) as (client, supervisor):
        address = client.base_url
        workers = list_children(supervisor.pid)
        assert len(workers) == WORKERS
        wait_for(lambda: ready(log, workers, address), 60, log)

        # Every call opens a new connection. Connections alternate between the workers whose heartbeat is recent.
        predicted = [httpx.post(f"{address}/predict", **sent).raise_for_status() for _ in range(30)]
        assert len({json.dumps(answer.json()["predictions"]) for answer in predicted}) == 1
        wait_for(lambda: heard_by(log, "POST /predict 200").total() == 30, 60, log)
        assert set(heard_by(log, "POST /predict 200")) == workers
        counted = {
            'cifar100_requests_total{method="POST",route="/predict",status="200"} 30.0',
            'cifar100_images_total{model="resnet",outcome="predicted"} 30.0',
            'cifar100_queue_seconds_count{model="resnet"} 30.0',
            "cifar100_workers 2.0",
            "cifar100_worker_starts_total 2.0",
            "cifar100_ready 1.0",
        }
        # A worker knows the counts of the others after a second.
        wait_for(lambda: all(counted <= read_metrics(address) for _ in range(4)), 60, log)

        measured = httpx.post(f"{address}/evaluate").raise_for_status().json()
        assert all(httpx.get(f"{address}/evaluate/{measured['id']}").json() == measured for _ in range(10))

        job = httpx.post(f"{address}/train", json={"recipe": "resnet", "overrides": TINY, "promote": "always"}).json()
        done = wait_for(lambda: find_finished_job(client, job["id"]), 120, log)
        assert done["state"] == "succeeded", done
        for _ in range(10):
            wait_for(lambda: httpx.post(f"{address}/predict", **sent).json()["version"] == 2, 60, log)

        killed = workers.pop()
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: len(list_children(supervisor.pid) - {killed}) == WORKERS, 60, log)
        workers = list_children(supervisor.pid)
        wait_for(lambda: ready(log, workers, address), 60, log)
        assert all(httpx.post(f"{address}/predict", **sent).status_code == 200 for _ in range(10))
        replaced = {"cifar100_workers 2.0", "cifar100_worker_starts_total 3.0"}
        replaced |= {'cifar100_jobs{kind="training",state="succeeded"} 1.0'}
        wait_for(lambda: all(replaced <= read_metrics(address) for _ in range(4)), 60, log)

        supervisor.terminate()
        assert supervisor.wait(60) == 0
        assert not any(running(worker) for worker in workers)


def test_a_worker_that_hangs_is_replaced_and_keeps_no_service_from_ending(tmp_path: Path, models: Path) -> None:
    log = tmp_path / "log"
    with run_service(models, tmp_path / "runs", log, workers=str(WORKERS)) as (client, supervisor):
        workers = list_children(supervisor.pid)
        wait_for(lambda: ready(log, workers, client.base_url), 60, log)
        hanging = min(workers)
        os.kill(hanging, signal.SIGSTOP)
        wait_for(lambda: all(live(client.base_url) for _ in range(4)), 60, log)
        assert running(hanging)  # alive, but gets no more connections
        wait_for(lambda: not running(hanging), 60, log)
        assert f"worker {hanging} does not respond and is killed" in log.read_text()
        wait_for(lambda: ready(log, list_children(supervisor.pid), client.base_url), 60, log)
        assert max(workers) in list_children(supervisor.pid)

        os.kill(max(workers), signal.SIGSTOP)
        supervisor.terminate()
        assert supervisor.wait(60) == 0


@contextmanager
def silent_worker() -> Iterator[tuple[Worker, socket.socket]]:
    """Yield a worker that sends nothing itself, and the socket over which the test sends messages in its name."""
    line, its_line = socket.socketpair()
    process = subprocess.Popen(["sleep", "1000"], stdin=its_line.fileno())
    try:
        yield Worker(process, line, replaces=False), its_line
    finally:
        process.kill()
        process.wait()
        line.close()
        its_line.close()


def seconds_until_killed(beats: bytes, beat: bytes, log: pytest.LogCaptureFixture) -> int | None:
    """Poll a worker until it is killed.

    Args:
        beats: Messages that the worker sends at once.
        beat: Message that the worker sends in each second of polls.
        log: Captured log records.

    Returns:
        The number of seconds of polls until the kill; None if the worker still runs after ten minutes of polls.
    """
    log.clear()
    with silent_worker() as (worker, line):
        line.send(beats)
        for second in range(600):
            line.send(beat)
            for _ in range(5):
                worker.kill_if_hanging()
            if "is killed" in log.text:
                assert not worker.is_responding
                assert worker.process.wait(60) == -signal.SIGKILL
                return second
    return None


@pytest.mark.parametrize(
    ("beats", "beat", "seconds"),
    [
        (b"", b"", 60),
        (LOADING, b"", 60),
        (LOADING + BEAT, b"", 20),
        (b"", LOADING, 300),
        (LOADING, BEAT, None),
    ],
)
def test_a_worker_is_killed_that_is_silent_or_loads_for_too_long(
    beats: bytes, beat: bytes, seconds: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    assert seconds_until_killed(beats, beat, caplog) in (seconds, seconds and seconds - 1)


def test_no_worker_outlives_its_supervisor(tmp_path: Path, models: Path) -> None:
    log = tmp_path / "log"
    with run_service(models, tmp_path / "runs", log, workers=str(WORKERS)) as (client, supervisor):
        workers = list_children(supervisor.pid)
        wait_for(lambda: ready(log, workers, client.base_url), 60, log)
        supervisor.kill()
        wait_for(lambda: not any(running(worker) for worker in workers), 60, log)


def test_draining_is_for_all_workers_and_a_second_signal_cuts_it_short(tmp_path: Path, models: Path) -> None:
    log = tmp_path / "log"
    settings = {"workers": str(WORKERS), "drain_s": "100"}
    with run_service(models, tmp_path / "runs", log, **settings) as (client, supervisor):
        address = client.base_url
        workers = list_children(supervisor.pid)
        wait_for(lambda: ready(log, workers, address), 60, log)
        for process in (supervisor.pid, *workers):  # signals to a process group reach every process
            os.kill(process, signal.SIGTERM)
        wait_for(lambda: all(httpx.get(f"{address}/health/ready").status_code == 503 for _ in range(10)), 60, log)
        assert httpx.get(f"{address}/health/live").status_code == 200
        supervisor.terminate()
        assert supervisor.wait(60) == 0
        assert not any(running(worker) for worker in workers)


def test_the_service_ends_if_no_worker_can_start(tmp_path: Path) -> None:
    too_little_for_torch = "ulimit -v 700000; exec "
    done = subprocess.run(
        ["bash", "-c", f"{too_little_for_torch} {sys.executable} -m app --port 0"],
        env=os.environ | {"CIFAR100_WORKERS": str(WORKERS), "CIFAR100_RUNS": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "is replaced" not in done.stderr


def test_the_address_of_another_service_is_refused(tmp_path: Path, models: Path) -> None:
    with run_service(models, tmp_path / "runs", tmp_path / "log", workers=str(WORKERS)) as (client, _):
        second = subprocess.run(
            [sys.executable, "-m", "app", "--port", str(client.base_url.port)],
            env=os.environ | {"CIFAR100_WORKERS": str(WORKERS)},
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert second.returncode == 1
        assert f"cannot listen on 127.0.0.1:{client.base_url.port}" in second.stderr
