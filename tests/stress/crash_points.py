"""Test that no kill of the service or its training processes loses, duplicates or damages an accepted job.

The test runs one server with one store and one runs folder. With `--database postgresql`, it starts a PostgreSQL
server, and two servers that share it, the store and the runs folder, as two machines with a common volume do. A client
submits tiny jobs on the synthetic data set (each with its own seed), cancels some jobs and promotes versions. Meanwhile
SIGKILL hits a server, the training process or both at random moments, often before the server is ready. After every
kill the program checks the store and the job database from outside. At the end it leaves the servers alone until the
queue is empty. Every job must then have exactly one final state. Every job that succeeded must have trained each epoch
once and published exactly one version.

    python tests/stress/crash_points.py [--database sqlite|postgresql] [--kills 200] [--seed 0]

With PostgreSQL, the default is 50 kills. A training process dies with its server, and the other server takes the job
over after its lease of 5 s. That counts as a crash, after which the job is resumed once.

Time: nine minutes.
Result: 200 kills, 33 accepted jobs, no job or version lost, doubled or damaged (AMD EPYC, 2 cores, 2026-11-24).
PostgreSQL: 50 kills in eleven minutes, 27 accepted jobs, the same (Intel Xeon, 2 cores, 2026-11-30).
Tables: results/crash_points.md, and results/crash_points_postgresql.md (`--database postgresql`).
"""

import argparse
import json
import os
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

import httpx
import numpy as np
import tiny_models
from postgres import PostgresServer
from processes import find_processes
from results import Check, conclude
from server import Server, wait_for
from tiny_models import NAME, TINY

from app.jobs.backends import Postgres, Sqlite
from app.jobs.queue import State
from training.run import Run
from training.runtimes import torchscript
from training.runtimes.engine import example_images
from training.store import MODEL, LocalStore, StoreError

EPOCHS = 3
MAX_WAITING = 3  # a short queue empties quickly at the end
SCARCELY_STARTED_S = 2.0
MEAN_DELAY_S = {"sqlite": 3.0, "postgresql": 20.0}  # a takeover takes at least two leases
KILLS = {"sqlite": 200, "postgresql": 50}
LEASE_S = 5
DRAIN_S = 900.0
COLUMNS = "id, idempotency_key, state, crashes, error, CAST(recipe AS TEXT), CAST(published AS TEXT)"
VICTIMS = ("server", "server", "training", "both")
FINISHED = [state for state in State if state.finished]


class Client(threading.Thread):
    """A thread that submits and cancels jobs and promotes versions, even if its connections break.

    Args:
        store: LocalStore whose versions the client promotes.
        seed: Seed of the client's random choices.
    """

    def __init__(self, store: LocalStore, seed: int):
        super().__init__(daemon=True)
        self.server: Server | None = None
        self.accepted: dict[str, str] = {}
        """Ids of the jobs that the server answered with 202, by idempotency key."""
        self.cancelled: set[str] = set()
        """Jobs whose cancellation the client requested, with or without an answer."""
        self.promotions = 0
        self.unexpected: Counter[str] = Counter()
        """Counts of answers with an unexpected status."""
        self.over = threading.Event()
        self._store = store
        self._random = np.random.default_rng(seed)
        self._next = 1

    def run(self) -> None:
        while not self.over.wait(0.2):
            if self.server and self.server.address:
                try:
                    with self.server.client(10) as http:
                        self._turn(http)
                except httpx.TransportError:
                    continue  # the server was killed

    def _turn(self, http: httpx.Client) -> None:
        jobs = self._answer(http.get("/train", params={"limit": 1000}), 200) or []
        if sum(job["state"] in (State.QUEUED, State.INTERRUPTED) for job in jobs) < MAX_WAITING:
            # The seed identifies a job's versions. The idempotency key makes a retry safe.
            wanted = {"recipe": NAME, "overrides": TINY | {"epochs": EPOCHS, "seed": self._next}, "promote": "always"}
            key = f"job {self._next}"
            if job := self._answer(http.post("/train", json=wanted, headers={"Idempotency-Key": key}), 202):
                self.accepted[key] = job["id"]
                self._next += 1
        unfinished = [job["id"] for job in jobs if not job["finished"]]
        if unfinished and self._random.random() < 0.005:
            chosen = str(self._random.choice(unfinished))
            self.cancelled.add(chosen)
            self._answer(http.delete(f"/train/{chosen}"), 200)
        if self._random.random() < 0.3:
            version = int(self._random.choice(self._store.versions(NAME)))
            self.promotions += bool(self._answer(http.put(f"/models/{NAME}/live", json={"version": version}), 200))

    def _answer(self, response: httpx.Response, expected: int) -> Any:
        if response.status_code == expected:
            return response.json()
        self.unexpected[f"{response.request.method} {response.status_code} {response.text[:200]}"] += 1
        return None


class Servers:
    """The servers of a database: one for SQLite, two for PostgreSQL.

    Args:
        store: Their model store.
        folder: Folder of the runs folder and of the log.
        url: URL of the PostgreSQL database, or None.
    """

    def __init__(self, store: LocalStore, folder: Path, url: str | None):
        self.store, self.runs = store, folder / "runs"
        self.url = url
        self._settings = {"database": url, "job_lease_s": str(LEASE_S)} if url else {}
        self.all = [self._start(number) for number in range(2 if url else 1)]

    def _start(self, number: int) -> Server:
        return Server(self.store.root, self.runs, self.runs.with_name(f"log-{number}"), **self._settings)

    def restart(self) -> None:
        """Start the servers that do not run."""
        self.all = [
            server if server.process.poll() is None else self._start(number) for number, server in enumerate(self.all)
        ]

    def rows(self) -> list[dict[str, Any]]:
        """Return all jobs.

        Raises:
            ValueError: The database is damaged.
        """
        names = ("id", "idempotency_key", "state", "crashes", "error", "recipe", "published")
        rows = self._postgres_rows() if self.url else self._sqlite_rows()
        return [dict(zip(names, row, strict=True)) for row in rows]

    def _postgres_rows(self) -> list[Any]:
        engine = Postgres(self.url or "").connect()
        with closing(engine.raw_connection()) as connection:
            cursor = connection.cursor()
            cursor.execute("SELECT to_regclass('jobs')")
            if cursor.fetchone() == (None,):
                return []
            cursor.execute(f"SELECT {COLUMNS} FROM jobs ORDER BY sequence")  # noqa: S608
            rows = list(cursor.fetchall())
        engine.dispose()
        return rows

    def _sqlite_rows(self) -> list[Any]:
        file = Sqlite(self.runs).path
        if not file.exists():
            return []
        with closing(sqlite3.connect(file, timeout=10)) as database:
            (verdict,) = database.execute("PRAGMA integrity_check").fetchone()
            if verdict != "ok":
                raise ValueError(verdict)
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'jobs'").fetchone():
                return []
            return database.execute(f"SELECT {COLUMNS} FROM jobs ORDER BY sequence").fetchall()  # noqa: S608

    def unfinished(self) -> list[str]:
        """Return the ids of the jobs that wait or run."""
        return [row["id"] for row in self.rows() if row["state"] not in FINISHED]


def main(kills: int, seed: int, database: str, whole: bool) -> int:
    random = np.random.default_rng(seed)
    faults: list[str] = []
    moments: Counter[str] = Counter()
    killed: Counter[str] = Counter()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crash-points-")))
        url = stack.enter_context(PostgresServer()).create_database() if database == "postgresql" else None
        store = tiny_models.make_store(folder)
        client = Client(store, seed)
        client.start()
        started = time.monotonic()
        servers = Servers(store, folder, url)
        runs, done = servers.runs, 0
        while done < kills:
            servers.restart()
            server = client.server = servers.all[int(random.integers(len(servers.all)))]
            early = random.random() < 0.25
            time.sleep(random.uniform(0, SCARCELY_STARTED_S) if early else random.exponential(MEAN_DELAY_S[database]))
            training = find_processes(runs, "-m training train")
            jobs = {_job_of(process) for process in training if _at_work(runs, process)} - {""}
            victim = str(random.choice(VICTIMS)) if training else "server"
            moments[f"{victim}, {_moment(runs, training)}"] += 1
            for process in training if victim != "server" or url else []:
                killed[_job_of(process)] += 1
                if victim != "server":
                    os.kill(process, signal.SIGKILL)
                    done += 1
            if victim != "training":
                server.kill()
                done += 1
            faults += [f"kill {done}: {fault}" for fault in _faults(servers, jobs)]
        seconds = time.monotonic() - started

        client.over.set()
        client.join()
        servers.restart()
        wait_for(lambda: all(each.address for each in servers.all) and not servers.unfinished(), DRAIN_S, server.log)
        for server in servers.all:
            if (status := server.stop()) != 0:
                faults.append(f"the server ended with {status}")
        if left := find_processes(runs):
            faults.append(f"processes are left: {left}")
        faults += _faults(servers, set())
        rows = servers.rows()
        faults += _lost_or_doubled(client, rows, servers, killed)
        faults += [f"{count} x {answer}" for answer, count in client.unexpected.items()]
        versions = len(store.versions(NAME))
    for fault in faults:
        print(fault, file=sys.stderr)
    states = Counter(row["state"] for row in rows)
    return conclude(
        __file__,
        f"{database}: {done} kills (seed {seed}) in {seconds / 60:.0f} minutes, then left in peace.",
        [
            *(Check(f"killed: {moment}", f"{count}") for moment, count in sorted(moments.items())),
            Check("jobs accepted", f"{len(client.accepted)}"),
            *(Check(f"jobs {state}", f"{count}") for state, count in sorted(states.items())),
            Check("jobs resumed after a crash", f"{sum(row['crashes'] for row in rows)}"),
            Check("versions published", f"{versions}"),
            Check("promotions by the client", f"{client.promotions}"),
            Check("faults: lost, doubled, damaged, left over", f"{len(faults)}", "0", not faults),
        ],
        whole=whole,
        suffix="_postgresql" if url else "",
    )


def _moment(runs: Path, training: list[int]) -> str:
    """Return the phase of the training process."""
    if not training:
        return "no training process"
    run = Run(runs / _job_of(training[0]))
    if run.publication_file.exists():
        return "drawing"
    if run.announcement_file.exists():
        return "publishing"
    if not run.recipe_file.exists():
        return "starting"
    return f"training or exporting, epoch {len(run.epochs())} done" if run.checkpoint_file.exists() else "first epoch"


def _job_of(process: int) -> str:
    """Return the id of the job that a training process works on, or "" if the process has ended."""
    try:
        command = Path(f"/proc/{process}/cmdline").read_text().split("\0")
        return Path(command[command.index("--run") + 1]).name
    except (OSError, ValueError):
        return ""


def _at_work(runs: Path, process: int) -> bool:
    """Return whether a process holds the lock of its run folder.

    A process that has only just started does not count: it learns from the lock whether work is left to do.
    """
    return Run(runs / _job_of(process)).holder() == process


def _faults(servers: Servers, jobs: set[str]) -> list[str]:
    """Return the faults of the store and the database, and a fault if more than one of `jobs` trains at once.

    Args:
        jobs: Ids of the jobs whose processes hold their run folders now.
    """
    faults, store = [], servers.store
    if len(jobs) > 1:
        states = {row["id"]: row["state"] for row in servers.rows()}
        faults.append(
            f"{len(jobs)} jobs train at once: {', '.join(f'{job} {states.get(job)}' for job in sorted(jobs))}"
        )
    try:
        if (live := store.live(NAME)) not in store.versions(NAME) or live is None:
            return [*faults, f"version {live} is live, there are {store.versions(NAME)}"]
        for version in store.versions(NAME):
            store.verify(store.card(NAME, version))
        torchscript.load(store.folder(NAME, live) / MODEL)(example_images(1))
    except (StoreError, RuntimeError, OSError) as error:
        faults.append(f"the store: {error}")
    try:
        servers.rows()
    except (sqlite3.Error, ValueError) as error:
        faults.append(f"the job database: {error}")
    return faults


def _lost_or_doubled(client: Client, rows: list[dict[str, Any]], servers: Servers, killed: Counter[str]) -> list[str]:
    """Return the faults of the jobs after all of them have ended."""
    faults, store = [], servers.store
    by_id = {row["id"]: row for row in rows}
    for key, job in client.accepted.items():
        if job not in by_id or by_id[job]["idempotency_key"] != key:
            faults.append(f"{key} was accepted as {job} and is lost")
    versions: dict[int, list[int]] = {}
    for version in store.versions(NAME)[1:]:  # the first version existed before the jobs
        versions.setdefault(store.card(NAME, version).seed, []).append(version)
    for row in rows:
        name, mine = row["id"], versions.pop(json.loads(row["recipe"])["seed"], [])
        run = Run(servers.runs / name)
        if len(mine) > 1:
            faults.append(f"{name} has published {mine}")
        # In PostgreSQL, the death of a server counts as a crash of the job that it has claimed.
        if row["crashes"] > (1 if servers.url else min(1, killed[name])):
            faults.append(f"{name} has {row['crashes']} crashes, its process was killed {killed[name]} times")
        if row["state"] == State.SUCCEEDED:
            epochs = [epoch["epoch"] for epoch in run.epochs()]
            if epochs != list(range(1, EPOCHS + 1)):
                faults.append(f"{name} has trained the epochs {epochs}")
            if [json.loads(row["published"])["version"]] != mine:
                faults.append(f"{name} says {row['published']}, the store has {mine}")
        elif row["state"] == State.FAILED:
            if (
                (killed[name] < 2 and not servers.url)
                or row["crashes"] != 1
                or "again after it was resumed" not in row["error"]
            ):
                faults.append(f"{name} failed after {killed[name]} kills: {row['error']}")
        elif name not in client.cancelled:
            faults.append(f"{name} is {row['state']}, which nobody asked for")
    faults += [f"versions {numbers} belong to no job" for numbers in versions.values()]
    return faults


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", choices=tuple(KILLS), default="sqlite")
    parser.add_argument("--kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    count = given.kills or KILLS[given.database]
    sys.exit(main(count, given.seed, given.database, whole=count >= KILLS[given.database]))
