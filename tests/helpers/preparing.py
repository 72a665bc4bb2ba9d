"""Run the preparation before the first epoch to its end and collect its progress events."""

from collections.abc import Generator
from typing import TypeVar

from training.preparation import Preparation

Prepared = TypeVar("Prepared")


def collect_events(steps: Generator[Preparation, None, Prepared]) -> tuple[Prepared, list[Preparation]]:
    """Run a preparation to its end and return its result and its progress events."""
    events = []
    while True:
        try:
            events.append(next(steps))
        except StopIteration as stop:
            return stop.value, events
