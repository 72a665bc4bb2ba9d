"""Sum up the job database for the metrics: the jobs by state, the running ones, and the latest results.

In: the rows of all jobs, and the latest report of each running one.  Out: a `JobOverview`.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.jobs.database import Database
from app.jobs.queue import State
from app.jobs.rows import EVALUATION, TRAINING, JobRow
from app.jobs.run_files import open_files
from app.jobs.training_queue import phase_of
from training.run import Run, RunPhase

KINDS = (TRAINING, EVALUATION)


class RunningJob(NamedTuple):
    """The progress of a running job."""

    phase: RunPhase
    elapsed_s: float
    """Seconds since it first ran."""
    progress: float
    """Part of the epochs or images that is done, 0-1."""
    remaining_s: float | None
    """Estimated seconds until its end. None for an evaluation, and outside the epochs."""


class SucceededJob(NamedTuple):
    """A job that has succeeded."""

    finished: datetime
    duration_s: float
    """Seconds from its first start to its end."""


class MeasuredAccuracy(NamedTuple):
    """The result of an evaluation of all images of a source."""

    model: str
    version: int
    split: str
    """Source of the images: test, train or zip."""
    top1: float


@dataclass(frozen=True)
class JobOverview:
    """The jobs of a database."""

    counts: dict[tuple[str, State], int]
    """Number of jobs by kind and state, without pairs that have none."""
    running: dict[str, RunningJob]
    """The oldest running job by kind."""
    succeeded: dict[str, SucceededJob]
    """The latest job that has succeeded, by kind."""
    accuracies: list[MeasuredAccuracy]
    """The latest result of each model and source."""


def read_overview(database: Database) -> JobOverview:
    """Read the database, and the reports of running jobs. Call this in a thread.

    Raises:
        Unavailable: The database or a run folder cannot be read.
    """
    by_state = select(JobRow.kind, JobRow.state, func.count()).group_by(JobRow.kind, JobRow.state)
    with database.transaction() as session:
        return JobOverview(
            counts={(kind, State(state)): count for kind, state, count in session.execute(by_state)},
            running={kind: job for kind in KINDS if (job := _find_running(session, database, kind))},
            succeeded={kind: last for kind in KINDS if (last := _find_succeeded(session, kind))},
            accuracies=_find_accuracies(session),
        )


def _find_running(session: Session, database: Database, kind: str) -> RunningJob | None:
    running = select(JobRow.id, JobRow.recipe, JobRow.started).where(JobRow.kind == kind, JobRow.state == State.RUNNING)
    job = session.execute(running.order_by(JobRow.sequence).limit(1)).first()
    if job is None or job.started is None:
        return None
    elapsed_s = (datetime.now(UTC) - job.started).total_seconds()
    report = open_files(database, Run(database.runs / job.id)).latest_metrics()
    if report is None:
        return RunningJob("loading", elapsed_s, 0.0, None)
    remaining_s = report["remaining_s"] if report["event"] in ("tick", "epoch") and kind == TRAINING else None
    return RunningJob(phase_of([report]), elapsed_s, _progress(kind, report, job.recipe), remaining_s)


def _progress(kind: str, report: dict[str, Any], recipe: dict[str, Any]) -> float:
    """Return the part of a job that is done.

    Args:
        kind: Kind of the job.
        report: Its latest metrics.
        recipe: Its recipe; empty for an evaluation.
    """
    if kind == EVALUATION:
        done, images = int(report["done"]), int(report["images"])
        return done / max(1, images)
    epochs: float = report.get("epoch", 0)  # releases up to 0.2.0 have reports without an epoch
    if report["event"] == "tick":
        epochs += report["step"] / report["steps"] - 1
    total: int = recipe["epochs"] + recipe["finetune_epochs"]
    return epochs / total


def _find_succeeded(session: Session, kind: str) -> SucceededJob | None:
    succeeded = select(JobRow.created, JobRow.started, JobRow.finished)
    succeeded = succeeded.where(JobRow.kind == kind, JobRow.state == State.SUCCEEDED, JobRow.finished.is_not(None))
    job = session.execute(succeeded.order_by(JobRow.finished.desc()).limit(1)).first()
    if job is None:
        return None
    return SucceededJob(job.finished, (job.finished - (job.started or job.created)).total_seconds())


def _find_accuracies(session: Session) -> list[MeasuredAccuracy]:
    model, split = JobRow.request["model"].as_string(), JobRow.request["split"].as_string()
    latest = (
        select(func.max(JobRow.sequence))
        .where(JobRow.kind == EVALUATION, JobRow.state == State.SUCCEEDED)
        .where(JobRow.request["limit"].as_integer().is_(None))
        .group_by(model, split)
    )
    measured = select(model, JobRow.request["version"].as_integer(), split, JobRow.result["top1"].as_float())
    return [MeasuredAccuracy(*each) for each in session.execute(measured.where(JobRow.sequence.in_(latest)))]
