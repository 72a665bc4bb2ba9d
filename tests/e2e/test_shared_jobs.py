"""Test two real servers with separate runs folders on one PostgreSQL database, as on two machines."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from postgres import PostgresServer, find_programs
from server import Server, wait_for
from service import TINY, find_finished_job, list_processes

from training.store import LocalStore

pytest.importorskip("psycopg")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_programs(), reason="initdb of PostgreSQL is missing"),
    pytest.mark.timeout(600),
]

LEASE_S = 10
READY_S = 300.0
LONG = {"recipe": "resnet", "overrides": {**TINY, "epochs": 500}}
SHORT = {"recipe": "resnet", "overrides": {**TINY, "epochs": 12}, "promote": "always"}


class Machines:
    """Two servers, "a" and "b", each with a runs folder of its own and the same model store and database.

    Args:
        folder: Folder of the runs folders and the logs.
        models: The model store.
        database: URL of the database.
    """

    def __init__(self, folder: Path, models: Path, database: str):
        self.runs = {name: folder / name for name in "ab"}
        self.logs = {name: folder / f"log-{name}" for name in "ab"}
        self.servers = {
            name: Server(models, self.runs[name], self.logs[name], database=database, job_lease_s=str(LEASE_S))
            for name in "ab"
        }
        self._open = ExitStack()

    def clients(self) -> list[httpx.Client]:
        """Wait until both servers are ready, and return their clients."""
        for name, server in self.servers.items():
            wait_for(lambda server=server: server.address, READY_S, self.logs[name])  # type: ignore[misc]
        return [self._open.enter_context(server.client()) for server in self.servers.values()]

    def training(self) -> dict[str, list[int]]:
        """Return the training processes of each server that has any."""
        found = {name: list_processes(runs) for name, runs in self.runs.items()}
        assert sum(map(bool, found.values())) <= 1, "two machines train at once on the same device"
        return {name: processes for name, processes in found.items() if processes}

    def runner(self) -> str:
        """Wait until a server trains, and return its name."""
        return wait_for(lambda: next(iter(self.training()), None), READY_S, self.logs["a"])

    def close(self) -> None:
        """Close the clients and kill both servers, which ends their training processes."""
        self._open.close()
        for server in self.servers.values():
            server.kill()


@pytest.fixture
def postgres_server() -> Iterator[PostgresServer]:
    """A server of its own for tests that stop it."""
    with PostgresServer() as server:
        yield server


@pytest.fixture
def machines(tmp_path: Path, models: Path, postgres_server: PostgresServer) -> Iterator[Machines]:
    machines = Machines(tmp_path, models, postgres_server.create_database())
    with ExitStack() as stack:
        stack.callback(machines.close)
        yield machines
        log = "".join(log.read_text() for log in machines.logs.values())
        assert "Traceback" not in log
        assert "secret-of-the-database" not in log


def submit(client: httpx.Client, request: dict[str, Any]) -> str:
    job_id: str = client.post("/train", json=request).raise_for_status().json()["id"]
    return job_id


def read_event_numbers(client: httpx.Client, job_id: str, count: int, after: int = 0) -> list[int]:
    numbers = list[int]()
    with client.stream("GET", f"/train/{job_id}/events", headers={"Last-Event-ID": str(after)}) as stream:
        for line in stream.iter_lines():
            if line.startswith("id: "):
                numbers.append(int(line.removeprefix("id: ")))
            if len(numbers) == count:
                break
    return numbers


def test_both_machines_show_follow_and_cancel_the_same_jobs(machines: Machines) -> None:
    a, b = machines.clients()
    first, second = submit(a, LONG), submit(b, LONG)
    runner = machines.runner()
    log = machines.logs[runner]
    shown = b if runner == "a" else a
    wait_for(lambda: len(shown.get(f"/train/{first}").json()["history"]) > 1, READY_S, log)
    job = shown.get(f"/train/{first}").json()
    assert (job["state"], job["phase"]) == ("running", "training")
    assert {"recipe.json", "metrics.jsonl", "output.log"} <= set(job["files"])
    assert len(shown.get(f"/train/{first}/files/metrics.jsonl").text.splitlines()) > 1
    assert "into" in shown.get(f"/train/{first}/files/output.log").text
    numbers = read_event_numbers(shown, first, 3)
    assert read_event_numbers(shown, first, 1, after=numbers[1]) == [numbers[2]]
    assert shown.get("/health").json()["training"] == first
    assert 'cifar100_job_progress_ratio{kind="training"}' in shown.get("/metrics").text
    assert [each["state"] for each in shown.get("/train").json()] == ["queued", "running"]
    (process,) = machines.training()[runner]
    assert "secret-of-the-database" not in Path(f"/proc/{process}/environ").read_text()
    shown.delete(f"/train/{first}").raise_for_status()
    wait_for(lambda: process not in machines.training().get(runner, []), 60, log)
    wait_for(lambda: a.get(f"/train/{second}").json()["state"] == "running", 60, log)
    a.delete(f"/train/{second}").raise_for_status()
    wait_for(lambda: not machines.training(), 60, log)
    assert {job["state"] for client in (a, b) for job in client.get("/train").json()} == {"cancelled"}


def test_job_of_a_killed_server_is_taken_over_by_the_other_one(machines: Machines, models: Path) -> None:
    a, b = machines.clients()
    job_id = submit(a, SHORT)
    runner = machines.runner()
    other, log = (b, machines.logs["b"]) if runner == "a" else (a, machines.logs["a"])
    wait_for(lambda: other.get(f"/train/{job_id}").json()["history"], READY_S, log)
    seen = max(read_event_numbers(other, job_id, 2))
    machines.servers[runner].kill()
    wait_for(lambda: not list_processes(machines.runs[runner]), 60, log)  # the training process dies with its server
    assert min(read_event_numbers(other, job_id, 1, after=seen)) > seen
    job = wait_for(lambda: find_finished_job(other, job_id), READY_S, log)
    assert (job["state"], job["crashes"]) == ("succeeded", 1), job["error"]
    assert [epoch["epoch"] for epoch in job["history"]] == list(range(1, 13))
    assert "curves.png" in job["files"]
    assert LocalStore(models).versions("resnet") == [1, job["published"]["version"]]


def test_nothing_is_lost_while_postgresql_is_stopped(machines: Machines, postgres_server: PostgresServer) -> None:
    a, b = machines.clients()
    job_id = submit(a, LONG)
    runner = machines.runner()
    log, client = machines.logs[runner], a if runner == "a" else b
    wait_for(lambda: client.get(f"/train/{job_id}").json()["history"], READY_S, log)
    (process,) = machines.training()[runner]
    postgres_server.stop()
    for each in (a, b):
        assert each.get("/train").status_code == 503
        assert each.post("/train", json=SHORT).status_code == 503
        assert each.get("/health/ready").status_code == 200
    postgres_server.start()
    wait_for(lambda: client.get("/train").status_code == 200, 60, log)
    assert machines.training() == {runner: [process]}  # a short failure does not end the process
    postgres_server.stop()
    wait_for(lambda: not list_processes(machines.runs[runner]), 60, log)  # its lease has expired
    postgres_server.start()
    again = wait_for(lambda: next(iter(machines.training().values()), None), READY_S, log)
    assert again != [process]
    job = wait_for(lambda: client.get(f"/train/{job_id}").json(), 60, log)
    assert (job["state"], job["crashes"]) == ("running", 0)
    assert client.delete(f"/train/{job_id}").json()["state"] == "cancelled"
    wait_for(lambda: not machines.training(), 60, log)


def test_stopped_server_hands_its_job_over_at_once(machines: Machines) -> None:
    a, b = machines.clients()
    job_id = submit(a, LONG)
    runner = machines.runner()
    other, log = (b, machines.logs["b"]) if runner == "a" else (a, machines.logs["a"])
    wait_for(lambda: other.get(f"/train/{job_id}").json()["history"], READY_S, log)
    assert machines.servers[runner].stop() == 0
    wait_for(lambda: list(machines.training()) not in ([], [runner]), READY_S, log)
    job = other.get(f"/train/{job_id}").json()
    assert (job["state"], job["crashes"]) == ("running", 0)
    other.delete(f"/train/{job_id}").raise_for_status()
    wait_for(lambda: not machines.training(), 60, log)


def test_evaluation_is_seen_by_the_other_machine(machines: Machines) -> None:
    a, b = machines.clients()
    done = a.post("/evaluate?limit=4").json()
    wait_for(lambda: b.get(f"/evaluate/{done['id']}").json()["state"] == "succeeded", 60, machines.logs["a"])
    shown = b.get(f"/evaluate/{done['id']}").json()
    assert (shown["done"], shown["result"]["images"]) == (4, 4)
    *_, end = b.get(f"/evaluate/{done['id']}/events").text.strip().split("\n\n")
    assert json.loads(end.partition("data: ")[2]) == shown
    assert not (machines.runs["a"] / done["id"]).exists()
