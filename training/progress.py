"""This module shows the progress of a run: a live bar and a line per epoch on a terminal, else plain lines."""

from collections.abc import Generator
from contextlib import nullcontext
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from training.loop import Epoch, Event, Tick
from training.phase_report import PhaseReport

Result = TypeVar("Result")


def show_progress(events: Generator[Event, None, Result], console: Console) -> Result:
    """Print a run's events as they arrive, and return the generator's result. Consuming the events drives the run."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[measures]}"))
    bar = Progress(*columns, console=console) if console.is_terminal else None
    task = bar.add_task("starting", total=None, measures="") if bar else TaskID(0)
    with bar or nullcontext():
        while True:
            try:
                event = next(events)
            except StopIteration as stop:
                result: Result = stop.value
                return result
            if bar:
                _show_in_bar(bar, task, event)
            else:
                console.print(_format_line(event))


def _show_in_bar(bar: Progress, task: TaskID, event: Event) -> None:
    if isinstance(event, Epoch):
        bar.console.print(_format_line(event))
        return
    measures = _format_measures(event)
    if isinstance(event, PhaseReport):
        if event.done in (0, event.images):
            bar.console.print(f"{event.phase}: {event.message}")
        bar.update(task, description=event.phase, completed=event.done, total=event.images or None, measures=measures)
    else:
        description = f"epoch {event.epoch}/{event.epochs}"
        bar.update(task, description=description, completed=event.step, total=event.steps, measures=measures)


def _format_line(event: Event) -> str:
    if isinstance(event, PhaseReport):
        line = f"{event.phase}: {event.message}"
        return (
            f"{line}  image {event.done}/{event.images}  {_format_measures(event)}".rstrip() if event.images else line
        )
    if isinstance(event, Tick):
        return f"epoch {event.epoch}/{event.epochs}  step {event.step}/{event.steps}  {_format_measures(event)}"
    return (
        f"epoch {event.epoch}/{event.epochs}  train loss {event.train_loss:.3f} accuracy {event.train_accuracy:.2%}  "
        f"{event.split} loss {event.loss:.3f} top-1 {event.top1:.2%} top-5 {event.top5:.2%}  "
        f"{event.images_per_s:.0f} images/s  {event.seconds:.0f} s  {_format_remaining(event.remaining_s)}"
    )


def _format_measures(event: PhaseReport | Tick) -> str:
    pace = f"{event.images_per_s:.0f} images/s" if event.images_per_s else ""
    if event.remaining_s is not None:
        pace += f"  {_format_remaining(event.remaining_s)}"
    return pace if isinstance(event, PhaseReport) else f"loss {event.loss:.3f}  accuracy {event.accuracy:.2%}  {pace}"


def _format_remaining(seconds: float) -> str:
    return f"{timedelta(seconds=round(seconds))} left"
