"""Run a phase of a run to its end and collect its progress reports."""

from collections.abc import Generator
from typing import TypeVar

from training.phase_report import PhaseReport

Result = TypeVar("Result")


def collect_events(steps: Generator[PhaseReport, None, Result]) -> tuple[Result, list[PhaseReport]]:
    """Run a computation to its end and return its result and its progress reports."""
    events = []
    while True:
        try:
            events.append(next(steps))
        except StopIteration as stop:
            return stop.value, events
