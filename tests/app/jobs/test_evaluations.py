"""Test evaluation jobs: their lane of the queue, restarts, crashes, cancelling, and databases of earlier releases."""

import asyncio
import io
import json
import sqlite3
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from local_client import make_local_client
from PIL import Image

from app.exceptions import Unavailable
from app.jobs import labeled_images
from app.jobs.database import Database
from app.jobs.evaluation_queue import MAX_UNFINISHED, EvaluationQueue, EvaluationRequest, EvaluationResult
from app.jobs.evaluation_runner import ZIP
from app.jobs.queue import State, new_job_id
from app.jobs.training_queue import TrainingQueue
from app.main import create_app
from app.settings import Settings
from training.recipes import make_recipe
from training.store import Evaluation

pytestmark = pytest.mark.slow

REQUEST = EvaluationRequest(model="resnet", version=1, engine="torchscript-cpu", split="test")
RESULT = EvaluationResult(images=2, top1=0.5, top5=1, loss=1, ece=0.1, per_class=[0.5] * 4)

# The table of release 0.1.0 with one finished training job.
SCHEMA_1 = """
CREATE TABLE jobs (
    sequence INTEGER NOT NULL, id VARCHAR NOT NULL, idempotency_key VARCHAR, state VARCHAR NOT NULL,
    request JSON NOT NULL, recipe JSON NOT NULL, created DATETIME NOT NULL, started DATETIME, finished DATETIME,
    crashes INTEGER NOT NULL, error VARCHAR, published JSON,
    PRIMARY KEY (sequence), UNIQUE (id), UNIQUE (idempotency_key)
);
CREATE INDEX ix_jobs_state ON jobs (state);
INSERT INTO jobs VALUES (1, 'old-training', 'key', 'failed', '{"recipe": "resnet", "overrides": {"epochs": 2}}',
    '{"epochs": 2, "finetune_epochs": 0}', '2026-11-01 10:00:00.000000', NULL, NULL, 1, 'no luck', NULL);
PRAGMA user_version = 1;
"""

# The table of the release after 0.1.0, with the same job.
SCHEMA_2 = (
    SCHEMA_1
    + """
ALTER TABLE jobs ADD COLUMN kind VARCHAR NOT NULL DEFAULT 'training';
ALTER TABLE jobs ADD COLUMN result JSON;
UPDATE jobs SET state = 'interrupted';
PRAGMA user_version = 2;
"""
)


class Gate:
    """A replacement for reading the images of an evaluation. It waits until the gate is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.opened = threading.Event()
        self.entered = 0
        read = labeled_images.read_split

        def wait(*arguments: Any) -> Any:
            self.entered += 1
            assert self.opened.wait(60)
            return read(*arguments)

        monkeypatch.setattr("app.jobs.evaluation_runner.read_split", wait)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


@pytest.fixture
def settings(models: Path, tmp_path: Path) -> Settings:
    return Settings(models=models, runs=tmp_path / "runs", data="synthetic:4", evaluate_wait_s=0)


@contextmanager
def opened(runs: Path) -> Iterator[EvaluationQueue]:
    runs.mkdir(exist_ok=True)
    database = Database(runs)
    database.open()
    yield EvaluationQueue(database)
    database.close()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def finish(client: TestClient, job_id: str) -> dict[str, Any]:
    """Wait until a job has finished and return it."""
    until(lambda: State(client.get(f"/evaluate/{job_id}").json()["state"]).finished)
    return cast(dict[str, Any], client.get(f"/evaluate/{job_id}").json())


def zipped(name: str) -> bytes:
    image, archive = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (32, 32)).save(image, "PNG")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(name, image.getvalue())
    return archive.getvalue()


def test_evaluations_have_a_lane_of_their_own_and_a_bound(settings: Settings, gate: Gate) -> None:
    with make_local_client(create_app(settings)) as client:
        jobs = [client.post("/evaluate?limit=4") for _ in range(MAX_UNFINISHED)]
        assert [job.status_code for job in jobs] == [202] * MAX_UNFINISHED
        assert sorted(job.json()["state"] for job in jobs) == ["queued"] * 4 + ["running"] * 4
        refused = client.post("/evaluate?limit=4")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert len(client.get("/evaluate/jobs").json()) == MAX_UNFINISHED
        assert client.get("/train").json() == []
        assert client.get(f"/train/{jobs[0].json()['id']}").status_code == 404
        gate.opened.set()
        for job in jobs:
            done = finish(client, job.json()["id"])
            assert (done["state"], done["done"], done["result"]["images"]) == ("succeeded", 4, 4)


def test_an_evaluation_that_the_service_stops_is_measured_at_the_next_start(settings: Settings, gate: Gate) -> None:
    with make_local_client(create_app(settings)) as client:
        job = client.post("/evaluate?limit=4").json()
        until(lambda: gate.entered == 1)
        threading.Timer(0.2, gate.opened.set).start()  # the thread that reads cannot be interrupted
    with opened(settings.runs) as queue:
        assert queue.state(job["id"]) is State.INTERRUPTED
    with make_local_client(create_app(settings)) as client:
        assert finish(client, job["id"])["result"]["images"] == 4


def test_the_zip_is_kept_until_its_evaluation_has_finished(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, read = threading.Event(), labeled_images.read_zip

    def wait(_: Settings, __: Any, ___: list[str], stop_event: threading.Event) -> Any:
        entered.set()
        assert stop_event.wait(60)
        raise Unavailable("the evaluation was stopped")

    monkeypatch.setattr("app.jobs.evaluation_runner.read_zip", wait)
    with make_local_client(create_app(settings)) as client:
        job = client.post("/evaluate", files={"file": zipped("red_disc/1.png")}).json()
        assert entered.wait(60)
    file = settings.runs / job["id"] / ZIP
    assert file.exists()
    monkeypatch.setattr("app.jobs.evaluation_runner.read_zip", read)
    with make_local_client(create_app(settings)) as client:
        assert finish(client, job["id"])["result"]["images"] == 1
        until(lambda: not file.exists())


def test_an_evaluation_of_a_server_that_died_is_measured_again_once(settings: Settings) -> None:
    with opened(settings.runs) as queue:
        left, again = new_job_id(), new_job_id()
        for job_id in (left, again):
            queue.run_folder(job_id).path.mkdir()
            queue.add(job_id, REQUEST.model_copy(update={"limit": 4}), State.RUNNING)
        assert queue.claim(again)
    with make_local_client(create_app(settings)) as client:
        assert finish(client, left)["state"] == "succeeded"
        failed = finish(client, again)
        assert (failed["state"], failed["error"]) == (
            "failed",
            "the server that ran it has ended, again after it was resumed",
        )


def test_an_evaluation_that_another_server_runs_is_left_to_it(settings: Settings) -> None:
    with opened(settings.runs) as queue:
        job_id = new_job_id()
        queue.run_folder(job_id).path.mkdir()
        queue.add(job_id, REQUEST, State.RUNNING)
        with queue.run_folder(job_id).lock_for_child(), make_local_client(create_app(settings)) as client:
            services = cast(FastAPI, client.app).state.services
            cast(Any, client).portal.call(services.evaluations._take_waiting_jobs)
            assert client.get(f"/evaluate/{job_id}").json()["state"] == "running"
            assert not services.evaluations._tasks


@pytest.mark.parametrize("state", ["running", "queued"])
def test_an_evaluation_can_be_cancelled(settings: Settings, gate: Gate, state: str) -> None:
    with make_local_client(create_app(settings)) as client:
        jobs = [client.post("/evaluate?limit=4").json() for _ in range(5)]
        job = next(job for job in jobs if job["state"] == state)
        assert client.delete(f"/evaluate/{job['id']}").json()["state"] == "cancelled"
        gate.opened.set()
        others = [finish(client, other["id"])["state"] for other in jobs if other is not job]
        assert others == ["succeeded"] * 4
        assert finish(client, job["id"])["state"] == "cancelled"
        assert client.delete("/evaluate/none").status_code == 404


def test_an_evaluation_is_cancelled_by_another_server(
    settings: Settings, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.jobs.evaluation_runner._PROGRESS_S", 0.01)
    with make_local_client(create_app(settings)) as client:
        services = cast(FastAPI, client.app).state.services
        busy = threading.Event()

        async def wait(_: Any) -> Any:
            busy.set()
            await asyncio.sleep(60)

        monkeypatch.setattr(services.pool.live()["resnet"].batcher, "run", wait)
        job = client.post("/evaluate?limit=4").json()
        gate.opened.set()
        assert busy.wait(60)
        with opened(settings.runs) as queue:
            queue.cancel(job["id"])
        until(lambda: not services.evaluations._tasks)
        assert client.get(f"/evaluate/{job['id']}").json()["state"] == "cancelled"


def test_the_events_of_an_evaluation_end_with_the_result(settings: Settings) -> None:
    with make_local_client(create_app(settings)) as client:
        job = client.post("/evaluate?limit=4").json()
        done = finish(client, job["id"])
        *_, tick, end = client.get(f"/evaluate/{job['id']}/events").text.strip().split("\n\n")
        assert json.loads(tick.partition("data: ")[2]) == {
            "event": "tick",
            "phase": "measuring",
            "done": 4,
            "images": 4,
        }
        assert json.loads(end.partition("data: ")[2]) == done


def test_the_last_100_finished_evaluations_are_kept(tmp_path: Path) -> None:
    with opened(tmp_path) as queue:
        ids = []
        for number in range(103):
            job_id = f"evaluation-{number}"
            ids.append(job_id)
            queue.run_folder(job_id).path.mkdir()
            queue.add(job_id, REQUEST, State.QUEUED)
            queue.succeed(job_id, "engine", RESULT)
        waiting = new_job_id()
        queue.add(waiting, REQUEST, State.QUEUED)
        queue.prune()
        assert [job.id for job in queue.newest(1000)] == [waiting, *ids[:2:-1]]
        assert {path.name for path in tmp_path.glob("evaluation-*")} == set(ids[3:])


def test_the_database_of_an_earlier_release_is_migrated(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as database:
        database.executescript(SCHEMA_1)
    folder = tmp_path / "evaluations"
    folder.mkdir()
    saved = {"id": "0123456789ab", "state": "succeeded", "model": "resnet", "version": 1, "engine": "openvino-cpu"}
    saved |= {"split": "test", "created": "2026-11-01T10:00:00Z", "done": 2, "error": None}
    done = saved | {"result": RESULT.model_dump(include=set(Evaluation.model_fields))}
    running = saved | {"id": "ba9876543210", "state": "running", "split": None, "result": None}
    for each in (done, running):
        (folder / f"{each['id']}.json").write_text(json.dumps(each))
    (folder / "damaged.json").write_text("{")
    for _ in range(2):
        with opened(tmp_path) as queue:
            training = TrainingQueue(Settings(runs=tmp_path), queue.database)
            (job,) = training.newest(10)
            assert (job.id, job.state, job.error) == ("old-training", State.FAILED, "no luck")
            assert training.get("old-training").epochs == 2
            evaluated = queue.get("0123456789ab")
            assert (evaluated.state, evaluated.result, evaluated.done) == (State.SUCCEEDED, RESULT, 2)
            assert queue.get("ba9876543210").state is State.FAILED
            assert not folder.exists()


def test_job_of_schema_2_is_resumed(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as database:
        database.executescript(SCHEMA_2)
        recipe = make_recipe("resnet", {"epochs": 2}).model_dump_json()
        database.execute("UPDATE jobs SET recipe = ?", (recipe,))
        database.commit()
    for _ in range(2):
        with opened(tmp_path) as queue:
            claimed = TrainingQueue(Settings(runs=tmp_path), queue.database).claim("cpu")
            assert claimed is not None
            assert (claimed[0].id, claimed[0].state, claimed[0].crashes) == ("old-training", State.RUNNING, 1)
