"""Run the service as a real process on a free port, find its address, and kill or stop it.

Input: a model store and a runs folder. Output: a `Server` with its address, log and process.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import httpx
import processes

from app.machine import cpu_count

DATA = "synthetic:4"
READY_S = 300.0
STOP_S = 30.0

Value = TypeVar("Value")


class Server:
    """A server process, which starts at once.

    Used as a context manager, it waits until the server is ready, and kills it at exit.

    Args:
        models: Location of the model store.
        runs: Folder of the training jobs.
        log: File to which the output of the process is appended.
        wrapper: Command that starts the server's command, such as one that shifts its clock.
        settings: CIFAR100_... variables by their names in `app.settings`. The defaults suit small machines and a free
            port.
    """

    def __init__(self, models: Path | str, runs: Path, log: Path, wrapper: tuple[str, ...] = (), /, **settings: str):
        chosen = {"models": str(models), "runs": str(runs), "data": DATA, "store_poll_s": "0.2"}
        chosen |= {"operator_rate_limit": "", "training_threads": "1"} | settings
        environment = os.environ | {f"CIFAR100_{name.upper()}": value for name, value in chosen.items()}
        self.log = log
        self._workers = int(settings.get("workers", 1)) or cpu_count()
        self._heard = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*wrapper, sys.executable, "-m", "app", "--port", settings.get("port", "0")],
                env=environment | {"OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Self:
        try:
            wait_for(lambda: self.address, READY_S, self.log)
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.kill()

    @property
    def address(self) -> str | None:
        """URL of the server, or unix: and the path of its socket, once all its processes accept requests."""
        with self.log.open("rb") as log:
            log.seek(self._heard)
            found: list[bytes] = re.findall(rb"running on ((?:http|unix):[\w./:\[\]-]+)", log.read())
        return found[0].decode() if len(found) >= self._workers else None

    def memory_mib(self, field: str = "VmRSS") -> float:
        """Return the total memory of all answering processes in MiB, by a field of `processes.memory_mib`."""
        return sum(processes.memory_mib(process, field) for process in self._answering())

    def open_files(self) -> int:
        """Return the total number of open file descriptors of all answering processes."""
        return sum(map(processes.count_open_files, self._answering()))

    def _answering(self) -> set[int]:
        return processes.list_children(self.process.pid) if self._workers > 1 else {self.process.pid}

    def client(self, timeout_s: float = 60.0) -> httpx.Client:
        """Return an HTTP client of a server that accepts requests."""
        scheme, _, path = (self.address or "").partition(":")
        if scheme == "unix":
            transport = httpx.HTTPTransport(uds=path)
            return httpx.Client(base_url="http://127.0.0.1", transport=transport, timeout=timeout_s)
        return httpx.Client(base_url=self.address or "", timeout=timeout_s)

    def kill(self) -> None:
        """Kill the process with SIGKILL."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Stop the process with SIGTERM, as a supervisor does, and return the exit status."""
        self.process.terminate()
        return self.process.wait(STOP_S)


def wait_for(condition: Callable[[], Value | None], timeout_s: float, log: Path | None = None) -> Value:
    """Return the first true value of a condition.

    Raises:
        TimeoutError: The condition had no true value in time; the message has the end of the log.
    """
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    said = f"; the log ends with:\n{log.read_text()[-3000:]}" if log else ""
    raise TimeoutError(f"nothing happened within {timeout_s:.0f} s{said}")
