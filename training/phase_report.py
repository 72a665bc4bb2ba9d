"""The phases of a run, and the reports of its progress outside the epochs.

`Tick` and `Epoch` of `training.loop` report the phase "training".
"""

import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from training.evaluate import BATCH_SIZES, predict
from training.run import TICK_S, Run, RunPhase

Result = TypeVar("Result")


@dataclass(frozen=True)
class PhaseReport:
    """A progress report of a phase other than "training". The first report of a computation precedes it."""

    phase: RunPhase
    message: str
    """Description of the computation. For a file it gives the size and path, or the reason why there is none."""
    done: int = 0
    """Images processed so far. Mirrored images that are computed separately count as further images."""
    images: int = 0
    """Images to process in total. 0 if the computation does not report its progress."""
    images_per_s: float = 0.0
    remaining_s: float | None = None
    """Estimated seconds until the end of the computation, not of the run. None before the first image and after the
    last one."""
    epoch: int = 0
    """Number of the last finished epoch in an export; 0 before the first epoch."""
    event: str = "phase"


class ProgressCounter:
    """A progress counter that reports every `TICK_S` seconds and at the end.

    Args:
        report: Report that precedes the computation.
    """

    def __init__(self, report: PhaseReport):
        self._report = report
        self.done = 0
        self._started = self._ticked = time.perf_counter()

    def advance(self, images: int) -> PhaseReport | None:
        """Count further images as processed. Return a report if one is due, otherwise None."""
        self.done += images
        now = time.perf_counter()
        if self.done < self._report.images and now - self._ticked <= TICK_S:
            return None
        self._ticked = now
        seconds = (now - self._started) / self.done
        remaining_s = seconds * (self._report.images - self.done) or None
        return replace(self._report, done=self.done, images_per_s=1 / seconds, remaining_s=remaining_s)


def predict_with_reports(
    model: Callable[[Tensor], Tensor], images: Tensor, report: PhaseReport
) -> Generator[PhaseReport, None, Tensor]:
    """Compute the logits of all images as `predict` does, and yield `report` and the progress."""
    yield report
    progress, parts = ProgressCounter(report), list[Tensor]()
    for batch in images.split(BATCH_SIZES[images.device.type]):
        parts.append(predict(model, batch))
        if next_report := progress.advance(len(batch)):
            yield next_report
    return torch.cat(parts)


def record_reports(reports: Generator[PhaseReport, None, Result], run: Run) -> Generator[PhaseReport, None, Result]:
    """Pass the reports and the result of a computation on, and record each report in the run's metrics."""
    while True:
        try:
            report = next(reports)
        except StopIteration as stop:
            result: Result = stop.value
            return result
        run.record(asdict(report))
        yield report
