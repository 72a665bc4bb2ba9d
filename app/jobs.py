"""Keep the queue and history of training jobs: their requests, states and progress.

In: a request for a recipe.  Out: a row in the database, which all server processes share and which survives restarts.
`app.runner` claims the jobs one at a time. Its child process writes a run folder, from which this module reads
progress.

    queued --> running --> succeeded
                 |  ^----> failed, cancelled
                 v  |
              interrupted   (the server stopped, or the child crashed for the first time)
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, NamedTuple
from uuid import uuid4

from pydantic import BaseModel, Field
from sqlalchemy import Engine, func, select
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session

from app.clients import FairShares
from app.database import MAX_ERROR, WRITES, JobRow, NewerDatabase, connect
from app.exceptions import BadRequest, NotFound, Unavailable
from app.settings import Settings
from app.threads import Threads
from training import resources
from training.dataset import split_sizes
from training.recipes import RECIPES, Recipe, RecipeError, make_recipe, parse_recipe
from training.run import Publication, Run
from training.store import ModelCard, Promotion, Store, StoreError
from training.text import quote, shorten

log = logging.getLogger(__name__)

DATABASE = "jobs.sqlite"
_EVENT_POLL_S = 1.0
_HEARTBEAT_S = 15.0  # proxies close idle streams
_MAX_CRASHES = 1  # a job is resumed once
_THREADS = 4
_HEALTH_WAIT_S = 0.1


class State(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    """The job waits to be resumed from its last checkpoint."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def finished(self) -> bool:
        return self in (State.SUCCEEDED, State.FAILED, State.CANCELLED)


WAITING = (State.QUEUED, State.INTERRUPTED)


_FIELDS = {field: schema for field, schema in Recipe.model_json_schema()["properties"].items() if field != "name"}


class JobRequest(BaseModel, extra="forbid"):
    """A request for a training job."""

    recipe: str = Field(examples=["resnet"], json_schema_extra={"enum": list(RECIPES)})
    """Name of a recipe."""
    overrides: dict[str, Any] = Field(
        default_factory=dict,
        examples=[{"epochs": 3}],
        json_schema_extra={"properties": _FIELDS, "additionalProperties": False},
    )
    """Fields of the recipe to change."""
    promote: Promotion = "if-better"
    """Condition under which the trained model goes live."""


class JobSummary(BaseModel, from_attributes=True):
    """One training job."""

    id: str
    state: State
    request: JobRequest
    created: datetime
    started: datetime | None
    finished: datetime | None
    crashes: int
    """Number of times that the job's process crashed and was resumed."""
    error: str | None
    published: Publication | None


class Job(JobSummary):
    """One training job and its progress."""

    epochs: int
    """Number of epochs to train, including fine-tuning."""
    progress: dict[str, Any] | None = None
    """The latest metrics: epoch, step, loss, accuracy, images/s, remaining seconds."""
    history: list[dict[str, Any]] = Field(default_factory=list)
    """The metrics of every finished epoch."""


class _Progress(NamedTuple):
    """New metrics and the end of a job, for a client that follows its events."""

    size: int
    """Size of the metrics file in bytes."""
    metrics: list[tuple[int, dict[str, Any]]]
    """New metrics with their numbers."""
    ended: Job | None
    """The job if it has finished, else None."""


class Jobs:
    """The queue and history of training jobs. Methods that are not coroutines may be called from any thread.

    Args:
        settings: Folders and limits.
    """

    def __init__(self, settings: Settings):
        self._settings = settings
        self._engine: Engine | None = None
        self._fault = ""  # last logged reason why the database cannot be opened
        self.threads = Threads("the job database", _THREADS)
        """Threads in which request handlers call the methods that read or write the database."""
        self.followers = FairShares(settings.max_event_streams)
        """Number of clients that follow a job's events now, by network."""
        self._running: str | None = None  # the last value that `running_soon` has read
        self._reading: asyncio.Task[None] | None = None

    def open(self) -> bool:
        """Open the database if it is not open yet.

        Returns:
            True if the database is open. If it cannot be opened, the service runs without training.
        """
        if self._engine:
            return True
        try:
            self._settings.runs.mkdir(parents=True, exist_ok=True)
            self._engine = connect(self._settings.runs / DATABASE)
        except (OSError, DatabaseError, NewerDatabase) as error:
            if self._fault != str(error):
                self._fault = str(error)
                log.error("training is unavailable, %s cannot be used: %s", self._settings.runs, error)
            return False
        return True

    def close(self) -> None:
        self.threads.close()
        if self._engine:
            self._engine.dispose()

    def submit(self, request: JobRequest, idempotency_key: str | None = None) -> Job:
        """Queue a job, or return the job that was queued with the same key.

        Args:
            request: Recipe name, overrides and promotion rule.
            idempotency_key: Key of the `Idempotency-Key` header. A repeated request with the same key is not queued
                again.

        Raises:
            BadRequest: The recipe or a field is unknown, a value is invalid or above a limit, this machine cannot train
                the recipe, or the key was used for another request.
            Unavailable: Too many jobs are waiting, or the database cannot be used.
        """
        wanted = self._validated(request)
        misfit = self._misfit(wanted)
        overrides = wanted.model_dump(mode="json", include=set(request.overrides))  # validation converts "3" to 3
        request = request.model_copy(update={"overrides": overrides})
        now = datetime.now(UTC)
        row = JobRow(
            id=f"{now:%Y%m%d-%H%M%S}-{uuid4().hex[:8]}",
            idempotency_key=idempotency_key,
            state=State.QUEUED,
            request=request.model_dump(),
            recipe=wanted.model_dump(),
            created=now,
            crashes=0,
        )
        known = None
        with self._transaction(WRITES) as session:
            if idempotency_key:
                known = session.scalar(select(JobRow).where(JobRow.idempotency_key == idempotency_key))
                if known and known.request != row.request:
                    raise BadRequest(f"Idempotency-Key {idempotency_key!r} was used for another request: {known.id}")
            if known is None:
                if misfit:
                    raise BadRequest(misfit)
                waiting = session.scalar(select(func.count()).where(JobRow.state.in_(WAITING))) or 0
                if waiting >= self._settings.max_jobs:
                    raise Unavailable(f"{waiting} jobs are waiting already; try again later")
                session.add(row)
        return self._job(known or row)

    def newest(self, limit: int) -> list[JobSummary]:
        """Return the latest `limit` jobs, newest first."""
        with self._transaction() as session:
            rows = session.scalars(select(JobRow).order_by(JobRow.sequence.desc()).limit(limit)).all()
        return [JobSummary.model_validate(row) for row in rows]

    def get(self, job_id: str) -> Job:
        """Return the current state of a job.

        Raises:
            NotFound: The job does not exist.
            Unavailable: The database cannot be used.
        """
        with self._transaction() as session:
            row = self._row(session, job_id)
        return self._job(row)

    def cancel(self, job_id: str) -> Job:
        """Cancel a job. The runner stops its process, if it has one. A finished job does not change.

        Raises:
            NotFound: The job does not exist.
            Unavailable: The database cannot be used or the run folder cannot be written. The job continues.
        """
        with self._transaction(WRITES) as session:
            row = self._row(session, job_id)
            if row.state == State.RUNNING:
                self.run(job_id).request_stop()  # stops the process even if this server crashes first
            _finish(row, State.CANCELLED)
        return self._job(row)

    async def events(self, job_id: str, after: int, over: Callable[[], bool]) -> AsyncGenerator[str]:
        """Yield a job's metrics as server-sent events while it runs. The last event, `end`, holds the job.

        A resumed job measures its last epoch again, so the event of that epoch repeats. The stream continues while the
        database is temporarily unreadable.

        Args:
            job_id: Id of the job.
            after: Number of the last event that the client has received, counted from 1.
            over: Function that returns True when the stream must end although the job continues.
        """
        quiet_s, size = 0.0, -1
        while not over():
            try:
                progress = await self.threads.read(self._progress, job_id, after, size)
            except (Unavailable, OSError):
                progress = _Progress(size, [], None)
            size = progress.size
            for number, metrics in progress.metrics:
                after, quiet_s = number, 0.0
                yield f"id: {number}\nevent: {metrics['event']}\ndata: {json.dumps(metrics)}\n\n"
            if progress.ended:
                yield f"event: end\ndata: {progress.ended.model_dump_json()}\n\n"
                return
            if quiet_s >= _HEARTBEAT_S:
                quiet_s = 0.0
                yield ": nothing new\n\n"
            await asyncio.sleep(_EVENT_POLL_S)
            quiet_s += _EVENT_POLL_S

    def _progress(self, job_id: str, after: int, known_size: int) -> "_Progress":
        """Read the metrics after number `after`, unless the metrics file still has `known_size` bytes."""
        # The state is read before the metrics, because the metrics of a finished job are complete.
        with self._transaction() as session:
            row = self._row(session, job_id)
        run = self.run(job_id)
        size = run.metrics_file.stat().st_size if run.metrics_file.exists() else 0
        metrics = list(run.numbered_metrics(after)) if size != known_size else []
        return _Progress(size, metrics, self._job(row) if State(row.state).finished else None)

    @contextmanager
    def follow(self, network: str) -> Iterator[None]:
        """Count a client as a follower of events inside the context. Call this in the event loop.

        Args:
            network: Network of the client, see `app.clients`.

        Raises:
            Unavailable: Too many clients follow events, in total or from this network.
        """
        if not self.followers.allows(network, 1, self.followers.total + 1):
            raise Unavailable(f"{self.followers.total} clients follow training jobs already; try again later")
        self.followers.add(network, 1)
        try:
            yield
        finally:
            self.followers.remove(network, 1)

    def run(self, job_id: str) -> Run:
        """Return the run folder of a job."""
        return Run(self._settings.runs / job_id)

    def state(self, job_id: str) -> State:
        with self._transaction() as session:
            return State(self._row(session, job_id).state)

    def running(self) -> str | None:
        """Return the id of the running job. Returns None if no job runs or the database cannot be used."""
        try:
            return self._running_id()
        except Unavailable:
            return None

    async def running_soon(self) -> str | None:
        """Return the id of the running job within 0.1 s. If the database takes longer, return the last value read."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read_running())
        await asyncio.wait([self._reading], timeout=_HEALTH_WAIT_S)
        return self._running

    async def _read_running(self) -> None:
        with suppress(Unavailable):
            self._running = await self.threads.read(self._running_id)

    def _running_id(self) -> str | None:
        with self._transaction() as session:
            return session.scalar(select(JobRow.id).where(JobRow.state == State.RUNNING))

    def claim(self) -> tuple[JobSummary, Recipe] | None:
        """Return the next job and its recipe, and set its state to running. Returns None if there is none.

        A job that a crashed server left in the running state comes first, then the oldest waiting job. Only the process
        that holds the runner lock may call this, see `app.runner`.
        """
        with self._transaction() as session:  # a read-only check, so that an idle queue takes no lock
            if session.scalar(select(JobRow.id).where(JobRow.state.in_((State.RUNNING, *WAITING))).limit(1)) is None:
                return None
        with self._transaction(WRITES) as session:
            row = session.scalar(select(JobRow).where(JobRow.state == State.RUNNING).order_by(JobRow.sequence).limit(1))
            if row is None:
                waiting = select(JobRow).where(JobRow.state.in_(WAITING)).order_by(JobRow.sequence).limit(1)
                row = session.scalar(waiting)
            if row is None:
                return None
            try:
                wanted = parse_recipe(row.recipe)
                if wanted.name not in RECIPES:
                    raise RecipeError(f"there is no recipe {quote(wanted.name)}")
            except RecipeError as error:
                _finish(row, State.FAILED, f"this release cannot train the recipe that an earlier one queued: {error}")
                return None
            row.state = State.RUNNING
            row.started = row.started or datetime.now(UTC)
        return JobSummary.model_validate(row), wanted

    def needed(self, model: str) -> set[int]:
        """Return the versions of a model that waiting jobs use as teachers or initial weights."""
        with self._transaction() as session:
            recipes = session.scalars(select(JobRow.recipe).where(JobRow.state.in_(WAITING))).all()
        needed = set()
        for each in recipes:
            with suppress(RecipeError):  # the recipe is of an earlier release; its job will fail
                sources = (source.split("/") for source in parse_recipe(each).source_versions)
                needed |= {int(version) for name, version in sources if name == model}
        return needed

    def succeed(self, job_id: str, published: Publication) -> None:
        """Record the published model. A job that was cancelled too late stays cancelled, but records its model."""
        with self._transaction(WRITES) as session:
            row = self._row(session, job_id)
            row.published = published.model_dump()
            _finish(row, State.SUCCEEDED)

    def fail(self, job_id: str, error: str) -> None:
        with self._transaction(WRITES) as session:
            _finish(self._row(session, job_id), State.FAILED, error)

    def interrupt(self, job_id: str, crash: str | None = None) -> None:
        """Mark a job to be resumed, because the server stops or the job's process crashed.

        Args:
            job_id: Id of the job. A finished job does not change.
            crash: Description of the crash. None if the server stops. After a second crash the job fails instead.
        """
        with self._transaction(WRITES) as session:
            row = self._row(session, job_id)
            if State(row.state).finished:
                return
            if crash and row.crashes >= _MAX_CRASHES:
                _finish(row, State.FAILED, f"{crash}, again after it was resumed")
            else:
                row.state = State.INTERRUPTED
                row.crashes += crash is not None
                log.info("training job %s is interrupted: %s", row.id, crash or "the service stops")

    def _validated(self, request: JobRequest) -> Recipe:
        try:
            wanted = make_recipe(request.recipe, request.overrides)
            for version in wanted.teachers:
                self._card("teacher", version)
            if wanted.predecessor:
                wanted.require_fit(self._card("weights", wanted.predecessor).recipe)
        except RecipeError as error:
            raise BadRequest(f"{error}") from None
        if wanted.weights not in ("none", "imagenet", wanted.predecessor):
            raise BadRequest("weights must be none, imagenet or a version here; files are for the command line")
        limits = {"total epochs": (wanted.total_epochs, self._settings.max_job_epochs)}
        limits |= {"batch_size": (wanted.batch_size, self._settings.max_job_batch)}
        limits |= {"width": (wanted.width, self._settings.max_job_width)}
        for field, (value, limit) in limits.items():
            if value > limit:
                raise BadRequest(f"{field}={value} is more than this service trains: at most {limit}")
        return wanted

    def _misfit(self, wanted: Recipe) -> str | None:
        """Return the reason why this machine cannot train a recipe, or None."""
        train, test = split_sizes(self._settings.data)
        train, evaluation = max(1, train - wanted.validation_images), wanted.validation_images or test
        try:
            resources.require(wanted, resources.default_device(), train, evaluation, self._held_by_training())
        except RecipeError as error:
            return str(error)
        return None

    def _held_by_training(self) -> int:
        """Return the resident memory of the running job's process in bytes. It is freed before the next job starts."""
        running = self.running()
        holder = self.run(running).holder(wait_s=0) if running else None
        return resources.resident_memory(holder) if holder else 0

    def _card(self, field: str, version: str) -> ModelCard:
        store = Store(self._settings.models)
        try:
            return store.card(*store.parse(version))
        except StoreError as error:
            raise BadRequest(f"{field}: {error}") from None

    @contextmanager
    def _transaction(self, options: dict[str, Any] | None = None) -> Iterator[Session]:
        """Open a transaction. It is read-only unless the options are `WRITES`.

        Raises:
            Unavailable: The database or the runs folder cannot be used.
        """
        if not self._engine:
            raise Unavailable(f"training is unavailable: {self._settings.runs} cannot be used, see the server's log")
        try:
            engine = self._engine.execution_options(**options or {})
            with Session(engine, expire_on_commit=False) as session, session.begin():
                yield session
        except DatabaseError as error:
            raise Unavailable(f"the job database cannot be used: {error.orig}; try again later") from error
        except OSError as error:
            raise Unavailable(f"{self._settings.runs} cannot be used: {error}") from error

    def _row(self, session: Session, job_id: str) -> JobRow:
        row = session.scalar(select(JobRow).where(JobRow.id == job_id))
        if row is None:
            raise NotFound(f"there is no training job {quote(job_id)}; GET /train lists them")
        return row

    def _job(self, row: JobRow) -> Job:
        metrics = list(self.run(row.id).metrics())
        return Job(
            **JobSummary.model_validate(row).model_dump(),
            epochs=row.recipe["epochs"] + row.recipe["finetune_epochs"],
            progress=metrics[-1] if metrics else None,
            history=[line for line in metrics if line["event"] == "epoch"],
        )


def _finish(row: JobRow, state: State, error: str | None = None) -> None:
    """Set the final state of a job. A finished job does not change."""
    if State(row.state).finished:
        return
    row.state = state
    row.error = error and shorten(error, MAX_ERROR)
    row.finished = datetime.now(UTC)
    log.info("training job %s %s%s", row.id, state, f": {error}" if error else "")
