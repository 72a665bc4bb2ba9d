"""Several processes that serve on one port, as one process runs Python on one processor only. Linux only.

    supervisor --> worker, worker, ...    each of them the whole service, on its share of the processors

The supervisor accepts connections and deals them out in turn, so that even a few are shared evenly; the kernel, which
could spread them as well (SO_REUSEPORT), does so by chance. Until a worker has loaded its models, connections wait.
Workers share what all servers on one store and one runs folder do: models, jobs, measurements; their metrics are added
up. One that dies or hangs is replaced. They ignore SIGTERM and SIGINT, which often go to a whole group of processes,
and listen to the supervisor instead. A worker's standard input is a socket, over which the supervisor sends
connections, and a byte to have it drain, and which it closes, however it ends, to have the worker finish what is under
way and end; the worker writes a byte every second, as long as it responds.
"""

import logging
import math
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prometheus_client.multiprocess import mark_process_dead

log = logging.getLogger(__name__)

METRICS = "PROMETHEUS_MULTIPROC_DIR"
"""Where the workers write their metrics: prometheus_client's environment variable."""

CONNECTION = b"c"
"""What the supervisor writes with the file descriptor of each connection."""

DRAIN = b"d"
"""What the supervisor writes to have a worker drain."""

BEAT = b"b"
"""What a worker writes as long as it responds."""

BEAT_S = 1.0

_BACKLOG = 2048  # connections that wait to be accepted
_POLL_S = 0.2
_START_S = 30.0  # a worker that gives up sooner cannot start at all
_LOAD_S = 300.0  # a worker that has loaded its models sends its first beat sooner
_QUIET_S = 3.0  # a worker that sends no beat for so long gets no connections
_SILENCE_S = 20.0  # and for so long hangs
_STOP_S = 30.0  # a worker told to end gives the requests under way 20
_PACE_S = 2.0  # between two starts in one place
_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # Linux' control groups, version 2
_PACKAGES = Path(__file__).parents[1]


def processors() -> int:
    """How many this process may use; a container may have the time of some of the machine's only."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CPU_MAX.read_text().split()
    except (OSError, ValueError):
        return allowed
    return allowed if quota == "max" else min(allowed, math.ceil(int(quota) / int(period)))


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
        self._heard = False
        self._silent_s = 0.0
        line.setblocking(False)

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.started

    @property
    def responds(self) -> bool:
        """Whether it has loaded its models, and does not seem to hang."""
        return self._heard and 0 <= self._silent_s < _QUIET_S

    def kill_if_hanging(self) -> None:
        """Kill it if it has sent no beat for too long; called at every poll.

        Polls are counted, not seconds: where the whole machine stood still, nobody is late.
        """
        beats = b""
        with suppress(BlockingIOError, ConnectionResetError):
            beats = self._line.recv(4096)
        self._heard = self._heard or bool(beats)
        self._silent_s = 0 if beats else self._silent_s + _POLL_S
        if self._silent_s > (_SILENCE_S if self._heard else _LOAD_S) and self.process.poll() is None:
            log.error("worker %d does not respond and is killed", self.process.pid)
            self.process.kill()
            self._silent_s = -math.inf

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
        self._line.close()


class Supervisor:
    """Starts workers, deals out connections, replaces workers that die or hang, and stops them.

    Args:
        workers: how many.
        listening: a socket of `listener`.
        drain_s: how long they go on after SIGTERM, not ready any more.
    """

    def __init__(self, workers: int, listening: socket.socket, drain_s: float):
        self._listening = listening
        self._workers = workers
        self._drain_s = drain_s
        self._processors = sorted(os.sched_getaffinity(0))
        self._signals: list[int] = []
        self._dealt = 0

    def run(self) -> int:
        """Supervise until SIGTERM or SIGINT comes, a second one cuts draining short, or until a worker cannot start.

        Returns:
            The exit status.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: self._signals.append(number))
        with tempfile.TemporaryDirectory(prefix="cifar100-metrics-") as metrics:
            running = [self._start(place, metrics, replaces=False) for place in range(self._workers)]
            status = 0
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
                        running[place] = self._start(place, metrics, replaces=True)
                        worker.end()
                    except OSError as error:  # such as no memory; tried again after a pause
                        log.error("no worker can be started: %s", error)
                        worker.started, worker.replaces = time.monotonic(), True
            self._stop(running)
        return 128 + signal.SIGINT if signal.SIGINT in self._signals else status

    def _deal(self, running: list[Worker]) -> None:
        """Hand the connections that come until the next poll to those who respond, one after the other."""
        end = time.monotonic() + _POLL_S
        responding = [worker for worker in running if worker.responds]
        while (left := end - time.monotonic()) > 0:
            if not responding:
                time.sleep(left)
            elif select.select([self._listening], [], [], left)[0]:
                self._hand_over(responding)

    def _hand_over(self, responding: list[Worker]) -> None:
        """Give a connection to the worker whose turn it is, or if it takes none to the next one."""
        try:
            connection, _ = self._listening.accept()
        except OSError:  # it is gone already, or there are too many open files
            time.sleep(0.01)
            return
        with connection:
            for _ in responding:
                self._dealt += 1
                if responding[self._dealt % len(responding)].take(connection):
                    break

    def _start(self, place: int, metrics: str, replaces: bool) -> Worker:
        share = self._processors[place :: self._workers] or [self._processors[place % len(self._processors)]]
        host, port, *_ = self._listening.getsockname()
        # This very package, whatever lies in the current folder.
        command = [sys.executable, "-P", "-m", "app", "--host", host, "--port", str(port), "--worker"]
        search = os.pathsep.join(filter(None, (str(_PACKAGES), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {METRICS: metrics, "CIFAR100_WORKERS": str(self._workers), "PYTHONPATH": search}
        line, its_line = socket.socketpair()
        try:
            with its_line, only_on(set(share)):
                process = subprocess.Popen(command, stdin=its_line.fileno(), env=environment)
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
        ):
            self._deal(running)
            for worker in running:
                worker.kill_if_hanging()
        self._listening.close()
        for worker in running:
            worker.end()
        latest = time.monotonic() + _STOP_S
        for worker in running:
            try:
                worker.process.wait(max(0, latest - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.error("worker %d does not end and is killed", worker.process.pid)
                worker.process.kill()
                worker.process.wait()


def listener(host: str, port: int) -> socket.socket:
    """A socket that listens on an address, so that nobody else can.

    Args:
        host: address to listen on.
        port: 0 takes a free one.

    Raises:
        OSError: the address is in use, or no address of this machine.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
        listening.setblocking(False)
    except BaseException:
        listening.close()
        raise
    return listening


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
