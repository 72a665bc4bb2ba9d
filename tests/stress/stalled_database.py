"""Test that a job database locked by another process delays requests about training jobs and no others.

A server with a tiny model gets 60 clients that list the jobs ten times a second, one client that submits a job
repeatedly, and one client each for the page, the models, the health, a prediction and a form of 2 MB. Meanwhile another
process locks the database for 25 s: first as a writer does (BEGIN EXCLUSIVE), then so that readers have to wait too
(the read marks of SQLite's shared memory). The table has each request's longest time to its answer and its statuses. A
training job that runs at the same time must continue.

    python tests/stress/stalled_database.py [CHECKOUT]     CHECKOUT: of other code, which is measured first

Time: at least one minute: two locks of 25 s.
Result: requests that do not need the database took at most 0.24 s, all others at most 2.01 s (Intel Xeon, 2 cores,
2026-11-28).
Table: results/stalled_database.md.
"""

import fcntl
import io
import itertools
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

import httpx
import numpy as np
import tiny_models
from mutations import samples
from PIL import Image
from processes import find_processes
from results import Check, conclude
from server import Server, wait_for
from tiny_models import NAME, TINY

LOCK_S = 25.0
READERS = 60
PAUSE_S = 0.1
JOB_S = 120.0
SWIFT_S = 2.0
"""Longest time allowed for an answer that does not need the database; the machine has other work as well."""
REFUSED_S = 5.0
"""Longest time allowed for an answer that needs the database."""
JOB = {"recipe": NAME, "overrides": TINY | {"epochs": 500}, "promote": "never"}
JOB_GOES_ON = "running, 0 crashes, 1 process"
READ_MARKS = (120, 8)
"""First byte and length of the locks in SQLite's shared memory (wal.c: WALINDEX_LOCK_OFFSET, SQLITE_SHM_NLOCK)."""

Send = Callable[[httpx.Client], httpx.Response]


@dataclass
class Answers:
    """Answers to one kind of request while the database is locked."""

    worst_s: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} of status {status}" for status, count in sorted(self.statuses.items()))
        return f"{self.worst_s:.2f} s ({counts})"


@dataclass
class Outcome:
    """The measurements of one server under one lock."""

    answers: dict[str, Answers]
    tracebacks: int
    job: str


@contextmanager
def locked_for_writers(database: Path) -> Iterator[None]:
    with sqlite3.connect(database, isolation_level=None) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")


@contextmanager
def locked_for_readers(database: Path) -> Iterator[None]:
    start, length = READ_MARKS
    with database.with_name(f"{database.name}-shm").open("r+b") as memory:
        end = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.lockf(memory, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
                break
            except BlockingIOError:  # a reader holds a lock now
                if time.monotonic() > end:
                    raise
        yield


LOCKS = {"writers": locked_for_writers, "readers": locked_for_readers}


def requests() -> dict[str, Send]:
    picture = samples()["png rgb 32x32"]
    noise, content = np.random.default_rng(0).integers(0, 256, (820, 820, 3), np.uint8), io.BytesIO()
    Image.fromarray(noise).save(content, "PNG", compress_level=1)
    large = content.getvalue()
    return {
        "GET /": lambda http: http.get("/"),
        "GET /models": lambda http: http.get("/models"),
        "GET /health": lambda http: http.get("/health"),
        "POST /predict": lambda http: http.post("/predict", files={"file": picture}),
        "POST /predict, 2 MB form": lambda http: http.post("/predict", files={"file": large}),
        "POST /train": lambda http: http.post("/train", json=JOB),
    }


def measure(store: Path, folder: Path, lock: str, wrapper: tuple[str, ...]) -> Outcome:
    """Return the answers of a server while its database is locked, its tracebacks, and the state of its running job."""
    answers = {"GET /train": Answers()} | {name: Answers() for name in requests()}
    recording, over = threading.Event(), threading.Event()
    counting = threading.Lock()

    def ask(url: str, name: str, send: Send, pause_s: float) -> None:
        with httpx.Client(base_url=url, timeout=90) as http:
            while not over.is_set():
                began = time.monotonic()
                counts = recording.is_set()
                try:
                    status = str(send(http).status_code)
                except httpx.HTTPError as error:
                    status = type(error).__name__
                if counts:
                    with counting:
                        answers[name].worst_s = max(answers[name].worst_s, time.monotonic() - began)
                        answers[name].statuses[status] += 1
                time.sleep(pause_s)

    log = folder / "log"
    with Server(store, folder / "runs", log, wrapper, max_jobs="1") as server, server.client() as http:
        job = http.post("/train", json=JOB).raise_for_status().json()["id"]
        wait_for(lambda: find_processes(folder / "runs", "training train"), JOB_S, log)
        clients = [(name, send, PAUSE_S) for name, send in requests().items()]
        clients += [("GET /train", lambda client: client.get("/train"), PAUSE_S)] * READERS
        threads = [threading.Thread(target=ask, args=(server.address, *client)) for client in clients]
        for thread in threads:
            thread.start()
        time.sleep(1)
        with LOCKS[lock](folder / "runs" / "jobs.sqlite"):
            recording.set()
            time.sleep(LOCK_S)
        recording.clear()
        over.set()
        for thread in threads:
            thread.join()
        after = http.get(f"/train/{job}").raise_for_status().json()
        processes = len(find_processes(folder / "runs", "training train"))
        http.delete(f"/train/{job}").raise_for_status()
        wait_for(lambda: not find_processes(folder / "runs", "training train"), JOB_S, log)
    return Outcome(
        answers,
        log.read_text().count("Traceback"),
        f"{after['state']}, {after['crashes']} crashes, {processes} process",
    )


def checks_of(lock: str, now: Outcome, before: Outcome | None) -> Iterator[Check]:
    def beside(then: object) -> str:
        return f"; before {then}" if before else ""

    for name, answers in now.answers.items():
        needs_database = name.endswith("/train")
        limit_s = REFUSED_S if needs_database else SWIFT_S
        allowed = {"200", "202", "503"} if needs_database else {"200"}
        yield Check(
            f"locked for {lock}: {name}",
            f"{answers}{beside(before.answers[name] if before else '')}",
            f"{'/'.join(sorted(allowed))} within {limit_s:g} s",
            answers.worst_s <= limit_s and set(answers.statuses) <= allowed,
        )
    yield Check(
        f"locked for {lock}: tracebacks in the log",
        f"{now.tracebacks}{beside(before.tracebacks if before else '')}",
        "0",
        now.tracebacks == 0,
    )
    yield Check(
        f"locked for {lock}: the job that was running",
        f"{now.job}{beside(before.job if before else '')}",
        JOB_GOES_ON,
        now.job == JOB_GOES_ON,
    )


def main(others: list[str]) -> int:
    checks = list[Check]()
    with tempfile.TemporaryDirectory(prefix="stalled-") as name:
        store = tiny_models.make_store(Path(name, "original")).root
        numbers = itertools.count()
        for lock in LOCKS:
            wrappers = [
                ("/usr/bin/env", f"--chdir={Path(other).resolve()}", f"PYTHONPATH={Path(other).resolve()}")
                for other in others
            ]
            outcomes = []
            for wrapper in (*wrappers, ()):
                (folder := Path(name, str(next(numbers)))).mkdir()
                outcomes.append(measure(store, folder, lock, wrapper))
            checks += checks_of(lock, outcomes[-1], outcomes[0] if others else None)
    ran = f"The database locked for {LOCK_S:g} s, {READERS} clients that list jobs; worst time and statuses."
    return conclude(__file__, ran, checks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
