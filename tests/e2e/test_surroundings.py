"""Test a real server in difficult surroundings.

These are a full temporary folder, a file size limit, too many clients, and a locale that is not UTF-8.
"""

import io
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from server import Server, wait_for
from service import TINY, find_finished_job, list_processes, run_service

pytestmark = pytest.mark.slow

JOB = {"recipe": "resnet", "overrides": {**TINY, "epochs": 500}}


def picture(side: int) -> bytes:
    pixels, content = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", compress_level=1)
    return content.getvalue()


def records(log: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    mount = ["/usr/bin/mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["/usr/bin/umount", "--lazy", str(folder)], check=True)


def assert_large_forms_only_are_refused(server: Server, reason: str, log: Path) -> None:
    with server.client() as client:
        small, large = picture(32), picture(800)
        for _ in range(3):
            refused = client.post("/predict", files={"file": large})
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            assert reason in refused.json()["detail"]
            assert client.post("/predict", files={"file": small}).status_code == 200
        raw = client.post("/predict", content=large, headers={"Content-Type": "image/png"})
        assert raw.status_code == 200
    warnings = [record["message"] for record in records(log) if record["level"] not in ("INFO", "DEBUG")]
    assert len(warnings) == 3
    assert "Traceback" not in log.read_text()


def test_full_temporary_folder_refuses_large_forms_only(tmp_path: Path, models: Path) -> None:
    folder, log = tmp_path / "temporary", tmp_path / "log"
    with small_disk(folder):
        wrapper = ("/usr/bin/env", f"TMPDIR={folder}")
        with Server(models, tmp_path / "runs", log, wrapper) as server:
            assert_large_forms_only_are_refused(server, "No space left on device", log)


def test_limit_of_a_files_size_refuses_large_forms_only(tmp_path: Path, models: Path) -> None:
    log = tmp_path / "log"
    with Server(models, tmp_path / "runs", log, ("/usr/bin/prlimit", "--fsize=1200000")) as server:
        assert_large_forms_only_are_refused(server, "File too large", log)


def test_no_more_clients_follow_a_job_than_allowed(tmp_path: Path, models: Path) -> None:
    with (
        run_service(models, tmp_path / "runs", tmp_path / "log", max_event_streams="5") as (client, _),
        ExitStack() as open_,
    ):
        job = client.post("/train", json=JOB).raise_for_status().json()["id"]
        ready = threading.Barrier(40, timeout=30)

        def follow(_: int) -> httpx.Response:
            http = open_.enter_context(httpx.Client(base_url=client.base_url, timeout=60))
            http.get("/health/live")
            ready.wait()
            return open_.enter_context(http.stream("GET", f"/train/{job}/events"))

        with ThreadPoolExecutor(40) as threads:
            statuses = [response.status_code for response in threads.map(follow, range(40))]
        assert sorted(statuses) == [200] * 3 + [503] * 37  # one address may hold three quarters of the 5 streams
        open_.close()
        wait_for(lambda: _can_follow(client, job), 30)
        client.delete(f"/train/{job}").raise_for_status()


def _can_follow(client: httpx.Client, job: str) -> bool:
    with client.stream("GET", f"/train/{job}/events") as response:
        return response.status_code == 200


def test_child_that_has_just_been_started_is_known_to_the_next_server_and_ends_with_it(
    tmp_path: Path, models: Path
) -> None:
    runs, log = tmp_path / "runs", tmp_path / "log2"
    with run_service(models, runs, tmp_path / "log") as (client, server):
        job = client.post("/train", json=JOB).raise_for_status().json()["id"]
        (child,) = wait_for(lambda: list_processes(runs), 30, tmp_path / "log")
        os.kill(child, signal.SIGSTOP)  # the child has not loaded its libraries yet
        # The server writes the pid of the child into the lock file before it logs this line. Without a pid the next
        # server could only wait until the child itself, which is stopped here, writes it.
        wait_for(lambda: f"runs as process {child}" in (tmp_path / "log").read_text(), 30, tmp_path / "log")
        server.kill()
        server.wait()
    with run_service(models, runs, log) as (client, server):
        wait_for(lambda: f"still running as process {child}" in log.read_text(), 60, log)
        assert client.get("/health").json()["training"] == job
        assert list_processes(runs) == [child]
        server.terminate()
        assert server.wait(60) == 0
    assert list_processes(runs) == []


@pytest.mark.parametrize("workers", ["1", "2"])
def test_names_that_are_not_ascii_work_in_the_c_locale(
    workers: str, tmp_path: Path, models: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PYTHONUTF8", "0")
    folder, log = tmp_path / "größe-日本", tmp_path / "log"
    folder.mkdir()
    store = models.rename(folder / "mödels")
    with run_service(store, folder / "rüns", log, workers=workers) as (client, _):
        assert client.get("/health").json()["errors"] == {}
        answer = client.post("/predict", files={"file": ("größe-日本.png", image.read_bytes())})
        assert answer.json()["predictions"][0]["file"] == "größe-日本.png"
        for path in (
            "/größe",
            "/models/größe",
            "/train/größe",
            "/evaluate/größe/events",
            "/static/größe.js",
            "/%ff%fe",
        ):
            assert client.get(path).status_code == 404
        assert "'größe'" in client.post("/train", json={"recipe": "größe"}).json()["detail"]
        damaged = store / "resnet" / "2" / "card.json"
        damaged.parent.mkdir()
        damaged.write_bytes(b"{")
        assert f"{damaged} is damaged" in client.get("/models/resnet").json()["error"]
        refused = client.put("/models/resnet/live", json={"version": 2})
        assert refused.status_code == 503
        assert f"{damaged} is damaged" in refused.json()["detail"]
        job = client.post("/train", json={"recipe": "resnet", "overrides": TINY}).json()["id"]
        assert wait_for(lambda: find_finished_job(client, job), 200, log)["state"] == "succeeded"
    text = log.read_text()
    assert "Traceback" not in text
    assert "Logging error" not in text
