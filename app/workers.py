"""Several processes that serve on one port, as one process runs Python on one processor only. Linux only.

    supervisor --> worker, worker, ...    each of them the whole service, on its share of the processors

The kernel spreads the connections over the workers. They share what all servers on one store and one runs folder do:
models, jobs, measurements; their metrics are added up. A worker that dies is replaced. They ignore SIGTERM and SIGINT,
which often go to a whole group of processes, and listen to the supervisor instead: it writes a byte into their standard
input to have them drain, and closes it, however it ends, to have them finish what is under way and end.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from prometheus_client.multiprocess import mark_process_dead

log = logging.getLogger(__name__)

METRICS = "PROMETHEUS_MULTIPROC_DIR"
"""Where the workers write their metrics: prometheus_client's environment variable."""

DRAIN = b"d"
"""What the supervisor writes to have a worker drain."""

_POLL_S = 0.2
_START_S = 30.0  # a worker that gives up sooner cannot start at all
_PACE_S = 2.0  # between two starts in one place
_PACKAGES = Path(__file__).parents[1]


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Supervisor:
    """Starts workers, replaces those that die, and stops them.

    Args:
        workers: how many.
        listening: a socket of `listener`, whose address the workers get.
    """

    def __init__(self, workers: int, listening: socket.socket):
        self._host, self._port = listening.getsockname()[:2]
        self._workers = workers
        self._processors = sorted(os.sched_getaffinity(0))
        self._signals: list[int] = []

    def run(self) -> int:
        """Supervise until SIGTERM or SIGINT comes, a second one cuts draining short, or until a worker cannot start.

        Returns:
            The exit status.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: self._signals.append(number))
        with tempfile.TemporaryDirectory(prefix="cifar100-metrics-") as metrics:
            running = [self._start(place, metrics) for place in range(self._workers)]
            started = [time.monotonic()] * self._workers
            replaced: set[int] = set()
            status = 0
            while not self._signals and not status:
                time.sleep(_POLL_S)
                for place, worker in enumerate(running):
                    age_s = time.monotonic() - started[place]
                    if worker.poll() is None or age_s < _PACE_S:
                        continue
                    if worker.returncode > 0 and place not in replaced and age_s < _START_S:
                        status = worker.returncode
                        break
                    log.error("worker %d has ended with %d and is replaced", worker.pid, worker.returncode)
                    mark_process_dead(worker.pid, metrics)
                    started[place] = time.monotonic()
                    replaced.add(place)
                    try:
                        running[place] = self._start(place, metrics)
                    except OSError as error:  # such as no memory; the next round tries again
                        log.error("no worker can be started: %s", error)
            self._stop(running)
        return 128 + signal.SIGINT if signal.SIGINT in self._signals else status

    def _start(self, place: int, metrics: str) -> "subprocess.Popen[bytes]":
        share = self._processors[place :: self._workers] or [self._processors[place % len(self._processors)]]
        # This very package, whatever lies in the current folder.
        command = [sys.executable, "-P", "-m", "app", "--host", self._host, "--port", str(self._port), "--worker"]
        search = os.pathsep.join(filter(None, (str(_PACKAGES), os.environ.get("PYTHONPATH"))))
        environment = {METRICS: metrics, "CIFAR100_WORKERS": str(self._workers), "PYTHONPATH": search}
        with only_on(set(share)):
            return subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, env=os.environ | environment)

    def _stop(self, running: "list[subprocess.Popen[bytes]]") -> None:
        for worker in running:
            with suppress(BrokenPipeError):
                cast(IO[bytes], worker.stdin).write(DRAIN)
        while any(worker.poll() is None for worker in running) and len(self._signals) < 2:
            time.sleep(_POLL_S)
        for worker in running:
            cast(IO[bytes], worker.stdin).close()
        for worker in running:
            worker.wait()


@contextmanager
def claimed(host: str, port: int) -> Iterator[socket.socket]:
    """The address for the workers of one supervisor, and nobody else, to listen on.

    Another service of this user on it would get some of the connections, without any error.

    Args:
        host: address to listen on.
        port: 0 takes a free one.

    Raises:
        OSError: the address is in use, or no address of this machine.
    """
    family, address = _resolved(host, port)
    with socket.socket(family) as alone:
        alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        alone.bind(address)
    with listener(host, port) as listening, socket.socket(socket.AF_UNIX) as claim:
        claim.bind("\0cifar100-{}-{}".format(*listening.getsockname()[:2]))  # as its workers do not listen yet
        yield listening


def listener(host: str, port: int) -> socket.socket:
    """A socket for an address that further sockets of this user may have as well; connections go to those that listen.

    Raises: as for `claimed`.
    """
    family, address = _resolved(host, port)
    listening = socket.socket(family)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind(address)
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


def _resolved(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return family, address
