"""Measure the images per second of a function that computes logits, such as an engine."""

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

WARMUP_CALLS = 3


def measure_images_per_s(
    engine: Callable[[NDArray[np.uint8]], NDArray[np.float32]], size: int, seconds: float
) -> float:
    """Return the images per second of an engine with batches of one size."""
    batch = np.random.default_rng(0).integers(0, 256, (size, 3, 32, 32), np.uint8)
    for _ in range(WARMUP_CALLS):
        engine(batch)
    calls, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        engine(batch)
        calls += 1
    return calls * size / elapsed
