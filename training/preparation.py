"""Progress of what a run computes once, before its first epoch."""

import time
from dataclasses import dataclass

from training.run import TICK_S


@dataclass(frozen=True)
class Preparation:
    """How far it has come; the first report comes before anything is computed."""

    message: str
    """What it is, and for a file how large it is and where it lies, or why there is none."""
    done: int
    """Images seen so far; where mirrored ones are computed apart, they count as further images."""
    images: int
    images_per_s: float = 0.0
    remaining_s: float = 0.0
    """Estimate for the rest of this, not of the run."""
    epoch: int = 0
    """Before the first one."""
    event: str = "preparation"


class Pace:
    """Reports progress every few seconds, and at the end.

    Args:
        message: of the reports.
        images: that are to be seen.
    """

    def __init__(self, message: str, images: int):
        self.message = message
        self.images = images
        self.done = 0
        self._started = self._ticked = time.perf_counter()

    def advance(self, images: int) -> Preparation | None:
        """Count further images as seen; a report if it is time for one."""
        self.done += images
        now = time.perf_counter()
        if self.done < self.images and now - self._ticked <= TICK_S:
            return None
        self._ticked = now
        seconds = (now - self._started) / self.done
        return Preparation(self.message, self.done, self.images, 1 / seconds, seconds * (self.images - self.done))
