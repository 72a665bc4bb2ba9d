"""Measure the CPU time that the score of familiar images adds to the answer of POST /predict.

The code of the service makes both answers from the same logits, in turns. The answer without the score lacks its
logarithm, the comparison with the threshold, and two members of the JSON. The added time is compared with the CPU time
of a whole request, which the program measures on a real server that answers as many images per request with `resnet`,
the fastest model. It prints the added microseconds and the share, and keeps the table.

    python benchmarks/familiarity_cost.py [--rounds 200] [--requests 1000] [--models models]

Target: at most 2 % of the CPU time of a request.
Table: results/familiarity_cost.md.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests/helpers"))

import httpx
import numpy as np
import processes
from numpy.typing import NDArray
from pydantic_core import to_json
from results import Check, conclude, is_whole
from server import Server
from typing_extensions import override

from app.client import encode_image
from app.inference.batching import BatchOutput, Logits, Probabilities, Scores
from app.routes.predict import PredictedClass, PredictQuery, make_predictions, top_classes
from training.store import LocalStore, ModelCard

MODEL = "resnet"
IMAGES = (1, 32)  # per request
CALLS = 50  # per round
WARMUP_REQUESTS = 50
MAX_SHARE = 0.02


class OutputWithoutScore(BatchOutput):
    """The output of a batch whose softmax does not compute the score."""

    @cached_property
    @override
    def _softmax(self) -> tuple[Probabilities, NDArray[np.float64]]:
        exponentials = np.exp(self.logits.astype(np.float64) - self.logits.max(1, keepdims=True))
        sums = exponentials.sum(1, keepdims=True)
        return exponentials / sums, sums


@dataclass(frozen=True, slots=True)
class PredictionWithoutScore:
    """The prediction of an image without `familiar` and `familiarity`."""

    file: str | None
    classes: list[PredictedClass]
    warnings: list[str]


def answer_with_score(logits: Logits, card: ModelCard, query: PredictQuery) -> bytes:
    scores = Scores(BatchOutput(logits))
    return to_json(make_predictions([None] * len(logits), scores, [[]] * len(logits), card, query))


def answer_without_score(logits: Logits, card: ModelCard, query: PredictQuery) -> bytes:
    classes = top_classes(Scores(OutputWithoutScore(logits)), card, query.top_k)
    return to_json([PredictionWithoutScore(None, each, []) for each in classes])


def measure_added_us(images: int, card: ModelCard, rounds: int) -> float:
    """Return the CPU time that the score adds to one request in microseconds, the median of the rounds."""
    logits = np.random.default_rng(0).normal(size=(images, len(card.classes))).astype(np.float32)
    query = PredictQuery()

    def cpu_us(answer: Callable[[Logits, ModelCard, PredictQuery], bytes]) -> float:
        started = time.thread_time()
        for _ in range(CALLS):
            answer(logits, card, query)
        return 1e6 * (time.thread_time() - started) / CALLS

    return statistics.median(cpu_us(answer_with_score) - cpu_us(answer_without_score) for _ in range(rounds))


def measure_request_us(client: httpx.Client, server: Server, images: int, requests: int) -> float:
    """Return the CPU time of the server for one request with these images in microseconds."""
    random = np.random.default_rng(0)
    pictures = [encode_image(random.integers(0, 256, (32, 32, 3), np.uint8))[1] for _ in range(images)]
    files = [("file", picture) for picture in pictures]
    used_s = 0.0
    for count in (WARMUP_REQUESTS, requests):
        before_s = processes.cpu_s(server.process.pid)
        for _ in range(count):
            client.post("/predict", params={"model": MODEL}, files=files).raise_for_status()
        used_s = processes.cpu_s(server.process.pid) - before_s
    return 1e6 * used_s / requests


def main(rounds: int, requests: int, models: Path, whole: bool) -> int:
    store = LocalStore(models)
    card = store.card(*store.parse(MODEL))
    checks = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(models, Path(folder, "runs"), Path(folder, "log")) as server,
        server.client() as client,
    ):
        for images in IMAGES:
            added_us = measure_added_us(images, card, rounds)
            request_us = measure_request_us(client, server, images, requests)
            share = added_us / request_us
            checks.append(
                Check(
                    f"`{MODEL}`, images per request: {images}",
                    f"{added_us:.1f} µs of {request_us:.0f} µs, {share:.2%}",
                    f"≤ {MAX_SHARE:.0%}",
                    share <= MAX_SHARE,
                )
            )
    ran = (
        f"CPU time that the score adds to a request, median of {rounds} rounds, of the CPU time of a request, mean of "
        f"{requests};"
    )
    return conclude(__file__, ran, checks, whole=whole)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--models", type=Path, default=Path("models"))
    chosen = parser.parse_args()
    sys.exit(main(chosen.rounds, chosen.requests, chosen.models, is_whole(parser, chosen)))
