"""A real server as a process, for the tests of this folder."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

TINY: dict[str, Any] = {"validation_images": 0, "width": 8, "epochs": 1, "learning_rate": 0.05}


@contextmanager
def service(
    models: Path, runs: Path, log: Path, **settings: str
) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    """A server on a free port, ready to answer."""
    environment = os.environ | {
        "CIFAR100_MODELS": str(models),
        "CIFAR100_RUNS": str(runs),
        "CIFAR100_DATA": "synthetic:4",
        "CIFAR100_STORE_POLL_S": "0.2",
        "OMP_NUM_THREADS": "1",
    }
    environment |= {f"CIFAR100_{name.upper()}": value for name, value in settings.items()}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "--port", "0"], env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        address = wait_for(lambda: re.search(r"running on (http://\S+)", log.read_text()), 60, log)
        with httpx.Client(base_url=address[1], timeout=60) as client:
            yield client, process
    finally:
        process.kill()
        process.wait()


def wait_for(condition: Any, timeout_s: float, log: Path) -> Any:
    """The first true value of a condition."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"nothing happened within {timeout_s} s; the log is:\n{log.read_text()}")


def finished(client: httpx.Client, job_id: str) -> dict[str, Any] | None:
    job: dict[str, Any] = client.get(f"/train/{job_id}").json()
    return job if job["finished"] else None


def processes_of(runs: Path) -> list[int]:
    """Training processes that work below a folder."""
    found = subprocess.run(["pgrep", "-f", f"training train .*{runs}"], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]
