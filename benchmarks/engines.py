"""Measure the images per second of the engines alone, without HTTP, in one process.

The result is the upper limit for any service on this machine. The program gives every engine that can compute a live
model batches of random images, one batch size after the other, for some seconds each. It then measures the service's
batcher under back-to-back calls: a few callers with as many images per call as the largest batch size, and twice as
many callers as that size with one image each. It prints the median over the rounds and writes it to
benchmarks/results/engines.md, or engines_gpu.md on a machine with a GPU.

    python benchmarks/engines.py [--rounds 3] [--seconds 1] [--models models]

Result: int8 computes 4,084 images/s of `resnet` and 866 of `resnet18` in batches of 32 (AMD EPYC, 2 cores, 2026-11-26).
Table: results/engines.md, results/engines_gpu.md.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests/helpers"))

import numpy as np
import torch
from results import describe_run, keep
from throughput import measure_images_per_s

from app.inference.batching import Batcher
from training.runtimes import Runtime, selection
from training.runtimes.engine import Engine, EngineError
from training.store import MODEL, LocalStore

RUNTIMES: tuple[Runtime, ...] = ("int8", "openvino", "torchscript")
SIZES = (1, 8, 32) if not torch.cuda.is_available() else (1, 32, 256)
CALLERS = 4


def batched_per_s(engine: Engine, size: int, callers: int, seconds: float) -> float:
    """Return the images per second of a batcher when `callers` callers give it batches of `size` images from memory."""
    images = np.random.default_rng(0).integers(0, 256, (size, 3, 32, 32), np.uint8)
    most = max(SIZES)
    batcher = Batcher(engine, most, callers * size)

    async def call(end: float) -> int:
        done = 0
        while time.perf_counter() < end:
            await batcher.run(images)
            done += size
        return done

    async def measure() -> float:
        started = time.perf_counter()
        done = await asyncio.gather(*(call(started + seconds) for _ in range(callers)))
        return sum(done) / (time.perf_counter() - started)

    return asyncio.run(measure())


def main(rounds: int, seconds: float, models: Path) -> None:
    store = LocalStore(models)
    loaded = []
    failures = []
    for name in store.names():
        version = store.live(name) or 0
        if store.card(name, version).cascade:  # it has no engine of its own
            continue
        file = store.folder(name, version) / MODEL
        for runtime in RUNTIMES:
            try:
                loaded.append((f"{name}/{version}", selection.load(file, "auto", runtime)))
            except EngineError as error:
                failures.append(f"{name}, {runtime}: {error}")
    most = max(SIZES)
    columns = [*map(str, SIZES), f"batcher, {most} a call", "batcher, 1 a call"]
    measured = defaultdict(list)
    for _ in range(rounds):
        for name, engine in loaded:
            rates = [measure_images_per_s(engine, size, seconds) for size in SIZES]
            rates += [batched_per_s(engine, most, CALLERS, seconds), batched_per_s(engine, 1, 2 * most, seconds)]
            for column, rate in zip(columns, rates, strict=True):
                measured[name, engine.name, column].append(rate)
    lines = [
        "# The engines alone",
        "",
        f"Images a second by size of batch; {describe_run()}; "
        f"{rounds} rounds of {seconds:g} s, medians. PyTorch {torch.__version__}.",
        "",
        f"| model | engine | {' | '.join(columns)} |",
        f"| --- | --- {'| --: ' * len(columns)}|",
    ]
    for name, engine in loaded:
        medians = [f"{statistics.median(measured[name, engine.name, column]):,.0f}" for column in columns]
        lines.append(f"| `{name}` | {engine.name} | {' | '.join(medians)} |")
    lines += ["", *failures] if failures else []
    keep(__file__, lines, suffix="_gpu" if torch.cuda.is_available() else "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--models", type=Path, default=Path("models"))
    chosen = parser.parse_args()
    main(chosen.rounds, chosen.seconds, chosen.models)
