"""Claim the queued training jobs, let an executor do their work, and record their outcome.

    queue --claim--> executor: a child process, or a job of Ray --run folder--> outcome in the queue

With a SQLite database, only one of the server processes on the runs folder runs jobs. Another process takes over when
that one ends, even by a crash. With a shared database, one process per device runs jobs. Another one, on any machine,
takes over a job whose lease has expired.
"""

import asyncio
import fcntl
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from pathlib import Path

from app.exceptions import Unavailable
from app.jobs.executor import Ending, Executor
from app.jobs.lease import LeaseKeeper
from app.jobs.local_executor import LocalExecutor
from app.jobs.run_files import restore
from app.jobs.training_queue import TrainingJobSummary, TrainingQueue
from app.settings import Settings
from app.tasks import cancel_and_wait
from app.threads import Threads
from training.recipes import Recipe
from training.run import Publication, RunError
from training.store import make_store

log = logging.getLogger(__name__)

_POLL_S = 0.3
_LOCK_POLL_S = 2.0
_PATIENCE_S = 60.0  # only the queue uses this thread, so a call waits for a slow disk at most


class TrainingRunner:
    """The task that claims jobs from the queue, lets them run and records their outcome.

    Args:
        settings: Folders, number of threads, and where jobs run.
        jobs: The queue.
        lease: Leases of this process.
        on_published: Callback after a job has published a model.
    """

    def __init__(
        self, settings: Settings, jobs: TrainingQueue, lease: LeaseKeeper, on_published: Callable[[], Awaitable[None]]
    ):
        self._settings = settings
        self._jobs = jobs
        self._lease = lease
        self._on_published = on_published
        self._task: asyncio.Task[None] | None = None
        self._threads = Threads("the training queue", 1, patience_s=_PATIENCE_S)
        self._executor = self._make_executor()
        self._working_on = set[str]()  # ids of the jobs that this process works on
        self._fault = ""  # last logged reason why the queue waits

    def _make_executor(self) -> Executor:
        if self._settings.jobs == "local":
            return LocalExecutor(self._settings, self._jobs, self._lease, self._threads)
        from app.jobs.ray_executor import RayExecutor  # imports Ray

        return RayExecutor(self._settings, self._jobs, self._threads)

    def start(self) -> None:
        """Start to run jobs."""
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Stop the running jobs, unless they survive this process. They continue at the next start."""
        await cancel_and_wait(self._task)
        self._threads.close()

    async def _work(self) -> None:
        while True:
            try:
                if await self._threads.run(self._jobs.database.open):
                    device = await self._threads.run(self._executor.device)
                    async with self._lock(device), asyncio.TaskGroup() as group:
                        await self._run_jobs(device, group)
            except* (Unavailable, OSError) as errors:
                self._warn(errors.exceptions[0])
            except* Exception:  # one job must not end the queue
                log.exception("an error occurred in the training queue; it continues")
            await asyncio.sleep(_LOCK_POLL_S)

    def _lock(self, device: str | None) -> AbstractAsyncContextManager[None]:
        """Return the lock that one process at a time holds: for all jobs in SQLite, else for the jobs of a device."""
        if not self._jobs.database.shared:
            return _exclusive_lock(self._settings.runs / "runner.lock")
        return _exclusive_lock(self._settings.runs / f"runner-{device}.lock") if device else nullcontext()

    async def _run_jobs(self, device: str | None, group: asyncio.TaskGroup) -> None:
        while True:
            if self._executor.survives:
                await self._stop_outlived()
            if claimed := await self._claim(device):
                group.create_task(self._execute(*claimed))
            else:
                await asyncio.sleep(_POLL_S)

    async def _claim(self, device: str | None) -> tuple[TrainingJobSummary, Recipe] | None:
        """Claim a job if there is one and this process can begin it."""
        if len(self._working_on) >= self._executor.capacity or not self._lease.valid:
            return None
        claimed = await self._threads.run(
            self._jobs.claim, device, self._lease.may_take_over, frozenset(self._working_on)
        )
        if claimed:
            self._working_on.add(claimed[0].id)
        return claimed

    async def _stop_outlived(self) -> None:
        """Stop the work of jobs that were cancelled while no process followed them."""
        for job_id in await self._threads.run(self._jobs.outlived):
            if job_id not in self._working_on:
                await self._executor.stop(job_id)
                await self._threads.run(self._jobs.record_stop, job_id)

    def _warn(self, error: Exception) -> None:
        """Log why the queue waits, once for each reason."""
        if self._fault != str(error):
            self._fault = str(error)
            log.warning("the training queue waits and retries: %s", error)

    async def _execute(self, job: TrainingJobSummary, recipe: Recipe) -> None:
        """Run a job, or follow its running work, until it has ended. Record the outcome."""
        run = self._jobs.run_folder(job.id)
        try:
            if await self._threads.run(run.stop_file.exists):  # a server died while it was cancelling the job
                await self._threads.run(self._jobs.cancel, job.id)
                return
            await self._threads.run(restore, self._jobs.database, run)
            ending = await self._executor.run(job, recipe, run)
            publication = await self._threads.run(run.outcome)
        except asyncio.CancelledError:
            leave = self._jobs.release if self._executor.survives else self._jobs.interrupt
            with suppress(Unavailable):  # the next start continues a running job as well
                await self._threads.run(leave, job.id)
            raise
        except (OSError, RunError) as error:  # the work cannot start, or the run folder is damaged
            await self._jobs.record_outcome(self._threads, self._jobs.fail, job.id, f"the job cannot continue: {error}")
        else:
            if ending:
                await self._record(job, ending, publication)
        finally:
            self._working_on.discard(job.id)

    async def _record(self, job: TrainingJobSummary, ending: Ending, publication: Publication | None) -> None:
        record, threads = self._jobs.record_outcome, self._threads
        if publication:
            await record(threads, self._jobs.succeed, job.id, publication)
            await threads.run(self.prune, publication.model)
            await self._on_published()
        elif ending.error:
            await record(threads, self._jobs.fail, job.id, ending.error)
        else:
            await record(threads, self._jobs.interrupt, job.id, ending.crash)

    def prune(self, model: str) -> None:
        """Remove old versions of the cascades that pin versions of a model, then old versions of the model.

        `CIFAR100_KEEP_VERSIONS` is the number of versions to keep. Without it, all are kept.
        """
        if not (keep := self._settings.keep_versions):
            return
        store = make_store(self._settings.models)
        for name in sorted({cascade.partition("/")[0] for cascade in store.pins(model).values()}):
            store.prune(name, keep)
        store.prune(model, keep, self._jobs.required_versions(model))


@asynccontextmanager
async def _exclusive_lock(lock: Path) -> AsyncIterator[None]:
    """Wait for an exclusive file lock and hold it. The operating system releases it if this process crashes."""
    with lock.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(_LOCK_POLL_S)
        yield
