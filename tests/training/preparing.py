"""What is computed before the first epoch, watched to its end."""

from collections.abc import Generator
from typing import TypeVar

from training.preparation import Preparation

Prepared = TypeVar("Prepared")


def watched(steps: Generator[Preparation, None, Prepared]) -> tuple[Prepared, list[Preparation]]:
    """The result, and the progress that was reported."""
    events = []
    while True:
        try:
            events.append(next(steps))
        except StopIteration as stop:
            return stop.value, events
