"""Training jobs: a queue, and one child process at a time that runs `python -m training train`.

In: a validated recipe.  Out: a run folder under `runs`, a published model, and a `Job` that says how far it is.
The child is a process group of its own at low priority; the service reads its run folder and nothing else.
"""

import asyncio
import json
import logging
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, STDOUT, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import BaseModel, Field

from app.errors import BadRequest, NotFound, Unavailable
from app.settings import Settings
from training.recipes import Recipe, RecipeError, as_text, recipe
from training.run import Publication, Run
from training.store import Promotion

log = logging.getLogger(__name__)

_NICENESS = 10
_TERM_GRACE_S = 4.0
_EVENT_POLL_S = 0.3


class State(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def finished(self) -> bool:
        return self not in (State.QUEUED, State.RUNNING)


class JobRequest(BaseModel, extra="forbid"):
    """What to train."""

    recipe: str = Field(examples=["resnet"])
    """Name of a recipe: resnet-seed, resnet, resnet18-seed or resnet18."""
    overrides: dict[str, Any] = Field(default_factory=dict, examples=[{"epochs": 3}])
    """Fields of the recipe to change."""
    promote: Promotion = "if-better"
    """When the result goes live."""


class Job(BaseModel):
    """One training job."""

    id: str
    state: State = State.QUEUED
    request: JobRequest
    created: datetime
    started: datetime | None = None
    finished: datetime | None = None
    epochs: int
    """Epochs asked for."""
    progress: dict[str, Any] | None = None
    """The latest line of metrics: epoch, step, loss, accuracy, images/s, remaining seconds."""
    history: list[dict[str, Any]] = Field(default_factory=list)
    """The metrics of every finished epoch."""
    error: str | None = None
    published: Publication | None = None


class Jobs:
    """The queue and the worker that empties it.

    Args:
        settings: folders and limits.
        on_published: called when a job has published a model.
    """

    def __init__(self, settings: Settings, on_published: Callable[[], Awaitable[None]]):
        self._settings = settings
        self._on_published = on_published
        self._jobs: dict[str, Job] = {}
        self._recipes: dict[str, Recipe] = {}
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._child: tuple[str, Process] | None = None
        self._worker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Stop the worker and its child; the child's run folder can be resumed by hand."""
        if self._worker:
            self._worker.cancel()
            with suppress(asyncio.CancelledError):
                await self._worker

    @property
    def running(self) -> str | None:
        """Id of the job that runs now."""
        return self._child[0] if self._child else None

    def submit(self, request: JobRequest) -> Job:
        """Queue a job.

        Raises:
            BadRequest: unknown recipe or field, or an impossible value.
            Unavailable: too many jobs are waiting.
        """
        try:
            wanted = recipe(request.recipe, request.overrides)
        except RecipeError as error:
            raise BadRequest(f"{error}") from None
        if wanted.weights not in ("none", "imagenet"):
            raise BadRequest("weights must be none or imagenet here; files are for the command line")
        if self._queue.qsize() >= self._settings.max_jobs:
            raise Unavailable(f"{self._queue.qsize()} jobs are waiting already; try again later")
        now = datetime.now(UTC)
        job = Job(id=f"{now:%Y%m%d-%H%M%S}-{uuid4().hex[:8]}", request=request, created=now, epochs=wanted.total_epochs)
        self._jobs[job.id] = job
        self._recipes[job.id] = wanted
        self._queue.put_nowait(job.id)
        return job

    def all(self) -> list[Job]:
        """All jobs, newest first."""
        return [self._with_progress(job) for job in reversed(self._jobs.values())]

    def get(self, job_id: str) -> Job:
        """One job as it stands now.

        Raises:
            NotFound: no such job.
        """
        if job_id not in self._jobs:
            raise NotFound(f"there is no training job {job_id!r}; GET /train lists them")
        return self._with_progress(self._jobs[job_id])

    async def cancel(self, job_id: str) -> Job:
        """Cancel a job; a running child is stopped, by force if it does not listen. No effect on a finished job."""
        job = self._jobs[self.get(job_id).id]
        if not job.state.finished:
            running = job.state is State.RUNNING
            self._finish(job, State.CANCELLED)
            if running and self._child and self._child[0] == job_id:
                await _terminate(self._child[1])
        return self.get(job_id)

    async def events(self, job_id: str, after: int) -> AsyncIterator[tuple[int, dict[str, Any]]]:
        """A job's metrics as they come, numbered from 1; ends when the job has finished.

        Args:
            after: number of the last event that is known already.
        """
        run = Run(self._folder(self.get(job_id).id))
        while True:
            finished = self._jobs[job_id].state.finished
            for number, metrics in enumerate(run.metrics(), start=1):
                if number > after:
                    after = number
                    yield number, metrics
            if finished:
                return
            await asyncio.sleep(_EVENT_POLL_S)

    async def _work(self) -> None:
        while True:
            job = self._jobs[await self._queue.get()]
            if job.state is State.QUEUED:
                try:
                    await self._run(job)
                except OSError as error:
                    log.exception("training job %s could not be started", job.id)
                    self._finish(job, State.FAILED, str(error))

    async def _run(self, job: Job) -> None:
        job.state = State.RUNNING
        job.started = datetime.now(UTC)
        folder = self._folder(job.id)
        folder.mkdir(parents=True)
        environment = os.environ | ({"CIFAR100_DATA": self._settings.data} if self._settings.data else {})
        with (folder / "output.log").open("wb") as output:
            child = await asyncio.create_subprocess_exec(
                *self._command(job),
                stdin=DEVNULL,
                stdout=output,
                stderr=STDOUT,
                env=environment,
                start_new_session=True,
            )
        os.setpriority(os.PRIO_PROCESS, child.pid, _NICENESS)
        self._child = (job.id, child)
        log.info("training job %s runs as process %d", job.id, child.pid)
        try:
            if not job.state.finished:  # it may have been cancelled while the process was being made
                await child.wait()
        finally:  # also when the service stops
            self._child = None
            await _terminate(child)
        if job.state.finished or child.returncode is None:
            return
        code = child.returncode
        job.published = Run(folder).publication()
        if code == 0:
            self._finish(job, State.SUCCEEDED)
            if job.published:
                await self._on_published()
        else:
            self._finish(job, State.FAILED, _reason(code, folder / "output.log"))

    def _command(self, job: Job) -> list[str]:
        wanted = self._recipes[job.id]
        return [
            *(sys.executable, "-m", "training", "train", wanted.name),
            *(f"{field}={as_text(getattr(wanted, field))}" for field in job.request.overrides),
            *("--run", str(self._folder(job.id))),
            *("--models", str(self._settings.models)),
            *("--promote", job.request.promote),
        ]

    def _finish(self, job: Job, state: State, error: str | None = None) -> None:
        job.state = state
        job.error = error
        job.finished = datetime.now(UTC)
        log.info("training job %s %s%s", job.id, state, f": {error}" if error else "")

    def _folder(self, job_id: str) -> Path:
        return self._settings.runs / job_id

    def _with_progress(self, job: Job) -> Job:
        if not job.started:
            return job
        metrics = list(Run(self._folder(job.id)).metrics())
        history = [line for line in metrics if line["event"] == "epoch"]
        return job.model_copy(update={"progress": metrics[-1] if metrics else None, "history": history})


async def _terminate(child: Process) -> None:
    """End a child's whole process group: politely, then by force."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        if child.returncode is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(child.pid, sent)
        with suppress(TimeoutError):
            await asyncio.wait_for(child.wait(), _TERM_GRACE_S)


def _reason(code: int, output: Path) -> str:
    if code < 0:
        return f"the training process was killed by {signal.Signals(-code).name}"
    lines = output.read_text(errors="replace").strip().splitlines() or ["no output"]
    return lines[-1].removeprefix("error: ")


def event_stream(number: int, metrics: dict[str, Any]) -> str:
    """One server-sent event (WHATWG HTML, section 9.2)."""
    return f"id: {number}\nevent: {metrics['event']}\ndata: {json.dumps(metrics)}\n\n"
