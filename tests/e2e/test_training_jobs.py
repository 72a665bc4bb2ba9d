"""Test training jobs that survive crashes of their process and of the server, restarts, and several servers."""

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from server import wait_for
from service import TINY, find_finished_job, list_processes, run_service
from sockets import make_upload

from training.run import Run
from training.store import LocalStore

pytestmark = pytest.mark.slow

LONG = {"recipe": "resnet", "overrides": {**TINY, "epochs": 500}}
KEY = "the-secret-of-this-test"
SHORT = {"recipe": "resnet", "overrides": {**TINY, "epochs": 8}, "promote": "always"}


def submit(client: httpx.Client, request: dict[str, Any], **headers: str) -> str:
    job_id: str = client.post("/train", json=request, headers=headers).raise_for_status().json()["id"]
    return job_id


def kill(processes: list[int]) -> None:
    assert processes
    for process in processes:
        os.kill(process, signal.SIGKILL)


def checkpointed(client: httpx.Client, job_id: str, runs: Path, log: Path) -> None:
    """Wait until a job can be resumed. The run saves a checkpoint just after it records the epoch."""
    wait_for(lambda: client.get(f"/train/{job_id}").json()["history"], 60, log)
    wait_for((runs / job_id / "checkpoint.pt").exists, 60, log)


def answers(client: httpx.Client) -> bool:
    try:
        return httpx.get(f"{client.base_url}/health/live").is_success
    except httpx.TransportError:
        return False


def assert_trained_once(client: httpx.Client, job_id: str, models: Path, log: Path) -> None:
    """Assert that the job succeeds with every epoch recorded once and one version published."""
    job = wait_for(lambda: find_finished_job(client, job_id), 90, log)
    assert job["state"] == "succeeded", log.read_text()
    assert [epoch["epoch"] for epoch in job["history"]] == list(range(1, 9))
    assert job["published"]["version"] == 2
    assert LocalStore(models).versions("resnet") == [1, 2]


def test_jobs_are_cancelled_with_their_process(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, runs = tmp_path / "log", tmp_path / "runs"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")  # nothing listens there
    with run_service(models, runs, log, api_keys=KEY, training_niceness="3") as (client, server):
        assert client.post("/train", json=LONG).status_code == 401
        client.headers["Authorization"] = f"Bearer {KEY}"
        first, second, deaf = (submit(client, LONG) for _ in range(3))
        checkpointed(client, first, runs, log)
        assert client.get("/health").json()["training"] == first
        assert client.delete(f"/train/{second}").json()["state"] == "cancelled"  # the job is still queued
        assert client.delete(f"/train/{first}").json()["state"] == "cancelled"
        wait_for(lambda: not list(list_processes(runs / first)), 60, log)
        assert (runs / first / "checkpoint.pt").exists()
        assert not (runs / second).exists()

        checkpointed(client, deaf, runs, log)
        (process,) = list_processes(runs)
        environment = Path(f"/proc/{process}/environ").read_text()
        assert KEY not in environment
        assert "MLFLOW_TRACKING_URI=http://127.0.0.1:1" in environment
        assert os.getpriority(os.PRIO_PROCESS, process) == min(os.getpriority(os.PRIO_PROCESS, server.pid) + 3, 19)
        if (autogroup := Path(f"/proc/{process}/autogroup")).exists():
            assert autogroup.read_text().split()[-1] == str(os.getpriority(os.PRIO_PROCESS, process))
        os.kill(process, signal.SIGSTOP)  # a stopped process does not react to SIGTERM
        client.delete(f"/train/{deaf}").raise_for_status()
        wait_for(lambda: not list_processes(runs), 60, log)
        assert client.get("/health").json()["training"] is None
        assert {job["state"] for job in client.get("/train").json()} == {"cancelled"}


def test_a_failed_job_says_why(tmp_path: Path, models: Path) -> None:
    log = tmp_path / "log"
    with run_service(models, tmp_path / "runs", log) as (client, _):
        # The data set has only 400 training images, so none is left to train on.
        job_id = submit(client, {"recipe": "resnet", "overrides": {**TINY, "validation_images": 400}})
        failed = wait_for(lambda: find_finished_job(client, job_id), 60, log)
        assert failed["state"] == "failed"
        assert "validation_images=400" in failed["error"]


def test_a_job_whose_process_is_killed_is_resumed_once(tmp_path: Path, models: Path) -> None:
    log, runs = tmp_path / "log", tmp_path / "runs"
    with run_service(models, runs, log) as (client, _):
        lucky, unlucky = submit(client, SHORT), submit(client, LONG)
        checkpointed(client, lucky, runs, log)
        kill(list_processes(runs))
        assert_trained_once(client, lucky, models, log)
        assert client.get(f"/train/{lucky}").json()["crashes"] == 1

        checkpointed(client, unlucky, runs, log)
        kill(first := list_processes(runs))
        wait_for(lambda: list_processes(runs) not in ([], first), 60, log)
        kill(list_processes(runs))
        job = wait_for(lambda: find_finished_job(client, unlucky), 60, log)
        assert job["state"] == "failed"
        assert job["error"] == "the training process was killed by SIGKILL, again after it was resumed"


def test_a_job_survives_the_death_of_the_server(tmp_path: Path, models: Path) -> None:
    log, runs = tmp_path / "log", tmp_path / "runs"
    with run_service(models, runs, log) as (client, server):
        job_id = submit(client, SHORT)
        checkpointed(client, job_id, runs, log)
        (child,) = list_processes(runs)
        server.kill()
        server.wait()
    os.kill(child, signal.SIGSTOP)  # the child cannot end before the next start
    with run_service(models, runs, tmp_path / "log2") as (client, server):
        assert client.get(f"/train/{job_id}").json()["state"] == "running"
        time.sleep(1)
        assert list_processes(runs) == [child]  # the job was not started again
        server.kill()
        server.wait()
    kill([child])
    with run_service(models, runs, tmp_path / "log3") as (client, _):  # both processes died: the job resumes
        assert_trained_once(client, job_id, models, tmp_path / "log3")
        assert client.get("/train").json()[0]["crashes"] == 0


def test_a_job_whose_server_dies_while_cancelling_it_ends_all_the_same(tmp_path: Path, models: Path) -> None:
    log, runs = tmp_path / "log", tmp_path / "runs"
    with run_service(models, runs, log) as (client, server):
        job_id = submit(client, LONG)
        checkpointed(client, job_id, runs, log)
        assert list_processes(runs)
        server.kill()
        server.wait()
    Run(runs / job_id).request_stop()  # the first step of a cancellation
    wait_for(lambda: not list_processes(runs), 60, log)
    with run_service(models, runs, tmp_path / "log2") as (client, _):
        wait_for(lambda: client.get(f"/train/{job_id}").json()["state"] == "cancelled", 10, tmp_path / "log2")
        assert client.get(f"/train/{job_id}").json()["crashes"] == 0
        assert not list_processes(runs)


def test_a_stopped_server_drains_first_and_its_job_goes_on_at_the_next_start(
    tmp_path: Path, models: Path, image: Path
) -> None:
    log, runs = tmp_path / "log", tmp_path / "runs"
    with run_service(models, runs, log, drain_s="600") as (client, server):
        job_id = submit(client, SHORT, **{"Idempotency-Key": "one"})
        later = submit(client, LONG)
        checkpointed(client, job_id, runs, log)
        server.terminate()
        wait_for(lambda: client.get("/health/ready").status_code == 503, 60, log)
        assert client.get("/health/live").status_code == 200
        with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as under_way:
            content = image.read_bytes()
            under_way.sendall(make_upload(len(content)) + content[:-1])
            wait_for(lambda: answers(client), 60, log)  # it answers while it drains, and has read the head by then
            server.terminate()  # a second signal ends the draining
            wait_for(lambda: not answers(client), 60, log)  # the server no longer accepts connections
            under_way.sendall(content[-1:])
            assert under_way.recv(100).startswith(b"HTTP/1.1 200 ")
        assert server.wait(60) == 0, log.read_text()
        assert not list_processes(runs)
    assert "POST /predict 200" in [json.loads(line)["message"] for line in log.read_text().splitlines()]
    log = tmp_path / "log2"
    with run_service(models, runs, log) as (client, _):
        assert submit(client, SHORT, **{"Idempotency-Key": "one"}) == job_id
        other = client.post("/train", json=LONG, headers={"Idempotency-Key": "one"})
        assert other.status_code == 422
        assert job_id in other.json()["detail"]
        assert [job["id"] for job in client.get("/train").json()] == [later, job_id]
        assert_trained_once(client, job_id, models, log)
        client.delete(f"/train/{later}").raise_for_status()


def test_of_two_servers_one_runs_the_jobs_and_the_other_takes_over(tmp_path: Path, models: Path) -> None:
    log, runs = tmp_path / "log", tmp_path / "runs"
    with (
        run_service(models, runs, log) as (one, server),
        run_service(models, runs, tmp_path / "log2") as (two, _),
    ):
        running, queued = submit(one, LONG), submit(two, LONG)
        checkpointed(two, running, runs, log)
        (child,) = list_processes(runs)
        assert [job["state"] for job in two.get("/train").json()] == ["queued", "running"]
        two.delete(f"/train/{running}").raise_for_status()  # its process is a child of the other server
        wait_for(lambda: child not in list_processes(runs), 60, log)
        wait_for(lambda: two.get(f"/train/{queued}").json()["history"], 60, log)
        server.kill()
        server.wait()
        (child,) = list_processes(runs)
        wait_for(lambda: "is still running as process" in (tmp_path / "log2").read_text(), 60, log)
        two.delete(f"/train/{queued}").raise_for_status()
        wait_for(lambda: not list_processes(runs), 60, log)
        assert {job["state"] for job in two.get("/train").json()} == {"cancelled"}
