"""Start a server, query it, load it with wrk, measure its memory and CPU time, and end all its processes.

Call `adopt` first: it makes this process the parent of any process that a server leaves behind, so that all of them are
measured and ended. Linux only.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
from peers.catalog import HERE, ROOT, Server

START_S = 180.0
STOP_S = 20.0
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def adopt() -> None:
    """Adopt all descendant processes whose own parent ends, and exit on SIGTERM so that they are ended too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


@dataclass(frozen=True)
class Load:
    """The measurements of wrk and the kernel under one load."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    """CPU time of all the server's processes per request."""
    errors: int


class Running:
    """A started server. Used as a context manager, it ends all processes of the server at exit.

    Args:
        engine: Engine, as in `Server.command`.
        version: Folder of the model's version in its store.
        model: Name of the model.
        first: PNG for the first request.
        folder: Folder for the log and the runs.

    Raises:
        RuntimeError: The server ended or gave no answer in time; the message has the last lines of its log.
    """

    def __init__(self, server: Server, engine: str, version: Path, model: str, first: bytes, folder: Path):
        self.server = server
        self.model = model
        self.port = _free_port()
        self.log = folder / f"{server.name}.log"
        command, environment = server.command(self.port, version, engine, folder / "runs")
        started = time.monotonic()
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait(first, started + START_S)
        except BaseException:
            self.stop()
            raise
        self.start_s = time.monotonic() - started

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def client(self, timeout_s: float = 60.0) -> httpx.Client:
        """Return an HTTP client of the server."""
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=timeout_s, trust_env=False)

    def ask(self, http: httpx.Client, image: bytes) -> str:
        """Return the label of the most probable class of a PNG."""
        headers, content = self.server.message(image, "image/png")
        response = http.post(self.server.path.format(model=self.model), headers=headers, content=content)
        return self.server.best(response.raise_for_status().json())

    def labels(self, images: Sequence[bytes]) -> list[str]:
        """Return the labels of the most probable classes of PNGs, requested over several connections."""
        with self.client() as http, ThreadPoolExecutor(8) as clients:
            return list(clients.map(lambda image: self.ask(http, image), images))

    def stop(self) -> None:
        """Stop the server with SIGTERM, kill it after STOP_S seconds, and return when all its processes have ended."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
        end = time.monotonic() + STOP_S
        while left := self._descendants():
            for process in left if time.monotonic() > end else ():
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)

    def _descendants(self) -> list[int]:
        """Return the processes that still run, and reap those that have ended."""
        self.process.poll()
        for process in descendants():
            with suppress(ChildProcessError):  # the child of another process
                if process != self.process.pid:
                    os.waitpid(process, os.WNOHANG)
        return descendants()

    def _wait(self, first: bytes, end: float) -> None:
        with self.client(10) as http:
            while True:
                try:
                    self.ask(http, first)
                except (httpx.HTTPError, LookupError, TypeError, ValueError):
                    if self.process.poll() is not None or time.monotonic() > end:
                        raise RuntimeError(self._last_words()) from None
                    time.sleep(0.02)
                else:
                    return

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return " ".join(lines[-3:])[-300:] if lines else f"no answer in {START_S:.0f} s"


def descendants() -> list[int]:
    """Return all processes that this one has started, directly or indirectly, with the adopted ones."""
    children = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):  # the process has just ended
                children[int(_stat(int(entry.name))[1])].append(int(entry.name))
    found, waiting = [], [os.getpid()]
    while waiting:
        waiting += (new := children[waiting.pop()])
        found += new
    return found


def _stat(process: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def cpu_ms() -> float:
    """Return the CPU time of all descendants and their ended children in milliseconds."""
    ticks = 0
    for process in descendants():
        with suppress(OSError):
            ticks += sum(int(value) for value in _stat(process)[11:15])
    return ticks * 1000 / os.sysconf("SC_CLK_TCK")


def resident_mib() -> float:
    """Return the memory of all descendants in MiB. A page that several processes share counts once."""
    kib = 0
    for process in descendants():
        with suppress(OSError):
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            kib += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kib / 1024


def drive(port: int, connections: int, pictures: Sequence[Path], seconds: int, threads: int = 1) -> Load:
    """Load a server with wrk: every connection sends its next request as soon as it has its answer."""
    script, url = str(HERE / "wrk.lua"), f"http://127.0.0.1:{port}"
    command = ["wrk", f"-t{threads}", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "-s", script, url, "--"]
    before = cpu_ms()
    done = subprocess.run([*command, *map(str, pictures)], check=True, capture_output=True, text=True)
    used = cpu_ms() - before
    told = json.loads(done.stdout.splitlines()[-1])
    answered = max(1, told["requests"])
    return Load(
        (told["requests"] - told["errors"]) / told["seconds"],
        told["p50_ms"],
        told["p99_ms"],
        used / answered,
        told["errors"],
    )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
