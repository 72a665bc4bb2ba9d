"""Start a real server for a test, and find the training processes that it leaves behind."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from processes import find_processes
from server import Server

TINY: dict[str, Any] = {"validation_images": 0, "width": 8, "epochs": 1, "learning_rate": 0.05, "int8": False}


@contextmanager
def run_service(
    models: Path | str, runs: Path, log: Path, **settings: str
) -> Iterator[tuple[httpx.Client, "subprocess.Popen[bytes]"]]:
    """Start a server on a free port. Yield a client and the server process once the server is ready."""
    with Server(models, runs, log, **settings) as server, server.client() as client:
        yield client, server.process


def find_finished_job(client: httpx.Client, job_id: str) -> dict[str, Any] | None:
    job: dict[str, Any] = client.get(f"/train/{job_id}").json()
    return job if job["finished"] else None


def list_processes(runs: Path) -> list[int]:
    """Return the ids of training processes whose command line names a folder in `runs`."""
    return find_processes(runs, "training train")
