"""Train jobs in child processes `python -m training train` of this machine, one at a time.

The child runs at low priority in its own process group. It holds a lock on its run folder, so that a server that starts
after a crash can tell whether the child is alive. With a SQLite database, the child survives its server: the next
server waits for the child or resumes the run, and no job runs twice. With a shared database, another machine may take
the job over, so the child ends with its server or before the lease expires.
"""

import asyncio
import logging
import os
import signal
import time
from asyncio.subprocess import DEVNULL, STDOUT
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import getnode

from app.exceptions import Unavailable
from app.jobs.executor import Ending, last_line, make_command
from app.jobs.lease import LeaseKeeper
from app.jobs.training_queue import TrainingJobSummary, TrainingQueue
from app.machine import cpu_count, set_niceness
from app.server.workers import service_cpus
from app.settings import Settings
from app.threads import Threads
from training.lifeline import Lifeline
from training.recipes import Recipe
from training.run import Run, RunBusy, write_pid

log = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a machine
_OOM_SCORE = "500"  # the OOM killer adds half of the machine's memory to the process's score
_POLL_S = 0.3
_PUSH_S = 1.0  # shortest time between two copies of the files of a run
_TERM_GRACE_S = 3.0
_INTERRUPTED = 130  # exit status of a training process that a signal stopped
_SECRETS = ("CIFAR100_API_KEYS", "CIFAR100_API_KEY", "CIFAR100_DATABASE")
"""Environment variables that a training process must not see."""


class LocalExecutor:
    """Trains in a child process.

    Args:
        settings: Folders and number of threads.
        jobs: The queue.
        lease: Leases of this process.
        threads: Threads for the queue and the run folders.
    """

    capacity = 1
    survives = False

    def __init__(self, settings: Settings, jobs: TrainingQueue, lease: LeaseKeeper, threads: Threads):
        self._settings = settings
        self._jobs = jobs
        self._lease = lease
        self._threads = threads

    def device(self) -> str:
        """Return a name of the GPU or of the machine that differs from those of all other machines."""
        import torch

        from training.resources import default_device

        machine = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else f"{getnode():x}"
        is_gpu = default_device().type == "cuda"
        return f"{machine}-{torch.cuda.get_device_properties(0).uuid}" if is_gpu else f"{machine}-cpu"

    async def run(self, job: TrainingJobSummary, recipe: Recipe, run: Run) -> Ending | None:
        """Run a job's process, or wait for one that a dead server has left, until it has ended."""
        if holder := await self._threads.run(run.holder):
            log.info("training job %s is still running as process %d", job.id, holder)
            await self._watch(job, holder, lambda: run.holder(wait_s=0) == holder)
            return Ending(crash="the training process has died")
        if await self._threads.run(run.outcome):
            return Ending()
        killed = _count_oom_kills()
        code = await self._run_child(job, recipe, run)
        if code == os.EX_TEMPFAIL:  # another process holds the folder
            return None
        if not self._lease.valid:  # the process has ended itself, because the database cannot be reached
            return Ending()
        if code > 0 and code != _INTERRUPTED:
            return Ending(error=await self._threads.run(last_line, run.output_file))
        return Ending(crash=_describe_exit(code, _count_oom_kills() > killed))

    async def stop(self, job_id: str) -> None:
        """Do nothing, because no process survives unnoticed."""

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
        with self._open_lifeline() as lifeline:
            inherited = {"--lifeline": lifeline.child_end} if lifeline else {}
            try:
                with run.lock_for_child() as lock, run.output_file.open("ab") as output:
                    inherited["--lock"] = lock.fileno()
                    child = await asyncio.create_subprocess_exec(
                        *make_command(recipe, run, self._settings.models, job.request.promote),
                        *(word for option, descriptor in inherited.items() for word in (option, str(descriptor))),
                        stdin=DEVNULL,
                        stdout=output,
                        stderr=STDOUT,
                        env=environment,
                        start_new_session=True,
                        pass_fds=tuple(inherited.values()),
                    )
                    write_pid(lock, child.pid)
            except RunBusy:
                return os.EX_TEMPFAIL
            _lower_priority(child.pid, self._settings.training_niceness)
            if self._settings.workers > 1:
                with suppress(OSError):
                    os.sched_setaffinity(child.pid, service_cpus())
            log.info("training job %s runs as process %d", job.id, child.pid)
            await self._watch(job, child.pid, lambda: child.returncode is None, lifeline)
            return await child.wait()

    @contextmanager
    def _open_lifeline(self) -> Iterator[Lifeline | None]:
        """Open the pipe that ends the child with the lease. With SQLite, the child survives its server."""
        if not self._jobs.database.shared:
            yield None
            return
        with Lifeline() as lifeline:
            lifeline.extend(self._lease.deadline)
            yield lifeline

    async def _watch(
        self, job: TrainingJobSummary, pid: int, alive: Callable[[], bool], lifeline: Lifeline | None = None
    ) -> None:
        """Wait for a process to end. Terminate it if this task is cancelled, or this process no longer has the job."""
        pushed = 0.0
        try:
            while alive():
                await asyncio.sleep(_POLL_S)
                if lifeline:
                    lifeline.extend(self._lease.deadline)
                with suppress(Unavailable):  # a temporary failure of the database does not end the process
                    if not await self._threads.run(self._jobs.is_held, job.id):
                        break
                    if time.monotonic() - pushed > _PUSH_S:
                        await self._threads.run(self._jobs.push_files, job.id)
                        pushed = time.monotonic()
        finally:
            await _terminate(pid, alive)


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
