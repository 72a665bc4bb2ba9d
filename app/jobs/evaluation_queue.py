"""The queue of evaluation jobs. `app.jobs.evaluation_runner` runs them in the server, beside predictions.

In: a model version and the source of labeled images.  Out: a row in the job database, and later the measures.
"""

import shutil
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from pydantic import BaseModel
from sqlalchemy import delete, func, or_, select
from sqlalchemy.orm import Session

from app.exceptions import Unavailable
from app.jobs.backends import WRITES
from app.jobs.queue import UNFINISHED, JobQueue, State
from app.jobs.rows import EVALUATION, FileRow, JobRow
from training.run import RunPhase
from training.store import Evaluation

MAX_UNFINISHED = 8
"""Largest number of evaluations that wait or run, in all server processes on a database."""

ZIP_SPLIT = "zip"
"""Source of images that a client has uploaded."""

_KEPT = 100  # finished evaluations that stay available


class Mistake(BaseModel, use_attribute_docstrings=True):
    """An image whose most probable class is wrong."""

    file: str
    """Name in the zip, or the split and the number of the image in it, such as test/17."""
    label: str
    """Its class."""
    predicted: str
    """Its most probable class."""
    probability: float
    """Probability of that class."""


class ReliabilityBin(BaseModel, use_attribute_docstrings=True):
    """The images whose most probable class has a probability in one of 15 equal intervals."""

    images: int
    """Number of these images."""
    confidence: float
    """Mean probability of their most probable class, 0-1."""
    accuracy: float
    """Fraction of these images whose most probable class is right."""


class EvaluationResult(Evaluation):
    """The measures of an evaluation job, with the figures of each class in the order of `classes`.

    Results of earlier releases have only the fields of `Evaluation`, and 0 in `per_class` for a class without images.
    """

    classes: list[str] | None = None
    """Names of the classes of the model."""
    images_per_class: list[int] | None = None
    """Number of images of each class."""
    confusion: list[list[int]] | None = None
    """Number of images by true class (row) and predicted class (column). Lists of jobs leave it out."""
    mistakes: list[Mistake] | None = None
    """The most confident mistakes, the worst first. Lists of jobs leave them out."""
    reliability: list[ReliabilityBin] | None = None
    """The reliability diagram, by rising confidence, without empty intervals. Lists of jobs leave it out."""


class EvaluationRequest(BaseModel):
    """A request to evaluate a model version."""

    model: str
    version: int
    engine: str
    """Name of the engine that computes the logits."""
    split: Literal["test", "train", "zip"] | None
    """Source of the images. None for an evaluation of an earlier release that failed before it read any."""
    limit: int | None = None
    """Number of images of the split. None means all."""


class EvaluationJob(BaseModel, use_attribute_docstrings=True):
    """One evaluation job and its progress."""

    id: str
    """Id of the evaluation."""
    state: State
    """State of the evaluation."""
    phase: RunPhase | None = None
    """loading while images are read, then measuring; None unless the state is running."""
    model: str
    """Name of the model."""
    version: int
    """Version of the model."""
    engine: str
    """Name of the engine that computes the logits."""
    split: str | None = None
    """Source of the images: test, train or zip."""
    created: datetime
    """Time of the request."""
    started: datetime | None = None
    """Time at which the evaluation first ran; None before."""
    finished: datetime | None = None
    """Time at which the state became final; None before."""
    done: int = 0
    """Number of images computed so far."""
    images: int | None = None
    """Number of images to compute; None before they are read."""
    result: EvaluationResult | None = None
    """The measures; None before the evaluation has succeeded."""
    error: str | None = None
    """Reason of a failure; None otherwise."""


class EvaluationQueue(JobQueue[EvaluationJob]):
    """The queue and history of evaluation jobs."""

    kind = EVALUATION
    label = "evaluation"
    listing = "GET /evaluate/jobs"

    def add(self, job_id: str, request: EvaluationRequest, state: State) -> None:
        """Add a job.

        Args:
            job_id: Id from `new_job_id`.
            request: Model version and source of the images.
            state: RUNNING if the caller runs the job at once and holds the lock of its run folder, else QUEUED.

        Raises:
            Unavailable: Too many evaluations are unfinished, or the database cannot be used.
        """
        now = datetime.now(UTC)
        row = JobRow(
            id=job_id,
            kind=self.kind,
            state=state,
            request=request.model_dump(),
            recipe={},
            created=now,
            started=now if state is State.RUNNING else None,
            crashes=0,
        )
        with self._transaction(WRITES) as session:
            self._require_room(session)
            if state is State.RUNNING or request.split == ZIP_SPLIT:  # only this process has the zip
                row.runner, row.lease = self.database.owner, self.database.new_lease(session)
            session.add(row)

    def require_room(self) -> None:
        """Check that a further job may be added. Raises the errors of `add`."""
        with self._transaction() as session:
            self._require_room(session)

    def _require_room(self, session: Session) -> None:
        unfinished = select(func.count()).where(JobRow.kind == self.kind, JobRow.state.in_(UNFINISHED))
        count = session.scalar(unfinished) or 0
        if count >= MAX_UNFINISHED:
            raise Unavailable(f"{count} evaluations are waiting or running; try again later", "jobs_full")

    def newest(self, limit: int) -> list[EvaluationJob]:
        """Return the latest `limit` jobs, newest first, without the details of their results."""
        with self._transaction() as session:
            rows = session.scalars(self._select().order_by(JobRow.sequence.desc()).limit(limit)).all()
        return [self._view(row, {"confusion", "mistakes", "reliability"}) for row in rows]

    def unfinished(self) -> list[str]:
        """Return the ids of all jobs that wait or run, oldest first, without those that another process owns."""
        with self._transaction() as session:
            now, is_own = self.database.now(session), JobRow.runner == self.database.owner
            free = or_(is_own, JobRow.lease.is_(None), JobRow.lease <= now)
            mine = select(JobRow.id).where(JobRow.kind == self.kind, JobRow.state.in_(UNFINISHED), free)
            return list(session.scalars(mine.order_by(JobRow.sequence)))

    def claim(self, job_id: str, has_zip: bool = True) -> EvaluationRequest | None:
        """Set the state of a job to running. The caller holds the lock of its run folder.

        A job that is running already was left by a server that has died. It is resumed once. A job whose zip is on
        another machine waits for its server for the time of one more lease, and then fails.

        Args:
            job_id: Id of the job.
            has_zip: False if the run folder has no zip.

        Returns:
            The request, or None if the job has finished, has failed or belongs to another process.
        """
        with self._transaction(WRITES) as session:
            row, now = self._row(session, job_id), self.database.now(session)
            if row.runner != self.database.owner and row.lease and row.lease > now:
                return None
            if row.request["split"] == ZIP_SPLIT and not has_zip and not State(row.state).finished:
                if row.lease is None or row.lease + timedelta(seconds=self.database.lease_s) <= now:
                    self._finish(row, State.FAILED, "the server that received the zip has ended; send it again")
                return None
            if row.state == State.RUNNING:
                self._interrupt(row, "the server that ran it has ended")
            if State(row.state).finished:
                return None
            row.state = State.RUNNING
            row.started = row.started or datetime.now(UTC)
            row.runner, row.lease = self.database.owner, self.database.new_lease(session)
        return EvaluationRequest.model_validate(row.request)

    def succeed(self, job_id: str, engine: str, result: EvaluationResult) -> None:
        """Record the measures of a job and the engine that computed them."""
        with self._as_runner(job_id) as row:
            if row:
                row.request = row.request | {"engine": engine}
                row.result = result.model_dump()
                self._finish(row, State.SUCCEEDED)

    def prune(self) -> None:
        """Delete all finished evaluations except the 100 newest, with their folders."""
        finished = self._select().where(JobRow.state.not_in(UNFINISHED)).order_by(JobRow.sequence.desc())
        with self._transaction() as session:
            old = session.scalars(finished.offset(_KEPT)).all()
        if not old:
            return
        with self._transaction(WRITES) as session:
            for row in old:
                session.delete(session.merge(row, load=False))
            session.execute(delete(FileRow).where(FileRow.job_id.in_([row.id for row in old])))
        for row in old:
            shutil.rmtree(self.run_folder(row.id).path, ignore_errors=True)

    def _end_lease(self, row: JobRow) -> None:
        """End the lease of a finished job. An interrupted one is left to its server for a while, which has its zip."""
        if State(row.state).finished:
            super()._end_lease(row)

    def _view(self, row: JobRow, omitted: Collection[str] = ()) -> EvaluationJob:
        """Return the job of a row, without the omitted fields of its result."""
        request = EvaluationRequest.model_validate(row.request)
        fields = {name: value for name, value in (row.result or {}).items() if name not in omitted}
        result = EvaluationResult.model_validate(fields) if fields else None
        latest = self.files(row.id).latest_metrics()
        measured = result.images if result else 0
        progress: dict[str, Any] = latest or {"done": measured, "images": measured or None}
        phase: RunPhase = "measuring" if latest else "loading"
        return EvaluationJob(
            **request.model_dump(exclude={"limit"}),
            id=row.id,
            state=State(row.state),
            phase=phase if row.state == State.RUNNING else None,
            created=row.created,
            started=row.started,
            finished=row.finished,
            done=progress["done"],
            images=progress["images"],
            result=result,
            error=row.error,
        )
