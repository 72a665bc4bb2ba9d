"""This module shows the progress of a training run: a live bar and a line per epoch on a terminal, else plain lines."""

from collections.abc import Iterable
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from training.loop import Epoch, Event, Tick
from training.preparation import Preparation


def show_progress(events: Iterable[Event], console: Console) -> None:
    """Print a run's events as they arrive. Consuming the events is what drives the training."""
    if not console.is_terminal:
        for event in events:
            print(_format_line(event), flush=True)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[measures]}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("starting", total=None, measures="")
        for event in events:
            if isinstance(event, Epoch):
                bar.console.print(_format_line(event))
                continue
            if isinstance(event, Preparation):
                if event.done in (0, event.images):
                    bar.console.print(event.message)
                description, completed, total = "preparation", event.done, event.images
            else:
                description, completed, total = f"epoch {event.epoch}/{event.epochs}", event.step, event.steps
            measures = _format_measures(event)
            bar.update(task, description=description, completed=completed, total=total, measures=measures)


def _format_line(event: Event) -> str:
    if isinstance(event, Preparation):
        return f"{event.message}  image {event.done}/{event.images}  {_format_measures(event)}"
    if isinstance(event, Tick):
        return f"epoch {event.epoch}/{event.epochs}  step {event.step}/{event.steps}  {_format_measures(event)}"
    return (
        f"epoch {event.epoch}/{event.epochs}  train loss {event.train_loss:.3f} accuracy {event.train_accuracy:.2%}  "
        f"{event.split} loss {event.loss:.3f} top-1 {event.top1:.2%} top-5 {event.top5:.2%}  "
        f"{event.images_per_s:.0f} images/s  {event.seconds:.0f} s  {_format_remaining(event.remaining_s)}"
    )


def _format_measures(event: Preparation | Tick) -> str:
    pace = f"{event.images_per_s:.0f} images/s"
    if event.remaining_s is not None:
        pace += f"  {_format_remaining(event.remaining_s)}"
    return pace if isinstance(event, Preparation) else f"loss {event.loss:.3f}  accuracy {event.accuracy:.2%}  {pace}"


def _format_remaining(seconds: float) -> str:
    return f"{timedelta(seconds=round(seconds))} left"
