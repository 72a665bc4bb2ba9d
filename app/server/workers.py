"""Runs several server processes on one port, because one Python process uses only one CPU. Linux only.

    supervisor --> worker, worker, ...    each worker is the whole service, on its share of the CPUs

The supervisor accepts connections and distributes them round robin, so that even a few connections are shared evenly.
The kernel could distribute them too (SO_REUSEPORT), but it does so at random. Connections wait until a worker has
loaded its models.

Workers share models, jobs and evaluations through the model store and the runs folder, as all servers on the same
folders do. Their metrics are summed. The supervisor replaces a worker that dies or hangs. Workers ignore the signals
that stop the service, because these often go to a whole process group. They follow the supervisor instead.

A worker's standard input is a socket to the supervisor, called its line. The supervisor sends connections over it, and
one byte that makes the worker drain. When the link closes, the worker finishes its requests and exits. This also
happens when the supervisor is killed. The worker sends a heartbeat byte every second while it responds: a thread sends
it during model loading, the event loop afterwards. A worker that is still loading serves no requests and exits at once.
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

from app.machine import MIB, cpu_affinity, cpu_count, memory_bytes
from app.server.signals import exit_status, handle_stop_signals
from app.server.startup import StartupError
from app.settings import Settings
from training.files import lock_folder

log = logging.getLogger(__name__)

METRICS = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable of prometheus_client that names the folder of the workers' metrics."""

CONNECTION = b"c"
"""Byte that the supervisor sends with the file descriptor of each connection."""

DRAIN = b"d"
"""Byte that the supervisor sends to make a worker drain."""

LOADING = b"l"
"""Heartbeat of a worker that is loading its models."""

BEAT = b"b"
"""Heartbeat of a worker that has loaded its models and responds."""

BEAT_S = 1.0

_POLL_S = 0.2
_START_S = 30.0  # a first worker that fails sooner than this ends the service
_LOAD_S = 300.0  # a worker that takes longer to load its models hangs
_QUIET_S = 3.0  # a worker without a heartbeat for this long gets no connections
_SILENCE_S = 20.0  # a worker without a heartbeat for this long hangs
# Importing PyTorch holds the GIL: when eight workers started on two CPUs, some sent no heartbeat for 7 s.
_LOADING_SILENCE_S = 60.0
_STOP_S = 30.0  # a stopping worker gives its requests 20 s
_HURRY_S = 10.0  # limit after a further signal
_PACE_S = 2.0  # minimum time between two starts of the same worker
_MAX_PER_CPU = 4
_WORKER_BYTES = 512 * MIB  # a worker with this repository's two models has 440 MiB of private memory
_LOCK = "lock"
_PACKAGES = Path(__file__).parents[2]


def max_workers() -> int:
    """Return the number of workers that this machine can run: up to 4 per CPU, with 512 MiB of memory each.

    More workers would wait for CPUs or run out of memory.
    """
    return max(1, min(_MAX_PER_CPU * cpu_count(), memory_bytes() // _WORKER_BYTES))


def choose_count(wanted: int) -> int:
    """Return the number of workers to start.

    Args:
        wanted: Number of workers. 0 means one per CPU, or fewer if memory is short.

    Raises:
        StartupError: The machine cannot run this many workers, or several are requested and the system is not Linux.
    """
    number = wanted or min(cpu_count(), max_workers())
    if number > 1 and sys.platform != "linux":
        raise StartupError("CIFAR100_WORKERS: several workers need Linux; use 1")
    if number > max_workers():
        raise StartupError(
            f"CIFAR100_WORKERS: {number:,} workers are more than this machine can run; use at most {max_workers()}: "
            f"{_MAX_PER_CPU} for each of {cpu_count()} CPUs, and {_WORKER_BYTES // MIB} MiB of memory "
            f"for each, of {memory_bytes() // MIB:,}"
        )
    return number


class SupervisorLink:
    """A worker's end of the socket to its supervisor.

    Until `finish_loading` is called, a thread sends a heartbeat every second. The thread ends the process as soon as
    the supervisor sends an order or is gone, even if the supervisor was killed before the worker began to load. No
    request is lost, because a loading worker serves none.

    Args:
        link: The socket.
    """

    def __init__(self, link: socket.socket):
        self.socket = link
        self._changing = threading.Lock()
        self._loading = True
        threading.Thread(target=self._beat_while_loading, name="line", daemon=True).start()

    @classmethod
    def from_stdin(cls) -> Self:
        """Create the link of this worker from its standard input."""
        return cls(socket.socket(fileno=os.dup(sys.stdin.fileno())))

    def finish_loading(self) -> None:
        """Stop the thread. The event loop reads the line and sends heartbeats from now on."""
        with self._changing:
            self._loading = False

    def beat(self, message: bytes) -> None:
        """Send a heartbeat: `LOADING` or `BEAT`."""
        with suppress(OSError):  # the socket is full or the supervisor is gone
            self.socket.send(message, socket.MSG_DONTWAIT)

    def _beat_while_loading(self) -> None:
        ordered = False
        while True:
            with self._changing:  # an order after `finish_loading` belongs to the event loop
                if not self._loading:
                    return
                if ordered:
                    os._exit(0)
                self.beat(LOADING)
            ordered = bool(select.select([self.socket], [], [], BEAT_S)[0])


class Worker:
    """The supervisor's view of a worker process.

    Args:
        process: The process, just started.
        link: Socket connected to the standard input of the process.
        replaces: True if the worker replaces an earlier one.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", link: socket.socket, replaces: bool):
        self.process = process
        self.replaces = replaces
        self._link = link
        self.started = time.monotonic()
        self._loaded = False
        self._loading_s = 0.0
        self._silent_s = 0.0
        link.setblocking(False)

    @property
    def age_s(self) -> float:
        """Seconds since the process was started."""
        return time.monotonic() - self.started

    @property
    def is_responding(self) -> bool:
        """True if the worker has loaded its models and sent a heartbeat within the last 3 s."""
        return self._loaded and 0 <= self._silent_s < _QUIET_S

    def kill_if_hanging(self) -> None:
        """Kill the worker if its heartbeat stopped or if it loads for too long. Call this at every poll.

        The method counts polls instead of seconds, so that a machine that was suspended does not kill its workers.
        """
        beats = b""
        with suppress(BlockingIOError, ConnectionResetError):
            beats = self._link.recv(4096)
        self._loaded = self._loaded or BEAT in beats
        self._loading_s += 0 if self._loaded else _POLL_S
        self._silent_s = 0 if beats else self._silent_s + _POLL_S
        is_silent = self._silent_s > (_SILENCE_S if self._loaded else _LOADING_SILENCE_S)
        if (is_silent or self._loading_s > _LOAD_S) and self.process.poll() is None:
            fault = "does not respond" if is_silent else "does not finish loading its models"
            log.error("worker %d %s and is killed", self.process.pid, fault)
            self.process.kill()
            self._silent_s = self._loading_s = -math.inf

    def send_connection(self, connection: socket.socket) -> bool:
        """Send a connection to the worker. Return False if the worker has ended or its socket buffer is full."""
        try:
            socket.send_fds(self._link, [CONNECTION], [connection.fileno()])
        except OSError:
            return False
        return True

    def drain(self) -> None:
        """Make the worker report that it is not ready. It goes on serving."""
        with suppress(OSError):  # the worker may have ended
            self._link.send(DRAIN)

    def end(self) -> None:
        """Make the worker finish its requests and exit. A worker that is still loading exits at once."""
        self._link.close()

    def terminate(self) -> None:
        """Make a stopping worker drop its requests."""
        self.process.terminate()


class Supervisor:
    """The process that starts workers, distributes connections, replaces dead or hanging workers, and stops them.

    Args:
        settings: Number of workers, drain time after SIGTERM, and runs folder.
        listening: Listening sockets from `app.server.startup.listen`, or a unix socket.
    """

    def __init__(self, settings: Settings, listening: Sequence[socket.socket]):
        self._listening = listening
        self._workers = settings.workers
        self._drain_s = settings.drain_s
        self._runs = settings.runs
        self._address = address_options(settings, listening)
        self._cpus = sorted(os.sched_getaffinity(0))
        self._signals: list[int] = []
        self._turn = 0

    def run(self) -> int:
        """Supervise workers until a signal stops the service or a worker cannot start.

        SIGINT or a second signal ends draining early. A further signal drops the requests in progress.

        Returns:
            The exit status.
        """
        handle_stop_signals(lambda number, _: self._signals.append(number))
        with _metrics_folder(self._runs) as (metrics, lock):
            running: list[Worker] = []
            status = self._start_all(running, metrics, lock)
            while not self._signals and not status:
                self._distribute(running)
                for place, worker in enumerate(running):
                    worker.kill_if_hanging()
                    process = worker.process
                    if process.poll() is None or worker.age_s < _PACE_S:
                        continue
                    if process.returncode > 0 and not worker.replaces and worker.age_s < _START_S:
                        status = process.returncode
                        break
                    log.error("worker %d exited with status %d and is replaced", process.pid, process.returncode)
                    mark_process_dead(process.pid, metrics)
                    try:
                        running[place] = self._start(place, metrics, lock, replaces=True)
                        worker.end()
                    except OSError as error:  # for example no memory; retried after a pause
                        log.error("a worker cannot be started: %s", error)
                        worker.started, worker.replaces = time.monotonic(), True
            self._stop(running)
        return exit_status(self._signals) or status

    def _start_all(self, running: list[Worker], metrics: Path, lock: int) -> int:
        """Start the workers. Stop early if a signal arrives.

        Returns:
            1 if a process cannot be started, else 0.
        """
        for place in range(self._workers):
            if self._signals:
                break
            try:
                running.append(self._start(place, metrics, lock, replaces=False))
            except OSError as error:
                log.error("a worker cannot be started: %s", error)
                return 1
        return 0

    def _distribute(self, running: list[Worker]) -> None:
        """Distribute new connections round robin to the responding workers, until the next poll."""
        end = time.monotonic() + _POLL_S
        responding = [worker for worker in running if worker.is_responding]
        while (left := end - time.monotonic()) > 0:
            if not responding:
                time.sleep(left)
            else:
                for ready in select.select(self._listening, [], [], left)[0]:
                    self._send_to_worker(ready, responding)

    def _send_to_worker(self, listening: socket.socket, responding: list[Worker]) -> None:
        """Accept a connection and send it to the next worker. Try the others if that worker does not take it."""
        try:
            connection, _ = listening.accept()
        except OSError:  # the client is gone, or too many files are open
            time.sleep(0.01)
            return
        with connection:
            for _ in responding:
                self._turn += 1
                if responding[self._turn % len(responding)].send_connection(connection):
                    break

    def _start(self, place: int, metrics: Path, lock: int, replaces: bool) -> Worker:
        share = self._cpus[place :: self._workers] or [self._cpus[place % len(self._cpus)]]
        # -P and PYTHONPATH make the worker import this package, even if the current folder has another `app`.
        command = [sys.executable, "-P", "-m", "app", *self._address, "--worker"]
        search = os.pathsep.join(filter(None, (str(_PACKAGES), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {METRICS: str(metrics), "CIFAR100_WORKERS": str(self._workers), "PYTHONPATH": search}
        link, worker_end = socket.socketpair()
        try:
            with worker_end, cpu_affinity(set(share)):
                process = subprocess.Popen(command, stdin=worker_end.fileno(), env=environment, pass_fds=(lock,))
        except BaseException:
            link.close()
            raise
        return Worker(process, link, replaces)

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
            self._distribute(running)
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
                signals = sys.maxsize  # hurry the workers only once
                latest = min(latest, time.monotonic() + _HURRY_S)
                for worker in left:
                    worker.terminate()
            if time.monotonic() > latest:
                for worker in left:
                    log.error("worker %d does not exit and is killed", worker.process.pid)
                    worker.process.kill()
                    worker.process.wait()
            time.sleep(_POLL_S / 10)


def address_options(settings: Settings, listening: Sequence[socket.socket]) -> list[str]:
    """Return the command line options that tell a worker where its supervisor listens."""
    if settings.uds:
        return ["--uds", os.fspath(settings.uds)]
    return ["--host", settings.host, "--port", str(listening[0].getsockname()[1])]


@contextmanager
def _metrics_folder(runs: Path) -> Iterator[tuple[Path, int]]:
    """Create a folder for the workers' metrics. Yield its path and a file descriptor that every worker inherits.

    prometheus_client finds its files by folder name, and a supervisor killed by SIGKILL cannot remove the folder. The
    folder is therefore inside the runs folder, where the next start finds and removes it. The file descriptor holds a
    lock while the supervisor or a worker is alive. Servers that share a runs folder thus remove only unused folders.
    """
    try:
        root = runs.absolute() / "metrics"
        root.mkdir(parents=True, exist_ok=True)
        with lock_folder(root):
            for left in root.glob("*/"):
                with suppress(OSError), (left / _LOCK).open("w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left)
            folder = Path(tempfile.mkdtemp(dir=root))
            file = (folder / _LOCK).open("w")
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:  # without a usable runs folder the service runs without training
        log.warning("%s cannot be written, metrics are kept in the temporary folder: %s", runs, error)
        folder = Path(tempfile.mkdtemp(prefix="cifar100-metrics-"))
        file = (folder / _LOCK).open("w")
    try:
        with file:
            yield folder, file.fileno()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def service_cpus() -> set[int]:
    """Return the CPUs of all workers together. Call this in a worker: it reads the affinity of its supervisor."""
    return os.sched_getaffinity(os.getppid())
