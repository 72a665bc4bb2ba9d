"""Several processes that serve on one port, as one process runs Python on one processor only. Linux only.

    supervisor --> worker, worker, ...    each of them the whole service, on its share of the processors

The kernel spreads the connections over the workers. They share what all servers on one store and one runs folder do:
models, jobs, measurements; their metrics are added up. A worker that dies is replaced. When the supervisor ends,
however it does, the workers finish what is under way and end too.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client.multiprocess import mark_process_dead
from uvicorn.config import STARTUP_FAILURE

log = logging.getLogger(__name__)

METRICS = "PROMETHEUS_MULTIPROC_DIR"
"""Where the workers write their metrics: prometheus_client's environment variable."""

_POLL_S = 0.2


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def supervise(workers: int, host: str, port: int) -> int:
    """Run workers until SIGTERM or SIGINT, or until one cannot start at all.

    Args:
        workers: how many.
        host: address to listen on.
        port: 0 takes a free one.

    Returns:
        The exit status.

    Raises:
        OSError: the address is in use, or no address of this machine.
    """
    _require_unused(host, port)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    usable = sorted(os.sched_getaffinity(0))
    status = 0
    with listener(host, port) as reserved, tempfile.TemporaryDirectory(prefix="cifar100-metrics-") as metrics:
        port = reserved.getsockname()[1]
        environment = os.environ | {METRICS: metrics, "CIFAR100_WORKERS": str(workers)}

        def start(place: int) -> "subprocess.Popen[bytes]":
            share = usable[place::workers] or [usable[place % len(usable)]]
            command = [sys.executable, "-m", "app", "--host", host, "--port", str(port), "--worker"]
            with only_on(set(share)):
                return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)

        running = [start(place) for place in range(workers)]
        while not stopping.wait(_POLL_S):
            for place, worker in enumerate(running):
                if worker.poll() is None:
                    continue
                mark_process_dead(worker.pid, metrics)
                if worker.returncode == STARTUP_FAILURE:
                    status = STARTUP_FAILURE
                    stopping.set()
                else:
                    log.error("worker %d has ended with %d and is replaced", worker.pid, worker.returncode)
                    running[place] = start(place)
        for worker in running:
            worker.terminate()
        for worker in running:
            worker.wait()
    return status


def listener(host: str, port: int) -> socket.socket:
    """A socket for an address that further sockets of this user may have as well; connections go to those that listen.

    Raises: as for `supervise`.
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


def _require_unused(host: str, port: int) -> None:
    """Another service of this user on the same address would get some of the connections, without any error."""
    family, address = _resolved(host, port)
    with socket.socket(family) as alone:
        alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        alone.bind(address)


def _resolved(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return family, address
