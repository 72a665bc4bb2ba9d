"""Run the queued training jobs, one at a time, each as a child process `python -m training train`.

Only one of the server processes that share a runs folder runs jobs. Another process takes over when that one ends, even
by a crash. The child runs at low priority in its own process group. It holds a lock on its run folder, so that a server
that starts after a crash can tell whether the child is alive. The server then waits for the child or resumes the run,
and no job runs twice.
"""

import asyncio
import fcntl
import logging
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, STDOUT
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import ParamSpec

from app.exceptions import Unavailable
from app.jobs.queue import State
from app.jobs.training_queue import TrainingJobSummary, TrainingQueue
from app.machine import cpu_count, set_niceness
from app.server.workers import service_cpus
from app.settings import Settings
from app.threads import Threads
from training.recipes import RECIPES, Recipe, format_value
from training.run import Run, RunBusy, RunError, write_pid
from training.store import make_store

log = logging.getLogger(__name__)
Parameters = ParamSpec("Parameters")

_OOM_SCORE = "500"  # the OOM killer adds half of the machine's memory to the process's score
_POLL_S = 0.3
_TERM_GRACE_S = 3.0
_LEASE_POLL_S = 2.0
_PATIENCE_S = 60.0  # only the queue uses this thread, so a call waits for a slow disk at most
_INTERRUPTED = 130  # exit status of a training process that a signal stopped
_SECRETS = ("CIFAR100_API_KEYS", "CIFAR100_API_KEY")  # environment variables that a training process must not see
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "MemoryError")


class TrainingRunner:
    """The task that claims jobs from the queue, runs them and records their outcome.

    Args:
        settings: Folders and number of threads.
        jobs: The queue.
        on_published: Callback after a job has published a model.
    """

    def __init__(self, settings: Settings, jobs: TrainingQueue, on_published: Callable[[], Awaitable[None]]):
        self._settings = settings
        self._jobs = jobs
        self._on_published = on_published
        self._task: asyncio.Task[None] | None = None
        self._threads = Threads("the training queue", 1, patience_s=_PATIENCE_S)
        self._fault = ""  # last logged reason why the queue waits

    def start(self) -> None:
        """Start to run jobs."""
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Stop the running child. Its job resumes from the last checkpoint at the next start."""
        if self._task:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._threads.close()

    async def _work(self) -> None:
        while True:
            try:
                if await self._threads.run(self._jobs.database.open):
                    async with _exclusive_lock(self._settings.runs / "runner.lock"):
                        await self._run_jobs()
            except (Unavailable, OSError) as error:
                self._warn(error)
            except Exception:  # one job must not end the queue
                log.exception("an error occurred in the training queue; it continues")
            await asyncio.sleep(_LEASE_POLL_S)

    async def _run_jobs(self) -> None:
        while True:
            if claimed := await self._threads.run(self._jobs.claim):
                await self._execute(*claimed)
            else:
                await asyncio.sleep(_POLL_S)

    def _warn(self, error: Exception) -> None:
        """Log why the queue waits, once for each reason."""
        if self._fault != str(error):
            self._fault = str(error)
            log.warning("the training queue waits and retries: %s", error)

    async def _execute(self, job: TrainingJobSummary, recipe: Recipe) -> None:
        """Run a job, or wait for its running process, until it has ended. Record the outcome."""
        run = self._jobs.run_folder(job.id)
        if await self._threads.run(run.stop_file.exists):  # a server died while it was cancelling the job
            await self._threads.run(self._jobs.cancel, job.id)
            return
        crash: str | None = None
        try:
            if holder := await self._threads.run(run.holder):
                log.info("training job %s is still running as process %d", job.id, holder)
                await self._watch(job, holder, lambda: run.holder(wait_s=0) == holder)
                crash = "the training process has died"
            elif not await self._threads.run(run.outcome):
                killed = _count_oom_kills()
                code = await self._run_child(job, recipe, run)
                if code == os.EX_TEMPFAIL:  # another process holds the folder; the job will be claimed again
                    return
                if code > 0 and code != _INTERRUPTED and not await self._threads.run(run.outcome):
                    said = await self._threads.run(_last_line, run.output_file)
                    await self._jobs.record_outcome(self._threads, self._jobs.fail, job.id, said)
                    return
                crash = _describe_exit(code, _count_oom_kills() > killed)
        except asyncio.CancelledError:
            with suppress(Unavailable):  # the next start resumes a running job without a process as well
                await self._threads.run(self._jobs.interrupt, job.id)
            raise
        except (OSError, RunError) as error:  # the process cannot start, or the run folder is damaged
            await self._jobs.record_outcome(self._threads, self._jobs.fail, job.id, f"the job cannot continue: {error}")
            return
        if publication := await self._threads.run(run.outcome):
            await self._jobs.record_outcome(self._threads, self._jobs.succeed, job.id, publication)
            await self._threads.run(self.prune, publication.model)
            await self._on_published()
        else:
            await self._jobs.record_outcome(self._threads, self._jobs.interrupt, job.id, crash)

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

    async def _run_child(self, job: TrainingJobSummary, recipe: Recipe, run: Run) -> int:
        """Start a job's process and wait for it.

        Returns:
            The exit status, negative for a signal. `os.EX_TEMPFAIL` if another process works in the run folder.
        """
        run.path.mkdir(parents=True, exist_ok=True)
        cpus = len(service_cpus()) if self._settings.workers > 1 else cpu_count()
        threads = str(self._settings.training_threads or max(1, cpus - 1))
        environment = {name: value for name, value in os.environ.items() if name.upper() not in _SECRETS}
        environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if self._settings.data:
            environment["CIFAR100_DATA"] = self._settings.data
        # This process takes the lock and the child inherits it. If the child took the lock, a server that replaces this
        # one before the child has loaded its libraries would find the folder unlocked and no process to end.
        try:
            with run.lock_for_child() as lock, run.output_file.open("ab") as output:
                child = await asyncio.create_subprocess_exec(
                    *self._command(job, recipe, run),
                    *("--lock", str(lock.fileno())),
                    stdin=DEVNULL,
                    stdout=output,
                    stderr=STDOUT,
                    env=environment,
                    start_new_session=True,
                    pass_fds=(lock.fileno(),),
                )
                write_pid(lock, child.pid)
        except RunBusy:
            return os.EX_TEMPFAIL
        _lower_priority(child.pid, self._settings.training_niceness)
        if self._settings.workers > 1:
            with suppress(OSError):
                os.sched_setaffinity(child.pid, service_cpus())
        log.info("training job %s runs as process %d", job.id, child.pid)
        await self._watch(job, child.pid, lambda: child.returncode is None)
        return await child.wait()

    async def _watch(self, job: TrainingJobSummary, pid: int, alive: Callable[[], bool]) -> None:
        """Wait for a process to end. Terminate it if its job or this task is cancelled."""
        try:
            while alive():
                await asyncio.sleep(_POLL_S)
                with suppress(Unavailable):  # a temporary failure of the database does not end the process
                    if await self._threads.run(self._jobs.state, job.id) is State.CANCELLED:
                        break
        finally:
            await _terminate(pid, alive)

    def _command(self, job: TrainingJobSummary, recipe: Recipe, run: Run) -> list[str]:
        command = [sys.executable, "-m", "training", "train", recipe.name]
        if run.recipe_file.exists():
            command.append("--resume")
        else:
            original = RECIPES[recipe.name]
            changed = [field for field in Recipe.model_fields if getattr(recipe, field) != getattr(original, field)]
            command += [f"{field}={format_value(getattr(recipe, field))}" for field in changed]
        command += ["--run", str(run.path), "--models", str(self._settings.models), "--promote", job.request.promote]
        command.append("--debug")  # the output of the process has the traceback of an error
        return command


@asynccontextmanager
async def _exclusive_lock(lock: Path) -> AsyncIterator[None]:
    """Wait for an exclusive file lock and hold it. The operating system releases it if this process crashes."""
    with lock.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(_LEASE_POLL_S)
        yield


def _lower_priority(pid: int, niceness: int) -> None:
    """Lower the CPU priority of a training process, and make the OOM killer prefer it."""
    with suppress(ProcessLookupError):
        set_niceness(pid, min(os.getpriority(os.PRIO_PROCESS, 0) + niceness, 19))
    with suppress(OSError):  # if memory runs out, the kernel kills the training process, not the server
        Path(f"/proc/{pid}/oom_score_adj").write_text(_OOM_SCORE)


async def _terminate(pid: int, alive: Callable[[], bool]) -> None:
    """End a process group with SIGTERM, then with SIGKILL after a grace period of 3 s."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        if not alive():
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, sent)
        with suppress(TimeoutError):
            async with asyncio.timeout(_TERM_GRACE_S):
                while alive():  # noqa: ASYNC110  a process that is not our child sends no event
                    await asyncio.sleep(_POLL_S / 10)


def _last_line(output: Path) -> str:
    """Return the last line of a failed process's output. Out-of-memory errors get a common prefix."""
    lines = output.read_text("utf-8", errors="replace").strip().splitlines() or ["no output"]
    line = lines[-1].removeprefix("error: ")
    if any(sign in line for sign in _OUT_OF_MEMORY) and not line.startswith("out of memory"):
        return f"out of memory: {line}"
    return line


def _describe_exit(code: int, for_memory: bool) -> str:
    """Return the reason why a process ended without an error message of its own.

    Args:
        code: Exit status, negative for a signal.
        for_memory: True if the kernel killed a process for lack of memory in the meantime.
    """
    if code == -signal.SIGKILL and for_memory:
        return "out of memory: the kernel has killed the training process"
    if code < 0:
        return f"the training process was killed by {signal.Signals(-code).name}"
    return (
        "the training process was stopped by a signal"
        if code == _INTERRUPTED
        else f"the training process exited with status {code} and published no model"
    )


def _count_oom_kills() -> int:
    """Return how many processes the OOM killer has killed since boot, or 0 if the kernel does not report it."""
    try:
        counters = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in counters if line.startswith("oom_kill ")), 0)
