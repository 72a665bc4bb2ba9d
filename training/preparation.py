"""This module reports the progress of computations that a run does once, before its first epoch."""

import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from typing import TypeVar

from training.run import TICK_S, Run

Prepared = TypeVar("Prepared")


@dataclass(frozen=True)
class Preparation:
    """A progress report of a preparation. The first report precedes any computation."""

    message: str
    """Description of the computation. For a file it gives the size and path, or the reason why there is none."""
    done: int
    """Images processed so far. Mirrored images that are computed separately count as further images."""
    images: int
    """Images to process in total."""
    images_per_s: float = 0.0
    remaining_s: float | None = None
    """Estimated seconds until the end of the preparation, not of the run. None before the first image and after the
    last one."""
    epoch: int = 0
    """Always 0: a preparation runs before the first epoch."""
    event: str = "preparation"


class ProgressCounter:
    """A progress counter that reports every `TICK_S` seconds and at the end.

    Args:
        message: Message of the reports.
        images: Number of images to process.
    """

    def __init__(self, message: str, images: int):
        self.message = message
        self.images = images
        self.done = 0
        self._started = self._ticked = time.perf_counter()

    def advance(self, images: int) -> Preparation | None:
        """Count further images as processed. Return a report if one is due, otherwise None."""
        self.done += images
        now = time.perf_counter()
        if self.done < self.images and now - self._ticked <= TICK_S:
            return None
        self._ticked = now
        seconds = (now - self._started) / self.done
        remaining_s = seconds * (self.images - self.done) or None
        return Preparation(self.message, self.done, self.images, 1 / seconds, remaining_s)


def record_reports(
    preparation: Generator[Preparation, None, Prepared], run: Run
) -> Generator[Preparation, None, Prepared]:
    """Pass the reports and the result of a preparation on, and record each report in the run's metrics."""
    while True:
        try:
            report = next(preparation)
        except StopIteration as stop:
            prepared: Prepared = stop.value
            return prepared
        run.record(asdict(report))
        yield report
