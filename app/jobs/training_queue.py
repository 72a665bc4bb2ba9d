"""The queue of training jobs. `app.jobs.training_runner` runs them, one at a time on each device.

In: a request for a recipe.  Out: a row in the job database, and later the published version.
"""

import asyncio
from collections.abc import Collection
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, Field
from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from app.exceptions import BadRequest, NotFound, Unavailable
from app.jobs.backends import WRITES
from app.jobs.database import Database
from app.jobs.queue import WAITING, JobQueue, State, new_job_id
from app.jobs.rows import TRAINING, JobRow
from app.settings import Settings
from training.dataset import split_sizes
from training.recipes import RECIPES, Recipe, RecipeError, make_recipe, parse_recipe
from training.run import Publication, RunPhase
from training.store import ModelCard, Promotion, StoreError, make_store
from training.text import quote

_HEALTH_WAIT_S = 0.1

_FIELDS = {field: schema for field, schema in Recipe.model_json_schema()["properties"].items() if field != "name"}


class TrainingRequest(BaseModel, extra="forbid", use_attribute_docstrings=True):
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


class TrainingJobSummary(BaseModel, from_attributes=True, use_attribute_docstrings=True):
    """One training job."""

    id: str
    """Id of the job, which is also the name of its run folder."""
    state: State
    """State of the job."""
    phase: RunPhase | None = None
    """Work that the job does now; None unless its state is running."""
    request: TrainingRequest
    """The request, with converted values."""
    created: datetime
    """Time of the request."""
    started: datetime | None
    """Time at which the job first ran; None before."""
    finished: datetime | None
    """Time at which the state became final; None before."""
    crashes: int
    """Number of times that the job's process crashed and was resumed."""
    error: str | None
    """Reason of a failure; None otherwise."""
    published: Publication | None
    """The published version; None before."""


class TrainingJob(TrainingJobSummary):
    """One training job and its progress."""

    epochs: int
    """Number of epochs to train, including fine-tuning."""
    progress: dict[str, Any] | None = None
    """The latest report: the metrics of a tick or an epoch, or the progress of another phase."""
    history: list[dict[str, Any]] = Field(default_factory=list)
    """The metrics of every finished epoch."""
    files: list[str] = Field(default_factory=list)
    """Names of the files of the run that `GET /train/{id}/files/{name}` returns."""


class TrainingQueue(JobQueue[TrainingJob]):
    """The queue and history of training jobs.

    Args:
        settings: Folders and limits.
        database: The job database.
    """

    kind = TRAINING
    label = "training job"
    listing = "GET /train"

    def __init__(self, settings: Settings, database: Database):
        super().__init__(database)
        self._settings = settings
        self._running: str | None = None  # the last value that `running_soon` has read
        self._reading: asyncio.Task[None] | None = None

    def submit(self, request: TrainingRequest, idempotency_key: str | None = None) -> TrainingJob:
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
        wanted = self._validate(request)
        reason = self._reason_not_fitting(wanted)
        overrides = wanted.model_dump(mode="json", include=set(request.overrides))  # validation converts "3" to 3
        request = request.model_copy(update={"overrides": overrides})
        row = JobRow(
            id=new_job_id(),
            kind=self.kind,
            idempotency_key=idempotency_key,
            state=State.QUEUED,
            request=request.model_dump(),
            recipe=wanted.model_dump(),
            created=datetime.now(UTC),
            crashes=0,
        )
        known = None
        with self._transaction(WRITES) as session:
            if idempotency_key:
                known = session.scalar(select(JobRow).where(JobRow.idempotency_key == idempotency_key))
                if known and known.request != row.request:
                    raise BadRequest(f"Idempotency-Key {idempotency_key!r} was used for another request: {known.id}")
            if known is None:
                if reason:
                    raise BadRequest(reason)
                waiting = (
                    session.scalar(select(func.count()).where(JobRow.kind == self.kind, JobRow.state.in_(WAITING))) or 0
                )
                if waiting >= self._settings.max_jobs:
                    raise Unavailable(f"{waiting} jobs are waiting already; try again later", "jobs_full")
                session.add(row)
        return self._view(known or row)

    def newest(self, limit: int) -> list[TrainingJobSummary]:
        """Return the latest `limit` jobs, newest first."""
        with self._transaction() as session:
            rows = session.scalars(self._select().order_by(JobRow.sequence.desc()).limit(limit)).all()
        return [self._summarize(row) for row in rows]

    def read_file(self, job_id: str, name: str) -> bytes:
        """Return the content of a file of a job's run.

        Raises:
            NotFound: There is no such job, or its run has no such file.
            Unavailable: The database or the file cannot be read.
        """
        self.state(job_id)
        files = self.files(job_id)
        names = files.names()
        if name not in names:
            raise NotFound(f"the job has no file {quote(name)}; it has: {', '.join(names) or 'none yet'}")
        return files.read(name)

    def running(self) -> str | None:
        """Return the id of the oldest running job. Returns None if none runs or the database cannot be used."""
        try:
            return self._running_id()
        except Unavailable:
            return None

    async def running_soon(self) -> str | None:
        """Return the value of `running` within 0.1 s. If the database takes longer, return the last value read."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read_running())
        await asyncio.wait([self._reading], timeout=_HEALTH_WAIT_S)
        return self._running

    async def _read_running(self) -> None:
        with suppress(Unavailable):
            self._running = await self.threads.read(self._running_id)

    def _running_id(self) -> str | None:
        with self._transaction() as session:
            running = select(JobRow.id).where(JobRow.kind == self.kind, JobRow.state == State.RUNNING)
            return session.scalar(running.order_by(JobRow.sequence).limit(1))

    def claim(
        self, device: str | None = None, may_take_over: bool = True, working_on: Collection[str] = ()
    ) -> tuple[TrainingJobSummary, Recipe] | None:
        """Return the next job and its recipe, and make this process its runner. Returns None if there is none.

        A running job without a valid lease comes first, then the oldest waiting job. There is none while another
        process has a lease on the same device. In SQLite no job has a lease, so only the process that holds the runner
        lock may call this, see `app.jobs.training_runner`.

        Args:
            device: Device of this runner. None if jobs run elsewhere, several at a time, and survive their runner.
            may_take_over: False to leave jobs of other runners whose leases have expired.
            working_on: Ids of the jobs that this process works on already.
        """

        def find(session: Session) -> JobRow | None:
            return self._find_next(session, device, may_take_over, working_on)

        with self._transaction() as session:  # a read-only check, so that an idle queue takes no lock
            if find(session) is None:
                return None
        with self._transaction(WRITES) as session:
            row = find(session)
            if row is None:
                return None
            if row.state == State.RUNNING and row.lease and row.runner != self.database.owner and device:
                self._interrupt(row, "the server that ran it has ended")
                if State(row.state).finished:
                    return None
            try:
                wanted = parse_recipe(row.recipe)
                if wanted.name not in RECIPES:
                    raise RecipeError(f"there is no recipe {quote(wanted.name)}")
            except RecipeError as error:
                self._finish(
                    row, State.FAILED, f"this release cannot train the recipe that an earlier one queued: {error}"
                )
                return None
            row.state = State.RUNNING
            row.started = row.started or datetime.now(UTC)
            row.device, row.runner, row.lease = device, self.database.owner, self.database.new_lease(session)
        return TrainingJobSummary.model_validate(row), wanted

    def _find_next(
        self, session: Session, device: str | None, may_take_over: bool, working_on: Collection[str]
    ) -> JobRow | None:
        now, is_own = self.database.now(session), JobRow.runner == self.database.owner
        running, oldest = JobRow.state == State.RUNNING, self._select().order_by(JobRow.sequence).limit(1)
        others = oldest.where(JobRow.device == device, ~is_own, JobRow.lease > now)
        if device and session.scalar(others):
            return None
        abandoned = or_(is_own, JobRow.lease.is_(None), *([JobRow.lease <= now] if may_take_over else []))
        row = session.scalar(oldest.where(running, abandoned, JobRow.id.not_in(working_on)))
        return row or session.scalar(oldest.where(JobRow.state.in_(WAITING)))

    def release(self, job_id: str) -> None:
        """Let another process follow a job that survives its runner."""
        with self._as_runner(job_id):
            pass

    def outlived(self) -> list[str]:
        """Return the cancelled jobs whose work may go on, because it survives its runner."""
        cancelled = select(JobRow.id).where(JobRow.kind == self.kind, JobRow.state == State.CANCELLED)
        with self._transaction() as session:
            return list(session.scalars(cancelled.where(JobRow.device.is_(None), JobRow.runner.is_not(None))))

    def record_stop(self, job_id: str) -> None:
        """Record that the work of a cancelled job has stopped, so that `outlived` no longer returns the job."""
        with self._transaction(WRITES) as session:
            self._row(session, job_id).runner = None

    def required_versions(self, model: str) -> set[int]:
        """Return the versions of a model that waiting jobs use as teachers or initial weights."""
        with self._transaction() as session:
            rows = session.scalars(self._select().where(JobRow.state.in_(WAITING))).all()
        required = set()
        for row in rows:
            with suppress(RecipeError):  # the recipe is of an earlier release; its job will fail
                sources = (source.split("/") for source in parse_recipe(row.recipe).source_versions)
                required |= {int(version) for name, version in sources if name == model}
        return required

    def succeed(self, job_id: str, published: Publication) -> None:
        """Record the published model. A job that was cancelled too late stays cancelled, but records its model."""
        with self._as_runner(job_id) as row:
            if row:
                row.published = published.model_dump()
                self._finish(row, State.SUCCEEDED)

    def _validate(self, request: TrainingRequest) -> Recipe:
        try:
            wanted = make_recipe(request.recipe, request.overrides)
            for version in wanted.teachers:
                self._card("teacher", version)
            if wanted.predecessor:
                wanted.require_fit(self._card("weights", wanted.predecessor).recipe)
        except RecipeError as error:
            raise BadRequest(f"{error}") from None
        if wanted.weights not in ("none", "imagenet", wanted.predecessor):
            raise BadRequest("weights must be none, imagenet or a published version; only the command line reads files")
        limits = {"total epochs": (wanted.total_epochs, self._settings.max_job_epochs)}
        limits |= {"batch_size": (wanted.batch_size, self._settings.max_job_batch)}
        limits |= {"width": (wanted.width, self._settings.max_job_width)}
        for field, (value, limit) in limits.items():
            if value > limit:
                raise BadRequest(f"{field}={value} is above the limit of this service, {limit}")
        return wanted

    def _reason_not_fitting(self, wanted: Recipe) -> str | None:
        """Return the reason why this machine cannot train a recipe, or None. The machines of a cluster are unknown."""
        if self._settings.jobs == "ray":
            return None
        from training import resources  # imports PyTorch, which a list of jobs does not need

        train, test = split_sizes(self._settings.data)
        train, evaluation = max(1, train - wanted.validation_images), wanted.validation_images or test
        try:
            resources.require(wanted, resources.default_device(), train, evaluation, self._held_by_training())
        except RecipeError as error:
            return str(error)
        return None

    def _held_by_training(self) -> int:
        """Return the resident memory of the running job's process in bytes. It is freed before the next job starts."""
        from training import resources

        running = self.running()
        holder = self.run_folder(running).holder(wait_s=0) if running else None
        return resources.resident_memory(holder) if holder else 0

    def _card(self, field: str, version: str) -> ModelCard:
        try:
            return make_store(self._settings.models).source_card(version)
        except StoreError as error:
            raise BadRequest(f"{field}: {error}") from None

    def _before_cancel(self, job_id: str) -> None:
        if not self.database.shared:  # otherwise the process ends with its server
            self.run_folder(job_id).request_stop()  # stops the process even if this server crashes first

    def _summarize(self, row: JobRow) -> TrainingJobSummary:
        summary = TrainingJobSummary.model_validate(row)
        if row.state == State.RUNNING:  # at most one job per device, so a list reads the metrics of few runs
            summary.phase = phase_of([metrics for _, metrics in self.files(row.id).metrics()])
        return summary

    def _view(self, row: JobRow) -> TrainingJob:
        files = self.files(row.id)
        metrics = [metrics for _, metrics in files.metrics()]
        summary = TrainingJobSummary.model_validate(row)
        summary.phase = phase_of(metrics) if row.state == State.RUNNING else None
        progress = metrics[-1] if metrics else None
        if progress and State(row.state).finished:
            progress |= {"remaining_s": 0.0}  # the latest metrics estimate the export
        return TrainingJob(
            **summary.model_dump(),
            epochs=row.recipe["epochs"] + row.recipe["finetune_epochs"],
            progress=progress,
            history=[line for line in metrics if line["event"] == "epoch"],
            files=files.names(),
        )


def phase_of(metrics: list[dict[str, Any]]) -> RunPhase:
    """Return the phase of a running job. Its process loads its libraries before it reports anything."""
    if not metrics:
        return "loading"
    before: RunPhase = "features" if metrics[-1]["event"] == "preparation" else "training"
    phase: RunPhase = metrics[-1].get("phase", before)  # releases up to 0.2.0 record no phase
    return phase
