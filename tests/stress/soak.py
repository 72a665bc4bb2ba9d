"""Test that the service stays healthy under mixed load: no unexpected answer, no leak of memory or file descriptors.

Clients of a real server send pictures of all formats and sizes, damaged pictures, evaluations and promotions. They read
every route, follow event streams, and keep a training job running all the time. Meanwhile the program samples the
memory and the open files of the server, summed over its workers. The slope of the memory is that of a line through the
samples after the first quarter of the time.

    python tests/stress/soak.py [--minutes 30] [--workers 1]

Time: 30 minutes.
Result: 261,231 requests, no unexpected answer; memory grew by 0.49 MiB a minute (AMD EPYC, 2 cores, 2026-11-24).
Table: results/soak.md, results/soak_workers.md (`--minutes 20 --workers 2`).
"""

import argparse
import io
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

import httpx
import numpy as np
import tiny_models
from mutations import damaged, samples
from PIL import Image
from results import Check, conclude, is_whole
from server import Server
from tiny_models import NAME, TINY

from training.store import LocalStore

SAMPLE_S = 3.0
WARM = 0.25  # warm-up as a share of the time
MOMENTS = 9
MAX_SLOPE = 2.0  # MiB per minute and worker
MAX_MORE_FILES = 4
JOB = {"recipe": NAME, "overrides": TINY | {"epochs": 20}, "promote": "always"}
SIZES = ((32, 32), (640, 480), (3000, 2000), (33, 900))
PAGES = ("/", "/docs", "/openapi.json", "/static/main.js", "/metrics")
ROUTES = ("/health", "/health/live", "/health/ready", "/models", f"/models/{NAME}", "/evaluate", "/train")
ABSENT = (
    "/models/nothing",
    "/train/nothing",
    "/train/nothing/events",
    "/evaluate/nothing",
    "/nothing",
    "/static/nothing",
)

Turn = Callable[[httpx.Client], None]


class Load:
    """The actions of the clients, and the counts of all answers and of the unexpected ones.

    Args:
        store: LocalStore whose versions the clients promote.
    """

    def __init__(self, store: LocalStore):
        self.answers: Counter[str] = Counter()
        self.unexpected: Counter[str] = Counter()
        self.jobs = 0
        self._store = store
        self._random = np.random.default_rng(0)
        self._files = samples()
        del self._files["tiff float"]  # the service refuses it
        self._pictures = [*self._files.values(), *(_photo(size, kind) for size in SIZES for kind in ("JPEG", "PNG"))]

    def turns(self) -> tuple[Turn, ...]:
        return (self.predict, self.predict, self.break_, self.read, self.measure, self.promote, self.train, self.follow)

    def predict(self, http: httpx.Client) -> None:
        count = int(self._random.integers(1, 5))
        files = [("file", self._pictures[self._random.integers(len(self._pictures))]) for _ in range(count)]
        self._ask(http, "POST", "/predict", (200,), files=files)

    def break_(self, http: httpx.Client) -> None:
        _, data = damaged(self._files, 0, int(self._random.integers(1 << 40)))
        headers = {"Content-Type": "image/jpeg"}
        self._ask(http, "POST", "/predict", (200, 413, 415, 422), content=data, headers=headers)

    def read(self, http: httpx.Client) -> None:
        for path in (*PAGES, *ROUTES):
            self._ask(http, "GET", path, (200,))
        for path in ABSENT:
            self._ask(http, "GET", path, (404,))
        time.sleep(0.5)

    def measure(self, http: httpx.Client) -> None:
        limit = int(self._random.choice([10, 300]))
        begun = self._ask(http, "POST", "/evaluate", (200, 202), params={"limit": limit})
        if begun:
            self._ask(http, "GET", f"/evaluate/{begun.json()['id']}", (200,))
        time.sleep(1)

    def promote(self, http: httpx.Client) -> None:
        version = int(self._random.choice(self._store.versions(NAME)))
        # The answer is 404 if a job has just removed an old version.
        self._ask(http, "PUT", f"/models/{NAME}/live", (200, 404), json={"version": version})
        time.sleep(2)

    def train(self, http: httpx.Client) -> None:
        begun = self._ask(http, "POST", "/train", (202,), json=JOB)
        while begun:
            time.sleep(1)
            job = self._ask(http, "GET", f"/train/{begun.json()['id']}", (200,))
            if job and job.json()["finished"]:
                self.jobs += 1
                if job.json()["state"] != "succeeded":
                    self.unexpected[f"job: {job.json()['error']}"] += 1
                return

    def follow(self, http: httpx.Client) -> None:
        jobs = self._ask(http, "GET", "/train", (200,), params={"limit": 1})
        for job in jobs.json() if jobs else []:
            self._ask(http, "GET", f"/train/{job['id']}/events", (200,))
        time.sleep(1)

    def _ask(
        self, http: httpx.Client, method: str, path: str, expected: tuple[int, ...], **body: object
    ) -> httpx.Response | None:
        response = http.request(method, path, **body)  # type: ignore[arg-type]
        kind = path if path in (*PAGES, *ROUTES, *ABSENT) else f"/{path.split('/')[1]}"
        self.answers[f"{method} {kind} {response.status_code}"] += 1
        if response.status_code in expected:
            return response
        self.unexpected[f"{method} {path} {response.status_code} {response.text[:150]}"] += 1
        return None


def main(minutes: float, workers: int, whole: bool) -> int:
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        store = tiny_models.make_store(folder, versions=2)
        load, over = Load(store), threading.Event()
        settings = {"keep_versions": "4", "workers": str(workers)}
        with Server(store.root, folder / "runs", folder / "log", **settings) as server:
            clients = [
                threading.Thread(target=_go_on, args=(turn, server, load, over), daemon=True) for turn in load.turns()
            ]
            for client in clients:
                client.start()
            started = time.monotonic()
            rows: list[tuple[float, float, int]] = []
            while time.monotonic() - started < minutes * 60 and server.process.poll() is None:
                time.sleep(SAMPLE_S)
                with suppress(OSError, StopIteration):  # a worker ended after it was listed
                    rows.append(((time.monotonic() - started) / 60, server.memory_mib(), server.open_files()))
            over.set()
            for client in clients:
                client.join(60)
            stopped = server.stop()
            traces = (folder / "log").read_text().count("Traceback")
    for unexpected, count in load.unexpected.most_common(20):
        print(f"{count} x {unexpected}", file=sys.stderr)
    warm = [row for row in rows if row[0] > WARM * minutes]
    at, memory, files = zip(*warm, strict=True)
    slope, max_slope = float(np.polyfit(at, memory, 1)[0]), MAX_SLOPE * workers
    third = max(1, len(files) // 3)
    more = statistics.median(files[-third:]) - statistics.median(files[:third])
    wrong = sum(load.unexpected.values())
    total = sum(load.answers.values())
    course = ", ".join(f"{rows[round(at)][1]:.0f}" for at in np.linspace(0, len(rows) - 1, MOMENTS))
    flat = more <= MAX_MORE_FILES * workers
    return conclude(
        __file__,
        f"{minutes:g} minutes, {len(load.turns())} clients, {total:,} requests.",
        [
            *(Check(kind, f"{count:,}") for kind, count in sorted(load.answers.items())),
            Check("training jobs", f"{load.jobs}", "> 0", load.jobs > 0),
            Check("unexpected answers", f"{wrong}", "0", wrong == 0),
            Check("errors with a traceback in the log", f"{traces}", "0", traces == 0),
            Check("exit status at the end", f"{stopped}", "0", stopped == 0),
            Check("memory in equal intervals, MiB", course),
            Check("its slope, MiB a minute", f"{slope:+.2f}", f"< {max_slope:g}", slope < max_slope),
            Check("open files, least and most", f"{min(files)}, {max(files)}"),
            Check("open files, last third over first", f"{more:+.0f}", f"<= {MAX_MORE_FILES * workers}", flat),
        ],
        workers,
        whole=whole,
    )


def _go_on(turn: Turn, server: Server, load: Load, over: threading.Event) -> None:
    """Repeat a turn until `over` is set."""
    with server.client() as http:
        while not over.is_set():
            try:
                turn(http)
            except Exception as error:  # the client continues after any error
                if not over.is_set():
                    load.unexpected[f"{turn.__name__}: {type(error).__name__}: {error}"] += 1


def _photo(size: tuple[int, int], kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").resize(size).save(buffer, kind)
    return buffer.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    sys.exit(main(given.minutes, given.workers, is_whole(parser, given)))
