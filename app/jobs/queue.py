"""The states, events and history of background jobs, which all server processes on a database share.

    queued --> running --> succeeded
                 |  ^----> failed, cancelled
                 v  |
              interrupted   (the server stopped, or the work crashed for the first time)

A running job has a runner: the process that works on it. Only the runner records an outcome. The lease of the runner
ends with the work, which may be a few seconds after a cancellation.

`TrainingQueue` and `EvaluationQueue` add the requests and results of their kind of job.
"""

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, ClassVar, Generic, NamedTuple, ParamSpec, TypeVar
from uuid import uuid4

from pydantic import BaseModel
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from app.exceptions import NotFound, Unavailable
from app.jobs.backends import WRITES
from app.jobs.database import Database
from app.jobs.rows import MAX_ERROR, JobRow
from app.jobs.run_files import RunFiles, changed_files, open_files, push
from app.threads import Threads
from training.encoding import replace_surrogates
from training.run import Run
from training.text import quote, shorten

log = logging.getLogger(__name__)

_EVENT_POLL_S = 1.0
_HEARTBEAT_S = 15.0  # proxies close idle streams
_MAX_CRASHES = 1  # a job is resumed once
_RETRY_S = 2.0
_ID = re.compile(r"[\w-]{1,100}", re.ASCII)

View = TypeVar("View", bound=BaseModel)
Parameters = ParamSpec("Parameters")


class State(StrEnum):
    """The state of a job."""

    QUEUED = "queued"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    """The job waits to be resumed."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def finished(self) -> bool:
        """True if the state is final."""
        return self in (State.SUCCEEDED, State.FAILED, State.CANCELLED)


WAITING = (State.QUEUED, State.INTERRUPTED)
UNFINISHED = (*WAITING, State.RUNNING)


class JobEvent(NamedTuple):
    """An event of a job: new metrics, or its end."""

    number: int | None
    """Number of the metrics, counted from 1. None for the end."""
    name: str
    data: str
    """Metrics or job as JSON."""


class _Progress(NamedTuple):
    """New metrics and the end of a job, for a client that follows its events."""

    revision: object
    """Revision of the metrics."""
    metrics: list[tuple[int, dict[str, Any]]]
    """New metrics with their numbers."""
    ended: BaseModel | None
    """The job if it has finished, else None."""


class JobQueue(Generic[View]):
    """The queue and history of one kind of job. Methods that are not coroutines may be called from any thread.

    Args:
        database: The job database, which holds all kinds.
    """

    kind: ClassVar[str]
    """Value of the column `kind`."""
    label: ClassVar[str]
    """Name of the kind in messages, such as "training job"."""
    listing: ClassVar[str]
    """Call that lists the jobs of this kind."""

    def __init__(self, database: Database):
        self.database = database
        """The job database."""
        self._transaction = database.transaction

    @property
    def threads(self) -> Threads:
        """Threads in which request handlers call the methods that read or write the database."""
        return self.database.threads

    def get(self, job_id: str) -> View:
        """Return the current state of a job.

        Raises:
            NotFound: The job does not exist.
            Unavailable: The database cannot be used.
        """
        with self._transaction() as session:
            row = self._row(session, job_id)
        return self._view(row)

    def state(self, job_id: str) -> State:
        """Return the state of a job. Raises the errors of `get`."""
        with self._transaction() as session:
            return State(self._row(session, job_id).state)

    def cancel(self, job_id: str) -> View:
        """Cancel a job. Its runner stops the work, if it has begun. A finished job does not change.

        Raises:
            NotFound: The job does not exist.
            Unavailable: The database cannot be used or the run folder cannot be written. The job continues.
        """
        with self._transaction(WRITES) as session:
            row = self._row(session, job_id)
            if row.state == State.RUNNING:
                self._before_cancel(job_id)
            self._finish(row, State.CANCELLED)
        return self._view(row)

    def is_held(self, job_id: str) -> bool:
        """Return whether this process still runs a job that is not cancelled. Raises the errors of `get`."""
        with self._transaction() as session:
            row = self._row(session, job_id)
            return row.state == State.RUNNING and row.runner == self.database.owner

    def fail(self, job_id: str, error: str) -> None:
        """Record why a job failed. A finished job does not change, nor does one of another runner."""
        with self._as_runner(job_id) as row:
            if row:
                self._finish(row, State.FAILED, error)

    def interrupt(self, job_id: str, crash: str | None = None) -> None:
        """Mark a job to be resumed, because the server stops or the job's process crashed.

        Args:
            job_id: Id of the job. A finished job does not change, nor does one of another runner.
            crash: Description of the crash. None if the server stops. After a second crash the job fails instead.
        """
        with self._as_runner(job_id) as row:
            if row and not State(row.state).finished:
                self._interrupt(row, crash)

    def push_files(self, job_id: str) -> None:
        """Copy the changed files of a job that this process runs into a shared database."""
        if not self.database.shared:
            return
        run = self.run_folder(job_id)
        with self._transaction() as session:
            changed = changed_files(session, run)
        if changed:
            with self._transaction(WRITES) as session:
                if self._row(session, job_id).runner == self.database.owner:
                    push(session, run, changed)

    async def record_outcome(
        self,
        threads: Threads,
        record: Callable[Parameters, None],
        *args: Parameters.args,
        **kwargs: Parameters.kwargs,
    ) -> None:
        """Record the outcome of a job. Retry while the database is unavailable, so that the job does not run again.

        Args:
            threads: Threads in which to call `record`.
            record: Method that writes the outcome.
            args: Arguments of `record`.
            kwargs: Keyword arguments of `record`.
        """
        fault = ""
        while True:
            try:
                return await threads.run(record, *args, **kwargs)
            except Unavailable as error:
                if fault != str(error):
                    fault = str(error)
                    log.warning("the outcome of a %s cannot be recorded yet: %s", self.label, error)
                await asyncio.sleep(_RETRY_S)

    async def events(self, job_id: str, after: int, should_end: Callable[[], bool]) -> AsyncGenerator[JobEvent | None]:
        """Yield a job's metrics while it runs. The last event, `end`, holds the job. None is a heartbeat.

        A resumed job measures its last epoch again, so the event of that epoch repeats. The stream continues while the
        database is temporarily unreadable.

        Args:
            job_id: Id of the job.
            after: Number of the last event that the client has received, counted from 1.
            should_end: Function that returns True when the stream must end although the job continues.
        """
        quiet_s, revision = 0.0, object()
        while not should_end():
            try:
                progress = await self.threads.read(self._progress, job_id, after, revision)
            except (Unavailable, OSError):
                progress = _Progress(revision, [], None)
            revision = progress.revision
            for number, metrics in progress.metrics:
                after, quiet_s = number, 0.0
                yield JobEvent(number, metrics["event"], json.dumps(metrics))
            if progress.ended:
                yield JobEvent(None, "end", progress.ended.model_dump_json())
                return
            if quiet_s >= _HEARTBEAT_S:
                quiet_s = 0.0
                yield None
            await asyncio.sleep(_EVENT_POLL_S)
            quiet_s += _EVENT_POLL_S

    def _progress(self, job_id: str, after: int, known_revision: object) -> _Progress:
        """Read the metrics after number `after`, unless they still have the known revision."""
        # The state is read before the metrics, because the metrics of a finished job are complete.
        with self._transaction() as session:
            row = self._row(session, job_id)
        files = self.files(job_id)
        revision = files.metrics_revision()
        metrics = files.metrics(after) if revision != known_revision else []
        return _Progress(revision, metrics, self._view(row) if State(row.state).finished else None)

    def run_folder(self, job_id: str) -> Run:
        """Return the run folder of a job."""
        return Run(self.database.runs / job_id)

    def files(self, job_id: str) -> RunFiles:
        """Return the files of the run of a job, as clients see them."""
        return open_files(self.database, self.run_folder(job_id))

    def _view(self, row: JobRow) -> View:
        """Return the job of a row as clients see it."""
        raise NotImplementedError

    def _before_cancel(self, job_id: str) -> None:
        """Prepare to cancel a running job."""

    def _select(self) -> Select[JobRow]:
        return select(JobRow).where(JobRow.kind == self.kind)

    def _row(self, session: Session, job_id: str) -> JobRow:
        # PostgreSQL refuses texts with null characters, so only possible ids are looked up.
        row = session.scalar(self._select().where(JobRow.id == job_id)) if _ID.fullmatch(job_id) else None
        if row is None:
            raise NotFound(f"there is no {self.label} {quote(job_id)}; {self.listing} lists them")
        return row

    @contextmanager
    def _as_runner(self, job_id: str) -> Iterator[JobRow | None]:
        """Open a transaction that records the end of the work on a job. Yield its row, or None for another runner."""
        with self._transaction(WRITES) as session:
            row = self._row(session, job_id)
            if row.runner not in (None, self.database.owner):
                log.info("%s %s is run by another process now", self.label, job_id)
                yield None
                return
            if self.database.shared:
                run = self.run_folder(job_id)
                push(session, run, changed_files(session, run))
            yield row
            self._end_lease(row)

    def _end_lease(self, row: JobRow) -> None:
        """End the lease of a job whose work has ended."""
        row.lease = None

    def _interrupt(self, row: JobRow, crash: str | None) -> None:
        if crash and row.crashes >= _MAX_CRASHES:
            self._finish(row, State.FAILED, f"{crash}, again after it was resumed")
        else:
            row.state = State.INTERRUPTED
            row.crashes += crash is not None
            log.info("%s %s is interrupted: %s", self.label, row.id, crash or "the service stops")

    def _finish(self, row: JobRow, state: State, error: str | None = None) -> None:
        """Set the final state of a job. A finished job does not change."""
        if State(row.state).finished:
            return
        row.state = state
        row.error = error and shorten(replace_surrogates(error).replace("\0", ""), MAX_ERROR)
        row.finished = datetime.now(UTC)
        log.info("%s %s %s%s", self.label, row.id, state, f": {error}" if error else "")


def new_job_id() -> str:
    """Return an id that begins with the current time, so that run folders sort by age."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid4().hex[:8]}"
