"""Measure the time of an explanation: POST /explain through a real server, one request after the other.

The program starts the service on the shipped models and explains a photo with each live model. Before the measurement
it explains the photo some times, so that the engine has seen the batch sizes. It prints the median and the 95th
percentile of the time that the client waits, as JSON and as a picture, and keeps the table.

    python benchmarks/explain.py [--requests 50] [--models models]

Target: at most 100 ms for `resnet` on two cores.
Table: results/explain.md.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests/helpers"))

import httpx
import numpy as np
from results import Check, conclude, is_whole
from server import Server

from app.inference.explanation import COUNT

PHOTO = Path(__file__).parents[1] / "docs/pictures/rocket.jpg"
TARGETS_MS = {"resnet": 100.0}
WARMUP_REQUESTS = 5


def measure_ms(client: httpx.Client, model: str, accept: str, requests: int) -> list[float]:
    """Return the milliseconds of each request."""
    times = []
    for _ in range(requests):
        started = time.perf_counter()
        files = {"file": PHOTO.read_bytes()}
        client.post("/explain", params={"model": model}, files=files, headers={"Accept": accept}).raise_for_status()
        times.append(1000 * (time.perf_counter() - started))
    return times


def check(client: httpx.Client, what: str, model: str, accept: str, requests: int) -> Check:
    measure_ms(client, model, accept, WARMUP_REQUESTS)
    median, slow = np.percentile(measure_ms(client, model, accept, requests), (50, 95))
    measured = f"{median:.1f} ms, 95 % within {slow:.1f} ms"
    if model not in TARGETS_MS:
        return Check(what, measured)
    return Check(what, measured, f"median ≤ {TARGETS_MS[model]:.0f} ms", bool(median <= TARGETS_MS[model]))


def main(requests: int, models: Path, whole: bool) -> int:
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(models, Path(folder, "runs"), Path(folder, "log")) as server,
        server.client() as client,
    ):
        checks = [
            check(client, f"`{model}`, {state['engine']}, {name}", model, accept, requests)
            for model, state in client.get("/health").json()["models"].items()
            for name, accept in (("numbers", "application/json"), ("picture", "image/png"))
        ]
    ran = f"{requests} explanations of a photo one after the other, {COUNT} images each, through HTTP;"
    return conclude(__file__, ran, checks, whole=whole)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--models", type=Path, default=Path("models"))
    chosen = parser.parse_args()
    sys.exit(main(chosen.requests, chosen.models, is_whole(parser, chosen)))
