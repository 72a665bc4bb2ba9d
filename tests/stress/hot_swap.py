"""Test that no request fails and no answer comes from a wrong version while versions are promoted.

32 connections post images to one server without pause. Meanwhile versions are promoted, half of them by `PUT
/models/resnet/live`, half by another process through `Store.promote`. Every answer must name a version that was live at
some time between the start and the end of the request. It must carry the probabilities of that version, as this process
computes them from the version's file. With several workers, a worker that has not yet noticed a promotion may serve the
previous version for `LAG_S` seconds.

    python tests/stress/hot_swap.py [--promotions 100] [--workers 1]

Time: 84 s, with two workers 162 s.
Result: 100 promotions, 18,134 requests, none failed or answered by a version that was not live (AMD EPYC, 2 cores,
2026-11-24).
Table: results/hot_swap.md, results/hot_swap_workers.md (`--workers 2`).
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

import httpx
import tiny_models
from mutations import samples
from results import Check, conclude, is_whole
from server import Server
from tiny_models import NAME

from app.inference.batching import BatchOutput, Scores
from app.inference.images.encoded import decode
from app.routes.predict import top_classes
from app.settings import Settings
from training.runtimes import selection
from training.store import MODEL, LocalStore

CONNECTIONS = 32
VERSIONS = 3
TOP_K = 100
LAG_S = 1.0
TOLERANCE = 1e-5  # for probabilities; batches of different sizes round differently
PICTURES = ("jpeg baseline", "png rgb 32x32", "webp lossy", "gif", "tiff")
PROMOTE = "import sys; from pathlib import Path; from training.store import LocalStore; "
PROMOTE += "LocalStore(Path(sys.argv[1])).promote(sys.argv[2], int(sys.argv[3]))"


@dataclass(frozen=True)
class Answer:
    """One request with its answer; the times of sending and receiving come from the same clock."""

    picture: str
    sent: float
    received: float
    status: int
    body: Any


@dataclass(frozen=True)
class Reign:
    """The interval in which a version may have been live.

    It lasts from the call that promotes the version to the end of the call that promotes another one. If another
    process promotes, the call ends when the service reports the new live version.
    """

    version: int
    start: float
    stop: float


async def serve_and_promote(
    url: str, store: LocalStore, promotions: int, lag_s: float
) -> tuple[list[Answer], list[Reign], list[float]]:
    """Post images on all connections and promote versions meanwhile.

    Args:
        lag_s: Seconds that a worker may serve the previous version after a promotion. It is also the pause before the
            next promotion.

    Returns:
        All answers, the intervals in which each version was live, and the seconds that every promotion took.
    """
    answers: list[Answer] = []
    over = asyncio.Event()
    pictures = {name: samples()[name] for name in PICTURES}

    async def post_without_pause(number: int) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            while not over.is_set():
                name = PICTURES[(number + len(answers)) % len(PICTURES)]
                sent = time.monotonic()
                response = await http.post("/predict", params={"top_k": TOP_K}, files={"file": pictures[name]})
                answers.append(Answer(name, sent, time.monotonic(), response.status_code, response.json()))

    reigns, seconds = [], []
    async with httpx.AsyncClient(base_url=url, timeout=60) as http, asyncio.TaskGroup() as clients:
        for number in range(CONNECTIONS):
            clients.create_task(post_without_pause(number))
        version, since = VERSIONS, time.monotonic()
        for number in range(promotions):
            following = version % VERSIONS + 1
            asked = time.monotonic()
            if number % 2:
                command = [sys.executable, "-c", PROMOTE, str(store.root), NAME, str(following)]
                await asyncio.to_thread(subprocess.run, command, check=True)
            else:
                (await http.put(f"/models/{NAME}/live", json={"version": following})).raise_for_status()
            while number % 2 and (await http.get(f"/models/{NAME}")).json()["live"] != following:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            seen = time.monotonic()
            reigns.append(Reign(version, since, seen + lag_s))
            seconds.append(seen - asked)
            await asyncio.sleep(lag_s)
            version, since = following, asked
        await asyncio.sleep(0.5)
        over.set()
    return answers, [*reigns, Reign(version, since, time.monotonic())], seconds


def expected(store: LocalStore) -> dict[tuple[int, str], dict[int, float]]:
    """Return the probabilities by class id for every version and picture, from an engine like that of the service."""
    settings, files, found = Settings(), samples(), {}
    for version in store.versions(NAME):
        card = store.card(NAME, version)
        engine = selection.load(store.folder(NAME, version) / MODEL, settings.device, settings.runtime)
        for name in PICTURES:
            pixels = decode(files[name], settings.max_image_bytes, settings.max_image_pixels)
            (classes,) = top_classes(Scores(BatchOutput(engine(pixels[None]))), card, TOP_K)
            found[version, name] = {each.class_id: each.probability for each in classes}
    return found


def difference(one: dict[int, float], other: dict[int, float]) -> float:
    """Return the largest difference between two sets of probabilities, or infinity if their classes differ."""
    return max(abs(one[key] - other[key]) for key in one) if one.keys() == other.keys() else float("inf")


def main(promotions: int, workers: int, whole: bool) -> int:
    with tempfile.TemporaryDirectory(prefix="hot-swap-") as name:
        folder = Path(name)
        store = tiny_models.make_store(folder, VERSIONS)
        right = expected(store)
        with Server(store.root, folder / "runs", folder / "log", workers=str(workers)) as server:
            started = time.monotonic()
            lag_s = LAG_S if workers > 1 else 0.0
            answers, reigns, seconds = asyncio.run(serve_and_promote(server.address or "", store, promotions, lag_s))
            took = time.monotonic() - started

    good = [answer for answer in answers if answer.status == 200]
    strangers = [answer for answer in good if not any(_was_live(reign, answer) for reign in reigns)]
    differences = [
        difference(right[answer.body["version"], answer.picture], _probabilities(answer.body)) for answer in good
    ]
    apart = min(
        difference(right[one, name], right[other, name])
        for name in PICTURES
        for one in range(1, VERSIONS + 1)
        for other in range(1, one)
    )
    waited = sorted(answer.received - answer.sent for answer in answers)
    median, late, longest = (waited[int((len(waited) - 1) * share)] * 1000 for share in (0.5, 0.99, 1))
    failed = len(answers) - len(good)
    wrong = sum(value > TOLERANCE for value in differences)
    return conclude(
        __file__,
        f"{promotions} promotions, {CONNECTIONS} connections, {len(answers):,} requests in {took:.0f} s.",
        [
            Check("failed requests", f"{failed}", "0", failed == 0),
            Check("answers of a version that was not live", f"{len(strangers)}", "0", not strangers),
            Check("answers with other probabilities than their version's", f"{wrong}", "0", wrong == 0),
            Check(
                "probabilities differ from them at most by", f"{max(differences):.1e}", f"<= {TOLERANCE:g}", wrong == 0
            ),
            Check("those of two versions at least by", f"{apart:.1e}", f"> {2 * TOLERANCE:g}", apart > 2 * TOLERANCE),
            Check("until a promotion by PUT is served, median", f"{statistics.median(seconds[::2]) * 1000:.0f} ms"),
            Check("until one by another process is, median", f"{statistics.median(seconds[1::2]) * 1000:.0f} ms"),
            Check("a request: median, 99th percentile, slowest", f"{median:.0f}, {late:.0f}, {longest:.0f} ms"),
        ],
        workers,
        whole=whole,
    )


def _was_live(reign: Reign, answer: Answer) -> bool:
    overlaps = reign.start <= answer.received and answer.sent <= reign.stop
    return overlaps and reign.version == answer.body["version"]


def _probabilities(body: Any) -> dict[int, float]:
    return {each["class_id"]: each["probability"] for each in body["predictions"][0]["classes"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--promotions", type=int, default=100)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    sys.exit(main(given.promotions, given.workers, is_whole(parser, given)))
