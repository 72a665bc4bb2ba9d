"""Several processes that serve on one port, as one process runs Python on one processor only. Linux only.

    supervisor --> worker, worker, ...    each of them the whole service, on its share of the processors

The supervisor accepts connections and deals them out in turn, so that even a few are shared evenly; the kernel, which
could spread them as well (SO_REUSEPORT), does so by chance. Until a worker has loaded its models, connections wait.
Workers share what all servers on one store and one runs folder do: models, jobs, measurements; their metrics are added
up. One that dies or hangs is replaced. They ignore the signals that stop the service, which often go to a whole group
of processes, and listen to the supervisor instead.

A worker's standard input is a socket, its line to the supervisor. The supervisor sends connections over it, and a byte
to have the worker drain. It closes the line, however it ends, to have the worker finish what is under way and end. The
worker writes a byte every second, as long as it responds: while it loads its models a thread does so, later the event
loop. A worker that still loads serves nothing and ends at once.
"""

import fcntl
import logging
import math
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from prometheus_client.multiprocess import mark_process_dead

from app.settings import MIB, Settings
from app.signals import exit_status, on_stop
from app.startup import StartupError
from training.store import locked

log = logging.getLogger(__name__)

METRICS = "PROMETHEUS_MULTIPROC_DIR"
"""Where the workers write their metrics: prometheus_client's environment variable."""

CONNECTION = b"c"
"""What the supervisor writes with the file descriptor of each connection."""

DRAIN = b"d"
"""What the supervisor writes to have a worker drain."""

LOADING = b"l"
"""What a worker writes while it loads its models."""

BEAT = b"b"
"""What a worker writes as long as it responds."""

BEAT_S = 1.0

_POLL_S = 0.2
_START_S = 30.0  # a worker that gives up sooner cannot start at all
_LOAD_S = 300.0  # a worker that has not loaded its models by then hangs
_QUIET_S = 3.0  # a worker that sends no beat for so long gets no connections
_SILENCE_S = 20.0  # and for so long hangs
# Importing PyTorch holds the interpreter: of eight workers that started on two processors some were silent for 7 s.
_LOADING_SILENCE_S = 60.0
_STOP_S = 30.0  # a worker told to end gives the requests under way 20
_HURRY_S = 10.0  # and less where a further signal comes
_PACE_S = 2.0  # between two starts in one place
_MAX_PER_PROCESSOR = 4
_WORKER_BYTES = 512 * MIB  # a worker with the two models of this repository has 440 MiB that it shares with no other
_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # Linux' control groups, version 2
_MEMORY_MAX = Path("/sys/fs/cgroup/memory.max")
_LOCK = "lock"
_PACKAGES = Path(__file__).parents[1]


def processors() -> int:
    """How many this process may use; a container may have the time of some of the machine's only."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CPU_MAX.read_text().split()
    except (OSError, ValueError):
        return allowed
    return allowed if quota == "max" else min(allowed, math.ceil(int(quota) / int(period)))


def memory_bytes() -> int:
    """How much this process may use; a container may have some of the machine's only."""
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(installed, int(_MEMORY_MAX.read_text()))
    except (OSError, ValueError):  # it is "max" without a limit
        return installed


def max_workers() -> int:
    """How many workers this machine can run: more would wait for processors, or take memory that it does not have."""
    return max(1, min(_MAX_PER_PROCESSOR * processors(), memory_bytes() // _WORKER_BYTES))


def choose_count(wanted: int) -> int:
    """The number of workers to start.

    Args:
        wanted: 0 for one on each processor, or fewer where memory does not suffice.

    Raises:
        StartupError: this machine cannot run so many, or is not Linux.
    """
    number = wanted or min(processors(), max_workers())
    if number > 1 and sys.platform != "linux":
        raise StartupError("CIFAR100_WORKERS: several workers need Linux; give 1")
    if number > max_workers():
        raise StartupError(
            f"CIFAR100_WORKERS: {number:,} workers are more than this machine can run; give at most {max_workers()}: "
            f"{_MAX_PER_PROCESSOR} for each of {processors()} processors, and {_WORKER_BYTES // MIB} MiB of memory "
            f"for each, of {memory_bytes() // MIB:,}"
        )
    return number


class Line:
    """A worker's end of the socket to its supervisor.

    Until `loaded` is called, a thread sends a beat every second. It ends the process as soon as the supervisor orders
    anything or is gone, even by SIGKILL before the worker has begun to load: nothing is served yet.

    Args:
        line: the socket.
    """

    def __init__(self, line: socket.socket):
        self.socket = line
        self._changing = threading.Lock()
        self._loading = True
        threading.Thread(target=self._attend, name="line", daemon=True).start()

    @classmethod
    def of_stdin(cls) -> Self:
        return cls(socket.socket(fileno=os.dup(sys.stdin.fileno())))

    def loaded(self) -> None:
        """Leave the line to the event loop."""
        with self._changing:
            self._loading = False

    def beat(self, message: bytes) -> None:
        with suppress(OSError):  # the supervisor may be busy with something else, or gone
            self.socket.send(message, socket.MSG_DONTWAIT)

    def _attend(self) -> None:
        ordered = False
        while True:
            with self._changing:  # so that nothing that is meant for the event loop ends the process
                if not self._loading:
                    return
                if ordered:
                    os._exit(0)
                self.beat(LOADING)
            ordered = bool(select.select([self.socket], [], [], BEAT_S)[0])


class Worker:
    """A worker process, as its supervisor sees it.

    Args:
        process: just started.
        line: to the socket that is its standard input.
        replaces: whether there was another one in its place.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", line: socket.socket, replaces: bool):
        self.process = process
        self.replaces = replaces
        self._line = line
        self.started = time.monotonic()
        self._loaded = False
        self._loading_s = 0.0
        self._silent_s = 0.0
        line.setblocking(False)

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.started

    @property
    def responds(self) -> bool:
        """Whether it has loaded its models, and does not seem to hang."""
        return self._loaded and 0 <= self._silent_s < _QUIET_S

    def kill_if_hanging(self) -> None:
        """Kill it if it has sent no beat for too long, or loads for too long; called at every poll.

        Polls are counted, not seconds, so that a machine that stood still for a while kills no worker.
        """
        beats = b""
        with suppress(BlockingIOError, ConnectionResetError):
            beats = self._line.recv(4096)
        self._loaded = self._loaded or BEAT in beats
        self._loading_s += 0 if self._loaded else _POLL_S
        self._silent_s = 0 if beats else self._silent_s + _POLL_S
        is_silent = self._silent_s > (_SILENCE_S if self._loaded else _LOADING_SILENCE_S)
        if (is_silent or self._loading_s > _LOAD_S) and self.process.poll() is None:
            fault = "does not respond" if is_silent else "does not finish loading its models"
            log.error("worker %d %s and is killed", self.process.pid, fault)
            self.process.kill()
            self._silent_s = self._loading_s = -math.inf

    def take(self, connection: socket.socket) -> bool:
        """Hand a connection over to it; false if it has ended, or has too many that it has not taken yet."""
        try:
            socket.send_fds(self._line, [CONNECTION], [connection.fileno()])
        except OSError:
            return False
        return True

    def drain(self) -> None:
        with suppress(OSError):  # it may have just ended
            self._line.send(DRAIN)

    def end(self) -> None:
        """Have it finish its requests and end. A worker that is still loading ends at once."""
        self._line.close()

    def hurry(self) -> None:
        """Have a worker that is ending drop its requests."""
        self.process.terminate()


class Supervisor:
    """Starts workers, deals out connections, replaces workers that die or hang, and stops them.

    Args:
        settings: how many workers, and how long they go on after SIGTERM, not ready any more.
        listening: sockets of `app.startup.listen`.
    """

    def __init__(self, settings: Settings, listening: Sequence[socket.socket]):
        self._listening = listening
        self._workers = settings.workers
        self._drain_s = settings.drain_s
        self._runs = settings.runs
        self._processors = sorted(os.sched_getaffinity(0))
        self._signals: list[int] = []
        self._dealt = 0

    def run(self) -> int:
        """Supervise until a signal stops the service, or a worker cannot start.

        A second signal cuts draining short, as SIGINT does, and a further one what is under way.

        Returns:
            The exit status.
        """
        on_stop(lambda number, _: self._signals.append(number))
        with _metrics_folder(self._runs) as (metrics, lock):
            running: list[Worker] = []
            status = self._start_all(running, metrics, lock)
            while not self._signals and not status:
                self._deal(running)
                for place, worker in enumerate(running):
                    worker.kill_if_hanging()
                    process = worker.process
                    if process.poll() is None or worker.age_s < _PACE_S:
                        continue
                    if process.returncode > 0 and not worker.replaces and worker.age_s < _START_S:
                        status = process.returncode
                        break
                    log.error("worker %d has ended with %d and is replaced", process.pid, process.returncode)
                    mark_process_dead(process.pid, metrics)
                    try:
                        running[place] = self._start(place, metrics, lock, replaces=True)
                        worker.end()
                    except OSError as error:  # such as no memory; tried again after a pause
                        log.error("no worker can be started: %s", error)
                        worker.started, worker.replaces = time.monotonic(), True
            self._stop(running)
        return exit_status(self._signals) or status

    def _start_all(self, running: list[Worker], metrics: Path, lock: int) -> int:
        """Start the workers, until a signal comes.

        Returns:
            The exit status of a service that cannot start, or 0.
        """
        for place in range(self._workers):
            if self._signals:
                break
            try:
                running.append(self._start(place, metrics, lock, replaces=False))
            except OSError as error:
                log.error("no worker can be started: %s", error)
                return 1
        return 0

    def _deal(self, running: list[Worker]) -> None:
        """Hand the connections that come until the next poll to those who respond, one after the other."""
        end = time.monotonic() + _POLL_S
        responding = [worker for worker in running if worker.responds]
        while (left := end - time.monotonic()) > 0:
            if not responding:
                time.sleep(left)
            else:
                for ready in select.select(self._listening, [], [], left)[0]:
                    self._hand_over(ready, responding)

    def _hand_over(self, listening: socket.socket, responding: list[Worker]) -> None:
        """Give a connection to the worker whose turn it is, or if it takes none to the next one."""
        try:
            connection, _ = listening.accept()
        except OSError:  # it is gone already, or there are too many open files
            time.sleep(0.01)
            return
        with connection:
            for _ in responding:
                self._dealt += 1
                if responding[self._dealt % len(responding)].take(connection):
                    break

    def _start(self, place: int, metrics: Path, lock: int, replaces: bool) -> Worker:
        share = self._processors[place :: self._workers] or [self._processors[place % len(self._processors)]]
        host, port, *_ = self._listening[0].getsockname()
        # This very package, whatever lies in the current folder.
        command = [sys.executable, "-P", "-m", "app", "--host", host, "--port", str(port), "--worker"]
        search = os.pathsep.join(filter(None, (str(_PACKAGES), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {METRICS: str(metrics), "CIFAR100_WORKERS": str(self._workers), "PYTHONPATH": search}
        line, its_line = socket.socketpair()
        try:
            with its_line, only_on(set(share)):
                process = subprocess.Popen(command, stdin=its_line.fileno(), env=environment, pass_fds=(lock,))
        except BaseException:
            line.close()
            raise
        return Worker(process, line, replaces)

    def _stop(self, running: list[Worker]) -> None:
        for worker in running:
            worker.drain()
        end = time.monotonic() + self._drain_s
        while (
            any(worker.process.poll() is None for worker in running)
            and time.monotonic() < end
            and len(self._signals) < 2
            and signal.SIGINT not in self._signals
        ):
            self._deal(running)
            for worker in running:
                worker.kill_if_hanging()
        for listening in self._listening:
            listening.close()
        for worker in running:
            worker.end()
        signals = len(self._signals)
        latest = time.monotonic() + _STOP_S
        while left := [worker for worker in running if worker.process.poll() is None]:
            if len(self._signals) > signals:
                signals = sys.maxsize  # once
                latest = min(latest, time.monotonic() + _HURRY_S)
                for worker in left:
                    worker.hurry()
            if time.monotonic() > latest:
                for worker in left:
                    log.error("worker %d does not end and is killed", worker.process.pid)
                    worker.process.kill()
                    worker.process.wait()
            time.sleep(_POLL_S / 10)


@contextmanager
def _metrics_folder(runs: Path) -> Iterator[tuple[Path, int]]:
    """A folder for the workers' metrics, and a file descriptor for every worker to inherit.

    prometheus_client adds up files that it finds by the name of their folder, and no process can remove a folder after
    its own SIGKILL. The folder therefore lies in the runs folder, where the next start finds and removes it. The file
    descriptor holds a lock while the supervisor or a worker lives, so that servers which share a runs folder remove
    only folders that are left over.
    """
    try:
        root = runs.absolute() / "metrics"
        root.mkdir(parents=True, exist_ok=True)
        with locked(root):
            for left in root.glob("*/"):
                with suppress(OSError), (left / _LOCK).open("w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left)
            folder = Path(tempfile.mkdtemp(dir=root))
            file = (folder / _LOCK).open("w")
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:  # the service goes on without training where the runs folder cannot be used
        log.warning("%s cannot be written, metrics are kept in the temporary folder: %s", runs, error)
        folder = Path(tempfile.mkdtemp(prefix="cifar100-metrics-"))
        file = (folder / _LOCK).open("w")
    try:
        with file:
            yield folder, file.fileno()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def processors_of_all() -> set[int]:
    """The processors of all workers together; called by one of them."""
    return os.sched_getaffinity(os.getppid())


@contextmanager
def only_on(processors: set[int]) -> Iterator[None]:
    """What is started within has these processors."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processors)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
