"""Test the queue and history of training jobs: stored jobs, state changes, and a database that fails."""

import asyncio
import json
import logging
import shutil
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
from fastapi.testclient import TestClient
from local_client import make_local_client, services_of
from pydantic import SecretStr

from app.clients import FairShares
from app.exceptions import BadRequest, NotFound, Unavailable
from app.jobs.backends import WRITES
from app.jobs.database import Database
from app.jobs.lease import LeaseKeeper
from app.jobs.local_executor import LocalExecutor
from app.jobs.queue import JobEvent, State
from app.jobs.training_queue import TrainingJobSummary, TrainingQueue, TrainingRequest
from app.jobs.training_runner import TrainingRunner
from app.main import create_app
from app.routes.responses import EventStream
from app.settings import Settings
from app.threads import Threads
from training.phase_report import PhaseReport
from training.recipes import make_recipe
from training.run import Publication, Run
from training.store import LocalStore

pytestmark = pytest.mark.slow

KEY = "the-secret-of-this-test"
REQUEST = TrainingRequest(recipe="resnet", overrides={"epochs": 2})


SQLITE = pytest.mark.parametrize("database_url", [None], ids=["sqlite"])
"""Mark of a test for one database, because it damages or locks the file, or starts a runner without leases."""

databases = list[Database]()
"""The databases of a test."""


def opened(runs: Path, database_url: SecretStr | None = None, **settings: Any) -> TrainingQueue:
    database = Database(runs, database_url)
    databases.append(database)
    database.open()
    return TrainingQueue(Settings(runs=runs, database=database_url, **settings), database)


@pytest.fixture(autouse=True)
def close_databases() -> Iterator[None]:
    yield
    while databases:
        databases.pop().close()


@pytest.fixture
def jobs(tmp_path: Path, database_url: SecretStr | None) -> TrainingQueue:
    return opened(tmp_path, database_url)


def make_runner(jobs: TrainingQueue, run_child: Any, monkeypatch: pytest.MonkeyPatch) -> TrainingRunner:
    """Return a runner whose training processes are replaced by a coroutine function."""
    monkeypatch.setattr(LocalExecutor, "_run_child", run_child)
    return TrainingRunner(Settings(runs=jobs.database.runs), jobs, LeaseKeeper(jobs.database), AsyncMock())


def change_recipe(jobs: TrainingQueue, job_id: str, **fields: Any) -> None:
    with jobs.database.transaction(WRITES) as session:
        row = jobs._row(session, job_id)
        row.recipe = row.recipe | fields


@contextmanager
def locked_by_a_writer(jobs: TrainingQueue) -> Iterator[None]:
    """Lock the database, like another process that writes."""
    with jobs.database.transaction(WRITES) as session:
        session.connection()
        yield


def claimed(jobs: TrainingQueue) -> TrainingJobSummary:
    found = jobs.claim()
    assert found is not None
    return found[0]


@pytest.fixture
def publication(published_store: Path) -> Publication:
    return Publication(model="resnet", version=1, live=True, test=LocalStore(published_store).card("resnet", 1).test)


def test_jobs_run_in_the_order_they_came_and_an_interrupted_one_first(jobs: TrainingQueue) -> None:
    first, second = jobs.submit(REQUEST), jobs.submit(REQUEST)
    assert claimed(jobs).id == first.id
    jobs.interrupt(first.id)
    assert jobs.state(first.id) is State.INTERRUPTED
    assert claimed(jobs).id == first.id
    jobs.fail(first.id, "no luck")
    assert claimed(jobs).id == second.id
    assert [job.id for job in jobs.newest(10)] == [second.id, first.id]
    assert [job.id for job in jobs.newest(1)] == [second.id]


def test_a_running_job_has_the_phase_of_its_latest_report(jobs: TrainingQueue, publication: Publication) -> None:
    job_id = jobs.submit(REQUEST).id
    assert jobs.get(job_id).phase is None
    claimed(jobs)
    assert jobs.get(job_id).phase == "loading"
    run = jobs.run_folder(job_id)
    run.path.mkdir()
    for report, phase in (
        (PhaseReport("features", "computing"), "features"),
        ({"event": "preparation", "epoch": 0}, "features"),  # releases up to 0.2.0 record no phase
        ({"event": "tick", "epoch": 1}, "training"),
        (PhaseReport("quantizing", "comparing", 3, 9, epoch=1), "quantizing"),
    ):
        run.record(report if isinstance(report, dict) else asdict(report))
        jobs.push_files(job_id)
        assert (jobs.get(job_id).phase, jobs.newest(1)[0].phase) == (phase, phase)
    assert (jobs.get(job_id).progress or {})["done"] == 3
    jobs.succeed(job_id, publication)
    assert jobs.get(job_id).phase is None


def test_known_files_of_a_run_are_served_and_its_log_to_operators_only(finished_run: Run, tmp_path: Path) -> None:
    settings = Settings(models=tmp_path / "models", runs=tmp_path / "runs", api_keys=(SecretStr(KEY),))
    with TestClient(create_app(settings)) as client:
        jobs = services_of(client).training_jobs
        job = jobs.submit(REQUEST)
        jobs.cancel(job.id)
        folder, url = jobs.run_folder(job.id).path, f"/train/{job.id}"
        assert client.get(url).json()["files"] == []
        shutil.copytree(finished_run.path, folder)
        (folder / "pictures").mkdir(exist_ok=True)
        (folder / "pictures" / "curves.png").write_bytes(b"a picture")
        (folder / "output.log").write_text("a traceback")
        files = client.get(url).json()["files"]
        assert files[:4] == ["recipe.json", "metrics.jsonl", "published.json", "output.log"]
        picture = client.get(f"{url}/files/curves.png")
        assert (picture.content, picture.headers["content-type"]) == (b"a picture", "image/png")
        assert client.get(f"{url}/files/recipe.json").json()["name"] == "resnet"
        for name in ("checkpoint.pt", "pictures", "..%2Frecipe.json", "stop"):
            unknown = client.get(f"{url}/files/{name}")
            assert unknown.status_code == 404, name
        assert "it has: recipe.json" in client.get(f"{url}/files/checkpoint.pt").json()["detail"]
        for name in ("output.log", "output%2Elog"):
            for method in ("GET", "HEAD"):
                assert client.request(method, f"{url}/files/{name}").status_code == 401
        log = client.get(f"{url}/files/output.log", headers={"Authorization": f"Bearer {KEY}"})
        assert log.text == "a traceback"


def test_only_a_finished_job_has_no_time_left(jobs: TrainingQueue, publication: Publication) -> None:
    job_id = jobs.submit(REQUEST).id
    claimed(jobs)
    run = jobs.run_folder(job_id)
    run.path.mkdir()
    run.record({"event": "epoch", "epoch": 2, "remaining_s": 1.5})
    jobs.push_files(job_id)
    assert jobs.get(job_id).progress == {"event": "epoch", "epoch": 2, "remaining_s": 1.5}
    jobs.succeed(job_id, publication)
    assert jobs.get(job_id).progress == {"event": "epoch", "epoch": 2, "remaining_s": 0}


@SQLITE
def test_cancelling_asks_the_process_of_a_running_job_to_stop(jobs: TrainingQueue) -> None:
    running, queued = jobs.submit(REQUEST), jobs.submit(REQUEST)
    claimed(jobs)
    for job in (running, queued):
        assert jobs.cancel(job.id).state is State.CANCELLED
    assert jobs.run_folder(running.id).stop_file.exists()
    assert not jobs.run_folder(queued.id).path.exists()


@SQLITE
def test_a_running_job_that_cannot_be_told_to_stop_goes_on(jobs: TrainingQueue) -> None:
    job_id = jobs.submit(REQUEST).id
    claimed(jobs)
    jobs.run_folder(job_id).path.write_text("a file, not a folder")
    with pytest.raises(Unavailable, match="cannot be used"):
        jobs.cancel(job_id)
    assert jobs.state(job_id) is State.RUNNING


def test_versions_that_waiting_jobs_learn_from_are_needed(
    published_store: Path, tmp_path: Path, database_url: SecretStr | None
) -> None:
    jobs = opened(tmp_path, database_url, models=published_store)
    assert jobs.required_versions("resnet") == set()
    job = jobs.submit(TrainingRequest(recipe="resnet", overrides={"weights": "resnet/1", "width": 8}))
    jobs.submit(TrainingRequest(recipe="resnet18", overrides={"teacher": "resnet/1"}))
    assert jobs.required_versions("resnet") == {1}
    assert jobs.required_versions("resnet18") == set()
    jobs.cancel(job.id)
    assert jobs.required_versions("resnet") == {1}


def test_a_job_keeps_its_recipe_whatever_the_defaults_become(
    jobs: TrainingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.submit(REQUEST)
    monkeypatch.setattr("training.recipes.RECIPES", {})
    found = jobs.claim()
    assert found is not None
    monkeypatch.undo()
    assert found[1] == make_recipe("resnet", {"epochs": 2})


def test_a_job_whose_recipe_this_release_does_not_know_fails(
    jobs: TrainingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign, own = jobs.submit(REQUEST), jobs.submit(REQUEST)
    change_recipe(jobs, foreign.id, unheard_of=1)
    assert jobs.claim() is None
    assert jobs.get(foreign.id).state is State.FAILED
    assert "unheard_of" in (jobs.get(foreign.id).error or "")
    assert claimed(jobs).id == own.id


def test_a_job_of_a_recipe_that_is_no_more_fails(jobs: TrainingQueue) -> None:
    job = jobs.submit(REQUEST)
    change_recipe(jobs, job.id, name="vgg")
    assert jobs.claim() is None
    assert "no recipe 'vgg'" in (jobs.get(job.id).error or "")


@SQLITE
def test_a_job_whose_folder_is_damaged_fails_and_the_next_one_runs(
    jobs: TrainingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def child(*_: object) -> int:
        await asyncio.sleep(60)
        return 0

    async def scenario() -> None:
        damaged, job = jobs.submit(REQUEST), jobs.submit(REQUEST)
        run = jobs.run_folder(damaged.id)
        run.path.mkdir()
        run.publication_file.write_text("{")
        runner = make_runner(jobs, child, monkeypatch)
        runner.start()
        async with asyncio.timeout(60):
            while jobs.running() != job.id:  # noqa: ASYNC110  the database signals no event
                await asyncio.sleep(0.05)
        await runner.stop()
        assert jobs.state(damaged.id) is State.FAILED
        assert "published.json is damaged" in (jobs.get(damaged.id).error or "")

    asyncio.run(scenario())


@SQLITE
def test_a_runner_that_is_stopped_ends_even_if_it_cannot_note_so(
    jobs: TrainingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        started = asyncio.Event()

        async def child(*_: object) -> int:
            started.set()
            await asyncio.sleep(60)
            return 0

        def full(*_: object) -> None:
            raise Unavailable("the disk is full")

        job = jobs.submit(REQUEST)
        runner = make_runner(jobs, child, monkeypatch)
        monkeypatch.setattr(jobs, "interrupt", full)
        runner.start()
        await asyncio.wait_for(started.wait(), 10)
        await asyncio.wait_for(runner.stop(), 10)
        assert jobs.state(job.id) is State.RUNNING  # the next start claims this job first

    asyncio.run(scenario())


@SQLITE
def test_only_so_many_clients_follow_events(jobs: TrainingQueue, tmp_path: Path) -> None:
    with make_local_client(create_app(Settings(models=tmp_path, runs=tmp_path, max_event_streams=1))) as client:
        job = jobs.submit(REQUEST)
        jobs.cancel(job.id)
        assert client.get(f"/train/{job.id}/events").text.startswith("event: end")
        assert services_of(client).event_streams.total == 0
        services_of(client).event_streams.add("another client", 1)
        refused = client.get(f"/train/{job.id}/events")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")


def test_one_address_cannot_take_every_event_stream() -> None:
    streams = FairShares(100)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def follow(address: str) -> None:
        async def events() -> AsyncIterator[JobEvent | None]:
            yield JobEvent(None, "end", "{}")

        scope = {"type": "http", "client": (address, 1), "asgi": {"spec_version": "2.4"}}
        await EventStream(streams, events())(scope, AsyncMock(), send)

    streams.add("10.0.0.1", 75)
    with pytest.raises(Unavailable, match="75 clients"):
        asyncio.run(follow("10.0.0.1"))
    assert not sent
    asyncio.run(follow("10.0.0.2"))
    assert sent[1]["body"] == b"event: end\ndata: {}\n\n"
    assert streams.total == 75


@SQLITE
def test_who_follows_events_is_let_go_when_the_service_stops(jobs: TrainingQueue, tmp_path: Path) -> None:
    job = jobs.submit(REQUEST)
    with make_local_client(create_app(Settings(models=tmp_path, runs=tmp_path))) as client:
        client.app.state.services.draining = True  # type: ignore[attr-defined]
        answer = client.get(f"/train/{job.id}/events")
        assert (answer.text, answer.headers["x-accel-buffering"]) == ("", "no")


def test_what_was_asked_for_is_kept_as_it_was_understood(jobs: TrainingQueue) -> None:
    asked = TrainingRequest(recipe="resnet18", overrides={"epochs": "3", "seed": False, "trainable": "layer4,fc"})
    understood = {"epochs": 3, "seed": 0, "trainable": ["layer4", "fc"]}
    assert jobs.submit(asked, "key").request.overrides == understood
    assert jobs.submit(asked.model_copy(update={"overrides": understood}), "key").id == jobs.newest(1)[0].id


def test_everything_is_still_known_after_a_restart(
    jobs: TrainingQueue, publication: Publication, tmp_path: Path, database_url: SecretStr | None
) -> None:
    done, waiting = jobs.submit(REQUEST, "key"), jobs.submit(REQUEST)
    claimed(jobs)
    jobs.succeed(done.id, publication)
    jobs.database.close()
    again = opened(tmp_path, database_url)
    job = again.get(done.id)
    assert (job.state, job.published, job.request) == (State.SUCCEEDED, publication, REQUEST)
    assert job.started is not None
    assert job.finished is not None
    assert job.created <= job.started <= job.finished
    assert again.submit(REQUEST, "key").id == done.id
    assert claimed(again).id == waiting.id


@SQLITE
def test_what_a_dead_server_left_running_is_claimed_first(jobs: TrainingQueue, tmp_path: Path) -> None:
    first, _ = jobs.submit(REQUEST), jobs.submit(REQUEST)
    claimed(jobs)
    assert jobs.running() == first.id
    assert claimed(opened(tmp_path)).id == first.id


def test_a_crash_is_forgiven_once_and_a_stop_always(jobs: TrainingQueue) -> None:
    job = jobs.submit(REQUEST)
    for crash in (None, "killed", None):
        claimed(jobs)
        jobs.interrupt(job.id, crash)
        assert jobs.state(job.id) is State.INTERRUPTED
    claimed(jobs)
    jobs.interrupt(job.id, "killed")
    failed = jobs.get(job.id)
    assert (failed.state, failed.error, failed.crashes) == (State.FAILED, "killed, again after it was resumed", 1)
    assert jobs.claim() is None


def test_a_finished_job_stays_as_it_is(jobs: TrainingQueue, publication: Publication) -> None:
    job = jobs.submit(REQUEST)
    cancelled = jobs.cancel(job.id)
    assert cancelled.state is State.CANCELLED
    jobs.fail(job.id, "late")
    jobs.interrupt(job.id, "late")
    assert jobs.cancel(job.id) == cancelled
    jobs.succeed(job.id, publication)  # it published before it could be stopped
    assert jobs.get(job.id) == cancelled.model_copy(update={"published": publication})
    assert jobs.claim() is None


def test_the_same_key_gives_the_same_job_and_with_another_request_an_error(jobs: TrainingQueue) -> None:
    job = jobs.submit(REQUEST, "key")
    assert jobs.submit(REQUEST, "key") == job
    with pytest.raises(BadRequest, match=job.id):
        jobs.submit(TrainingRequest(recipe="resnet"), "key")
    assert jobs.submit(REQUEST, "other").id != job.id
    assert jobs.submit(REQUEST).id != jobs.submit(REQUEST).id


def test_requests_with_one_key_at_the_same_time_give_one_job(tmp_path: Path, database_url: SecretStr | None) -> None:
    """Each request uses its own database connection, like separate server processes."""
    found: list[str] = []
    queues = [opened(tmp_path, database_url) for _ in range(8)]

    def submit(jobs: TrainingQueue) -> None:
        found.append(jobs.submit(REQUEST, "key").id)

    threads = [threading.Thread(target=submit, args=(jobs,)) for jobs in queues]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_a_full_queue_refuses_and_a_cancelled_job_makes_room(tmp_path: Path, database_url: SecretStr | None) -> None:
    jobs = opened(tmp_path, database_url, max_jobs=2)
    first = jobs.submit(REQUEST)
    jobs.submit(REQUEST, "key")
    with pytest.raises(Unavailable, match="2 jobs are waiting"):
        jobs.submit(REQUEST)
    assert jobs.submit(REQUEST, "key")  # the queue already has this job
    jobs.cancel(first.id)
    jobs.submit(REQUEST)


@pytest.mark.parametrize("call", [TrainingQueue.get, TrainingQueue.cancel, TrainingQueue.state])
def test_an_unknown_job_is_not_found(jobs: TrainingQueue, call: object) -> None:
    for job_id in ("../x", "a\0b", "missing"):
        with pytest.raises(NotFound):
            call(jobs, job_id)  # type: ignore[operator]


def test_without_a_runs_folder_there_is_no_training_but_everything_else(models: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file, not a folder")
    with make_local_client(create_app(Settings(models=models, runs=tmp_path / "runs", data="synthetic:4"))) as client:
        assert client.get("/health").json()["training"] is None
        assert client.get("/health/ready").status_code == 200
        for answer in (client.post("/train", json={"recipe": "resnet"}), client.get("/train"), client.get("/train/x")):
            assert answer.status_code == 503
            assert "jobs are unavailable" in answer.json()["detail"]


def test_without_a_readable_database_there_is_no_training_but_everything_else(models: Path, tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite").write_bytes(b"garbage" * 1000)
    with make_local_client(create_app(Settings(models=models, runs=tmp_path, data="synthetic:4"))) as client:
        assert client.get("/health/ready").status_code == 200
        assert client.get("/train").status_code == 503


@SQLITE
def test_a_database_that_is_damaged_later_makes_training_unavailable(jobs: TrainingQueue) -> None:
    jobs.submit(REQUEST)
    jobs.database.close()
    database = jobs.run_folder("jobs.sqlite").path
    database.with_name("jobs.sqlite-wal").unlink(missing_ok=True)
    database.write_bytes(b"garbage" * 1000)
    with pytest.raises(Unavailable, match="cannot be used"):
        jobs.newest(1)
    assert jobs.running() is None


def test_several_servers_may_start_at_once(tmp_path: Path, database_url: SecretStr | None) -> None:
    for number in range(1 if database_url else 5):
        (folder := tmp_path / str(number)).mkdir()
        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(lambda _: opened(folder, database_url).newest(1) == [], range(8)))


def test_the_database_of_a_newer_release_is_left_alone(
    jobs: TrainingQueue, tmp_path: Path, database_url: SecretStr | None
) -> None:
    with jobs.database.transaction(WRITES) as session:
        jobs.database.backend.write_version(session.connection(), 99)
    jobs = opened(tmp_path, database_url)
    with pytest.raises(Unavailable, match="jobs are unavailable"):
        jobs.submit(REQUEST)


def test_reader_does_not_wait_for_a_writer_and_a_writer_is_refused_soon(jobs: TrainingQueue) -> None:
    job = jobs.submit(REQUEST)
    with locked_by_a_writer(jobs):
        assert [each.id for each in jobs.newest(10)] == [job.id]
        assert jobs.get(job.id).state is State.QUEUED
        assert jobs.running() is None
        for write in (lambda: jobs.submit(REQUEST), lambda: jobs.cancel(job.id), jobs.claim):
            with pytest.raises(Unavailable, match="try again later"):
                write()
    jobs.cancel(job.id)
    with locked_by_a_writer(jobs):
        assert jobs.claim() is None  # an empty queue takes no lock


def test_more_readers_than_connections_in_the_pool_are_answered(jobs: TrainingQueue) -> None:
    """The default pool of SQLAlchemy has 15 connections and raises a different error after 30 s."""
    job = jobs.submit(REQUEST)
    barrier = threading.Barrier(40, timeout=30)

    def read(_: int) -> State:
        with jobs._transaction() as session:
            state = jobs._row(session, job.id).state
            barrier.wait()
        return State(state)

    with ThreadPoolExecutor(40) as threads:
        assert set(threads.map(read, range(40))) == {State.QUEUED}


def test_database_that_does_not_answer_holds_up_jobs_only(models: Path, tmp_path: Path) -> None:
    gate = threading.Event()
    with make_local_client(create_app(Settings(models=models, runs=tmp_path / "runs", data="synthetic:4"))) as client:
        services = services_of(client)
        running = services.training_jobs.submit(REQUEST)
        services.training_jobs._running = running.id

        def stall(*_: object) -> None:
            gate.wait(60)

        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(60) as readers:
            services.database.threads = Threads("the job database", 2, max_waiting=30, patience_s=0.5)
            patch.setattr(services.training_jobs, "newest", stall)
            patch.setattr(services.training_jobs, "_running_id", stall)
            answers = [readers.submit(client.get, "/train") for _ in range(60)]
            try:
                assert client.get("/").status_code == 200
                assert client.get("/static/main.js").status_code == 200
                assert [model["live"] for model in client.get("/models").json()] == [1]
                large = client.post("/predict", files={"file": bytes(2_000_000)})
                assert large.status_code == 415
                health = client.get("/health").json()
                assert (health["status"], health["training"]) == ("ready", running.id)
                for answer in answers:
                    assert answer.result(30).status_code == 503
                    assert answer.result().headers["retry-after"] == "1"
            finally:
                gate.set()


def test_follower_of_events_outlasts_a_database_that_cannot_be_read(
    jobs: TrainingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> list[JobEvent | None]:
        job = jobs.submit(REQUEST)
        right, failures = TrainingQueue._progress, 3

        def progress(*arguments: Any) -> Any:
            nonlocal failures
            failures -= 1
            if failures == 1:
                raise OSError(24, "Too many open files")
            if failures >= 0:
                raise Unavailable("database is locked")
            jobs.cancel(job.id)
            return right(*arguments)

        monkeypatch.setattr("app.jobs.queue._EVENT_POLL_S", 0.01)
        monkeypatch.setattr(TrainingQueue, "_progress", progress)
        return [event async for event in jobs.events(job.id, 0, lambda: False)]

    (end,) = asyncio.run(scenario())
    assert end
    assert (end.number, end.name) == (None, "end")
    assert json.loads(end.data)["state"] == "cancelled"


@SQLITE
def test_outcome_of_a_job_is_noted_once_the_database_can_be_written(
    jobs: TrainingQueue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def scenario() -> None:
        job = jobs.submit(REQUEST)
        starts, failures = 0, 3
        right = jobs.fail

        async def child(*_: object) -> int:
            nonlocal starts
            starts += 1
            jobs.run_folder(job.id).path.mkdir(exist_ok=True)
            (jobs.run_folder(job.id).path / "output.log").write_text("error: no luck")
            return 1

        def fail(*arguments: Any) -> None:
            nonlocal failures
            failures -= 1
            if failures >= 0:
                raise Unavailable("database is locked")
            right(*arguments)

        runner = make_runner(jobs, child, monkeypatch)
        monkeypatch.setattr(jobs, "fail", fail)
        monkeypatch.setattr("app.jobs.queue._RETRY_S", 0.01)
        runner.start()
        async with asyncio.timeout(60):
            while not jobs.state(job.id).finished:  # noqa: ASYNC110  the database signals no event
                await asyncio.sleep(0.01)
        await runner.stop()
        assert (starts, jobs.get(job.id).error) == (1, "no luck")

    asyncio.run(scenario())
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == ["the outcome of a training job cannot be recorded yet: database is locked"]


def test_training_becomes_available_once_its_folder_can_be_used(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.jobs.training_runner._LOCK_POLL_S", 0.01)
    (tmp_path / "runs").write_text("a file, not a folder")
    with make_local_client(create_app(Settings(models=models, runs=tmp_path / "runs", data="synthetic:4"))) as client:
        assert client.get("/train").status_code == 503
        (tmp_path / "runs").unlink()
        end = time.monotonic() + 60
        while client.get("/train").status_code == 503:
            assert time.monotonic() < end
        assert client.get("/train").json() == []


@SQLITE
def test_rows_that_an_earlier_release_kept_without_a_bound_are_shortened(jobs: TrainingQueue, tmp_path: Path) -> None:
    waiting, done = jobs.submit(REQUEST), jobs.submit(REQUEST)
    jobs.cancel(done.id)
    teacher = ",".join(["resnet/1"] * 100_000)
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as database, database:
        changes = "request = json_set(request, '$.overrides.teacher', ?), recipe = json_set(recipe, '$.teacher', ?)"
        database.execute(f"UPDATE jobs SET {changes}, error = ?", (teacher, teacher, "x" * 1_000_000))  # noqa: S608
    jobs.database.close()
    again = opened(tmp_path)
    assert sum(len(job.model_dump_json()) for job in again.newest(10)) < 10_000
    assert again.get(done.id).request.overrides["epochs"] == 2
    assert again.claim() is None
    failed = again.get(waiting.id)
    assert failed.state is State.FAILED
    assert "teacher" in (failed.error or "")


def test_job_that_does_not_fit_into_the_machine_is_refused_unless_it_is_known(
    jobs: TrainingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = TrainingRequest(recipe="resnet", overrides={"width": 128, "batch_size": 1024, "precision": "float32"})
    monkeypatch.setattr("training.resources.available_memory", lambda: 40_000_000_000)
    known = jobs.submit(large, "key")
    monkeypatch.setattr("training.resources.available_memory", lambda: 4_000_000_000)
    with pytest.raises(
        BadRequest, match=r"about 1\d\.\d GB of memory, and 4\.0 GB are available; lower batch_size=1024"
    ):
        jobs.submit(large)
    assert jobs.submit(large, "key") == known
    claimed(jobs)
    monkeypatch.setattr("training.run.Run.holder", lambda *_, **__: 4711)
    monkeypatch.setattr("training.resources.resident_memory", {4711: 30_000_000_000}.__getitem__)
    jobs.submit(large)  # the running job frees its memory before this one starts
