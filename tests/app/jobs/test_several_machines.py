"""Test jobs in a database that several machines share: leases, devices, takeovers and the files of a run."""

import asyncio
from collections.abc import Callable, Collection, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from postgres import PostgresServer
from pydantic import SecretStr

from app.exceptions import Unavailable
from app.jobs.backends import WRITES
from app.jobs.database import Database
from app.jobs.evaluation_queue import EvaluationQueue, EvaluationRequest
from app.jobs.lease import LeaseKeeper
from app.jobs.queue import JobQueue, State, new_job_id
from app.jobs.run_files import restore
from app.jobs.training_queue import TrainingQueue, TrainingRequest
from app.settings import Settings
from training.run import Publication
from training.store import LocalStore

pytestmark = pytest.mark.slow

REQUEST = TrainingRequest(recipe="resnet", overrides={"epochs": 2})
EVALUATION = EvaluationRequest(model="resnet", version=1, engine="torchscript-cpu", split="zip")


@pytest.fixture
def open_database(postgres: PostgresServer, tmp_path: Path) -> Iterator[Callable[[str], Database]]:
    """Return a function that opens the database as the server of a machine, which has a runs folder of its own."""
    url, opened = SecretStr(postgres.create_database()), list[Database]()

    def open_for(machine: str) -> Database:
        database = Database(tmp_path / machine, url)
        opened.append(database)
        assert database.open()
        return database

    yield open_for
    for database in opened:
        database.close()


@pytest.fixture
def here(open_database: Callable[[str], Database]) -> TrainingQueue:
    return TrainingQueue(Settings(), open_database("here"))


@pytest.fixture
def there(open_database: Callable[[str], Database]) -> TrainingQueue:
    return TrainingQueue(Settings(), open_database("there"))


def claim(
    jobs: TrainingQueue, device: str | None, may_take_over: bool = True, working_on: Collection[str] = ()
) -> str | None:
    claimed = jobs.claim(device, may_take_over, working_on)
    return claimed[0].id if claimed else None


def move_lease(jobs: JobQueue[Any], job_id: str, seconds: float) -> None:
    """End the lease of a job a number of seconds from now, as if its runner had not renewed it."""
    with jobs.database.transaction(WRITES) as session:
        row = jobs._row(session, job_id)
        row.lease = jobs.database.now(session) + timedelta(seconds=seconds)


def test_each_device_runs_one_job_at_a_time(here: TrainingQueue, there: TrainingQueue) -> None:
    first, second = (here.submit(REQUEST).id for _ in range(2))
    assert claim(here, "gpu-0") == first
    assert claim(there, "gpu-0") is None
    assert claim(there, "gpu-1") == second
    assert there.state(first) is here.state(second) is State.RUNNING
    third = there.submit(REQUEST).id
    there.cancel(first)
    assert claim(there, "gpu-0", working_on={second}) is None  # the process of the cancelled job has not ended yet
    here.interrupt(first)
    assert claim(there, "gpu-0", working_on={second}) == third


def test_job_is_taken_over_after_its_lease_and_its_former_runner_records_nothing(
    here: TrainingQueue, there: TrainingQueue, published_store: Path
) -> None:
    job = here.submit(REQUEST).id
    assert claim(here, "gpu-0") == job
    assert claim(there, "gpu-1") is None
    move_lease(here, job, -1)
    assert claim(there, "gpu-1", may_take_over=False) is None
    assert claim(there, "gpu-1") == job
    assert (here.is_held(job), there.is_held(job)) == (False, True)
    publication = Publication(
        model="resnet", version=1, live=True, test=LocalStore(published_store).card("resnet", 1).test
    )
    here.interrupt(job, "killed")
    here.fail(job, "late")
    here.succeed(job, publication)
    assert there.get(job).state is State.RUNNING
    there.succeed(job, publication)
    assert (here.get(job).state, here.get(job).crashes) == (State.SUCCEEDED, 1)


def test_job_whose_runners_die_twice_fails(here: TrainingQueue, there: TrainingQueue) -> None:
    job = here.submit(REQUEST).id
    claim(here, "gpu-0")
    move_lease(here, job, -1)
    assert claim(there, "gpu-1") == job
    move_lease(here, job, -1)
    assert claim(here, "gpu-0") is None
    assert here.get(job).error == "the server that ran it has ended, again after it was resumed"


def test_job_that_survives_its_runner_is_followed_by_another_one_without_a_crash(
    here: TrainingQueue, there: TrainingQueue
) -> None:
    first, second = (here.submit(REQUEST).id for _ in range(2))
    assert (claim(here, None), claim(here, None)) == (first, first)  # the caller has to name the jobs it works on
    assert here.claim(None, True, {first}) is not None
    here.release(first)
    assert claim(there, None) == first
    assert here.get(first).crashes == 0
    assert here.outlived() == []
    here.cancel(second)
    assert there.outlived() == [second]
    there.record_stop(second)
    assert here.outlived() == []


def test_files_and_metrics_of_a_run_are_read_on_every_machine(here: TrainingQueue, there: TrainingQueue) -> None:
    job = here.submit(REQUEST).id
    claim(here, "gpu-0")
    run = here.run_folder(job)
    run.pictures.mkdir(parents=True)
    (run.pictures / "curves.png").write_bytes(b"a picture")
    run.output_file.write_bytes(b"x" * (2 << 20) + b"the end")
    for epoch in (1, 2):
        run.record({"event": "epoch", "epoch": epoch, "remaining_s": 1.0})
        here.push_files(job)
    seen = there.get(job)
    assert [line["epoch"] for line in seen.history] == [1, 2]
    assert seen.files == ["metrics.jsonl", "output.log", "curves.png"]
    assert there.read_file(job, "curves.png") == b"a picture"
    assert len(there.read_file(job, "output.log")) == 1 << 20
    assert there.read_file(job, "output.log").endswith(b"the end")
    assert not there.run_folder(job).path.exists()
    first = there._progress(job, 1, None)
    assert [number for number, _ in first.metrics] == [2]
    assert there._progress(job, 1, first.revision).metrics == []
    with run.output_file.open("a") as output:
        output.write("the last line")
    here.fail(job, "no luck")  # copies the last files
    assert there.read_file(job, "output.log").endswith(b"the last line")


def test_files_of_a_former_runner_are_not_copied(here: TrainingQueue, there: TrainingQueue) -> None:
    job = here.submit(REQUEST).id
    claim(here, "gpu-0")
    move_lease(here, job, -1)
    claim(there, "gpu-1")
    here.run_folder(job).path.mkdir()
    here.run_folder(job).record({"event": "tick"})
    here.push_files(job)
    assert there.files(job).names() == []


def test_run_on_another_machine_continues_the_numbers_of_its_metrics(
    here: TrainingQueue, there: TrainingQueue, finished_run: object
) -> None:
    job = here.submit(REQUEST).id
    claim(here, "gpu-0")
    run, other = here.run_folder(job), there.run_folder(job)
    run.path.mkdir()
    run.record({"event": "epoch", "epoch": 1})
    here.push_files(job)
    restore(there.database, other)
    assert list(other.metrics()) == [{"event": "epoch", "epoch": 1}]
    other.checkpoint_file.touch()
    other.record({"event": "epoch", "epoch": 2})
    restore(there.database, other)  # a run with a checkpoint is not replaced
    assert len(list(other.metrics())) == 2


def test_zip_is_left_to_the_server_that_has_received_it(open_database: Callable[[str], Database]) -> None:
    here, there = EvaluationQueue(open_database("here")), EvaluationQueue(open_database("there"))
    job = new_job_id()
    here.add(job, EVALUATION, State.QUEUED)
    assert (here.unfinished(), there.unfinished()) == ([job], [])
    move_lease(here, job, -1)
    assert there.unfinished() == [job]
    assert there.claim(job, has_zip=False) is None
    assert there.state(job) is State.QUEUED  # its server may have been restarted
    move_lease(here, job, -100)
    assert there.claim(job, has_zip=False) is None
    assert there.get(job).error == "the server that received the zip has ended; send it again"


def test_evaluation_of_a_split_is_taken_over_after_its_lease(open_database: Callable[[str], Database]) -> None:
    here, there = EvaluationQueue(open_database("here")), EvaluationQueue(open_database("there"))
    job = new_job_id()
    here.add(job, EVALUATION.model_copy(update={"split": "test"}), State.RUNNING)
    assert there.unfinished() == []
    assert there.claim(job) is None
    move_lease(here, job, -1)
    assert there.claim(job) is not None
    here.fail(job, "late")
    assert there.is_held(job)


def test_leases_are_renewed_until_the_database_fails(
    here: TrainingQueue, there: TrainingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = here.submit(REQUEST).id
    claim(here, "gpu-0")
    move_lease(here, job, -1)

    def fail(*_: object) -> None:
        raise Unavailable("no database")

    async def scenario() -> None:
        monkeypatch.setattr("app.jobs.lease._RENEWALS", 3000)
        lease = LeaseKeeper(here.database)
        assert not lease.valid
        lease.start()
        async with asyncio.timeout(60):
            while not lease.valid:  # noqa: ASYNC110  the keeper signals no event
                await asyncio.sleep(0.01)
        assert claim(there, "gpu-1") is None
        deadline = lease.deadline
        here.database.lease_s = 0.0
        async with asyncio.timeout(60):
            while not lease.may_take_over:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        monkeypatch.setattr(lease, "_renew", fail)
        async with asyncio.timeout(60):
            while lease.may_take_over:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert deadline > 0
        await lease.stop()

    asyncio.run(scenario())


def test_server_that_stalls_holds_no_thread_forever(
    here: TrainingQueue, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = here.submit(REQUEST).id
    monkeypatch.setattr("app.jobs.postgres_connection._ANSWER_S", 0.3)
    with postgres.paused(), pytest.raises(Unavailable, match="the server's log has the reason"):
        here.state(job)
    monkeypatch.undo()
    assert here.state(job) is State.QUEUED


def test_password_of_the_database_is_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("psycopg")
    database = Database(tmp_path, SecretStr("postgresql://somebody:the-secret@127.0.0.1:1/jobs"))
    assert not database.open()
    assert "the PostgreSQL database jobs on 127.0.0.1 cannot be used" in caplog.text
    assert "the-secret" not in caplog.text
    with pytest.raises(Unavailable, match="see the server's log"), database.transaction():
        pass
    database.close()
