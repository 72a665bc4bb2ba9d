"""Test the overview of the job database: counts, progress of running jobs, and the latest results."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app.jobs.backends import WRITES
from app.jobs.database import Database
from app.jobs.overview import MeasuredAccuracy, read_overview
from app.jobs.queue import State
from app.jobs.rows import EVALUATION, TRAINING, JobRow
from training.run import Run

NOW = datetime.now(UTC)
RECIPE = {"epochs": 8, "finetune_epochs": 2}


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path)
    assert database.open()
    yield database
    database.close()


def add(database: Database, job_id: str, kind: str, state: State, ran_s: float = 0, **fields: Any) -> Run:
    """Add a job that has started `ran_s` seconds ago. Return its run."""
    columns: dict[str, Any] = {"request": {}, "recipe": RECIPE, "crashes": 0, "created": NOW}
    columns |= {"started": NOW - timedelta(seconds=ran_s), "finished": NOW if state.finished else None}
    with database.transaction(WRITES) as session:
        session.add(JobRow(id=job_id, kind=kind, state=state, **columns | fields))
    run = Run(database.runs / job_id)
    run.path.mkdir()
    return run


def test_jobs_are_counted_by_kind_and_state(database: Database) -> None:
    assert read_overview(database).counts == {}
    add(database, "1", TRAINING, State.SUCCEEDED, ran_s=60)
    add(database, "2", TRAINING, State.SUCCEEDED, ran_s=90, finished=NOW + timedelta(seconds=1))
    add(database, "3", EVALUATION, State.QUEUED)
    overview = read_overview(database)
    assert overview.counts == {(TRAINING, State.SUCCEEDED): 2, (EVALUATION, State.QUEUED): 1}
    assert overview.running == {}
    assert overview.succeeded == {TRAINING: (NOW + timedelta(seconds=1), 91)}


def test_progress_of_a_training_job_follows_its_reports(database: Database) -> None:
    run = add(database, "1", TRAINING, State.RUNNING, ran_s=60)
    tick = {"event": "tick", "phase": "training", "epoch": 3, "step": 5, "steps": 10, "remaining_s": 70.0}
    features = {"event": "phase", "phase": "features", "epoch": 0, "remaining_s": 9.0}
    epoch = {"event": "epoch", "phase": "training", "epoch": 3, "remaining_s": 60.0}
    export = {"event": "phase", "phase": "measuring", "epoch": 10, "remaining_s": 2.0}
    old = {"event": "preparation", "done": 3}  # written by release 0.2.0
    expected = [
        (None, ("loading", 0, None)),
        (old, ("features", 0, None)),
        (features, ("features", 0, None)),
        (tick, ("training", 0.25, 70)),
        (epoch, ("training", 0.3, 60)),
        (export, ("measuring", 1, None)),
    ]
    for report, progress in expected:
        if report:
            run.record(report)
        job = read_overview(database).running[TRAINING]
        assert (job.phase, job.progress, job.remaining_s) == progress
        assert 60 <= job.elapsed_s <= 61 + (datetime.now(UTC) - NOW).total_seconds()


def test_progress_of_evaluations_is_that_of_the_oldest(database: Database) -> None:
    oldest = add(database, "1", EVALUATION, State.RUNNING, recipe={})
    add(database, "2", EVALUATION, State.RUNNING, recipe={})
    oldest.record({"event": "tick", "phase": "measuring", "done": 30, "images": 40})
    job = read_overview(database).running[EVALUATION]
    assert (job.phase, job.progress, job.remaining_s) == ("measuring", 0.75, None)


def test_accuracy_is_that_of_the_latest_evaluation_of_all_images(database: Database) -> None:
    for number, (version, split, limit, top1) in enumerate(
        [(1, "test", None, 0.5), (2, "test", None, 0.6), (2, "test", 10, 0.9), (1, "zip", None, 0.7)]
    ):
        request = {"model": "resnet", "version": version, "engine": "e", "split": split, "limit": limit}
        add(database, str(number), EVALUATION, State.SUCCEEDED, request=request, result={"top1": top1})
    measured = read_overview(database).accuracies
    assert sorted(measured) == [MeasuredAccuracy("resnet", 1, "zip", 0.7), MeasuredAccuracy("resnet", 2, "test", 0.6)]
