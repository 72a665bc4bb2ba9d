"""Test training jobs that a Ray cluster runs, through the job server of a head node that an operator has started."""

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from nginx import find_free_port
from ray_nodes import ray_environment
from server import Server, wait_for
from service import TINY, find_finished_job

from training.store import LocalStore

pytest.importorskip("ray")

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

READY_S = 300.0
SHORT = {"recipe": "resnet", "overrides": {**TINY, "epochs": 2}, "promote": "always"}
LONG = {"recipe": "resnet", "overrides": {**TINY, "epochs": 500}}
_RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def job_server() -> Iterator[str]:
    """The address of the job server of a cluster with one processor."""
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    ports = {f"--{name}": str(find_free_port()) for name in names}
    options = [*itertools.chain(*ports.items()), "--include-dashboard", "true"]
    options += ["--num-cpus", "1", "--num-gpus", "0", "--object-store-memory", str(80 << 20)]
    url = f"http://127.0.0.1:{ports['--dashboard-port']}"
    with ray_environment(), tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        command = [_RAY, "start", "--head", "--block", *options, "--temp-dir", folder]
        with Path(folder, "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as head:
            try:
                wait_for(lambda: _answers(url), READY_S, Path(folder, "log"))
                yield url
            finally:
                head.terminate()  # ends all processes of the node


def _answers(url: str) -> bool:
    try:
        return httpx.get(
            f"{url}/api/version", headers={"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
        ).is_success
    except httpx.TransportError:
        return False


@contextmanager
def serve(models: Path, folder: Path, job_server: str, log: str = "log") -> Iterator[tuple[httpx.Client, Server]]:
    settings = {"jobs": "ray", "jobs_address": job_server, "cluster": ""}
    with Server(models, folder / "runs", folder / log, **settings) as server, server.client() as client:
        yield client, server


def submit(client: httpx.Client, request: dict[str, Any]) -> str:
    job_id: str = client.post("/train", json=request).raise_for_status().json()["id"]
    return job_id


def history(client: httpx.Client, job_id: str) -> list[int]:
    return [epoch["epoch"] for epoch in client.get(f"/train/{job_id}").json()["history"]]


def test_jobs_wait_for_resources_publish_and_are_cancelled(job_server: str, models: Path, tmp_path: Path) -> None:
    with serve(models, tmp_path, job_server) as (client, server):
        short = submit(client, SHORT)
        wait_for(lambda: history(client, short), READY_S, server.log)
        long = submit(client, LONG)
        done = wait_for(lambda: find_finished_job(client, short), READY_S, server.log)
        assert done["state"] == "succeeded", done["error"]
        assert [epoch["epoch"] for epoch in done["history"]] == [1, 2]
        assert done["files"] == ["recipe.json", "metrics.jsonl", "published.json", "output.log"]
        assert client.get(f"/train/{short}/events").text.count("event: epoch") == 2
        assert LocalStore(models).live("resnet") == done["published"]["version"] == 2
        assert "resnet" in client.get(f"/train/{short}/files/output.log").text
        wait_for(lambda: history(client, long), READY_S, server.log)
        assert client.get(f"/train/{long}").json()["phase"] == "training"
        assert client.delete(f"/train/{long}").json()["state"] == "cancelled"
        later = submit(client, SHORT)  # the cancelled job frees the processor
        assert wait_for(lambda: find_finished_job(client, later), READY_S, server.log)["state"] == "succeeded"


def test_failed_job_says_why(job_server: str, models: Path, tmp_path: Path) -> None:
    with serve(models, tmp_path, job_server) as (client, server):
        job_id = submit(client, {"recipe": "resnet", "overrides": {**TINY, "validation_images": 400}})
        failed = wait_for(lambda: find_finished_job(client, job_id), READY_S, server.log)
        assert failed["state"] == "failed"
        assert "validation_images=400 leaves none of 400 images" in failed["error"]


def test_job_goes_on_while_its_server_is_killed_and_is_followed_by_the_next(
    job_server: str, models: Path, tmp_path: Path
) -> None:
    with serve(models, tmp_path, job_server) as (client, server):
        job_id = submit(client, SHORT | {"overrides": {**TINY, "epochs": 12}})
        wait_for(lambda: history(client, job_id), READY_S, server.log)
        lost = submit(client, LONG)  # waits in Ray
        wait_for(lambda: f"{lost} is submitted to Ray" in server.log.read_text(), READY_S, server.log)
        server.kill()
    with serve(models, tmp_path, job_server, "log2") as (client, server):
        client.delete(f"/train/{lost}").raise_for_status()
        done = wait_for(lambda: find_finished_job(client, job_id), READY_S, server.log)
        assert (done["state"], done["crashes"]) == ("succeeded", 0), done["error"]
        assert [epoch["epoch"] for epoch in done["history"]] == list(range(1, 13))
        assert LocalStore(models).versions("resnet") == [1, 2]
        later = submit(client, SHORT)  # the cancelled job frees the processor
        assert wait_for(lambda: find_finished_job(client, later), READY_S, server.log)["state"] == "succeeded"
