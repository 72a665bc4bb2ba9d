"""The interface between the runner of training jobs and the work of one job: a child process, or a job of Ray."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from app.jobs.training_queue import TrainingJobSummary
from training.recipes import RECIPES, Recipe, format_value
from training.run import Run
from training.store import Promotion

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "MemoryError")


@dataclass(frozen=True)
class Ending:
    """The end of the work of a job. The run folder tells whether it has published a version."""

    error: str | None = None
    """Message of work that has failed and would fail again."""
    crash: str | None = None
    """Reason of an end without a message. Without both, the work was interrupted and continues later."""


class Executor(Protocol):
    """Does the work of jobs."""

    capacity: int
    """Number of jobs that may run at the same time."""
    survives: bool
    """True if the work goes on without this process, so that another one can follow it."""

    def device(self) -> str | None:
        """Return the device that runs one job at a time, or None. This may import PyTorch, so call it in a thread."""

    async def run(self, job: TrainingJobSummary, recipe: Recipe, run: Run) -> Ending | None:
        """Do the work of a job, or follow work that has begun, until its end or until this process loses the job.

        Returns:
            The end of the work. None if another process works in the run folder; the job is then claimed again.

        Raises:
            OSError: The work cannot start.
            RunError: The run folder is damaged.
        """

    async def stop(self, job_id: str) -> None:
        """Stop the work of a cancelled job that `run` does not follow."""


def make_command(recipe: Recipe, run: Run, models: Path | str, promote: Promotion) -> list[str]:
    """Return the command that trains a recipe, or resumes its run.

    Args:
        recipe: The recipe of the job.
        run: Run folder of the command.
        models: Location of the model store.
        promote: Condition under which the trained model goes live.
    """
    command = [sys.executable, "-m", "training", "train", recipe.name]
    if run.recipe_file.exists():
        command.append("--resume")
    else:
        original = RECIPES[recipe.name]
        changed = [field for field in Recipe.model_fields if getattr(recipe, field) != getattr(original, field)]
        command += [f"{field}={format_value(getattr(recipe, field))}" for field in changed]
    command += ["--run", str(run.path), "--models", str(models), "--promote", promote]
    command.append("--debug")  # the output of the process has the traceback of an error
    return command


def last_line(output: Path) -> str:
    """Return the last line of a failed process's output. Out-of-memory errors get a common prefix."""
    lines = output.read_text("utf-8", errors="replace").strip().splitlines() or ["no output"]
    line = lines[-1].removeprefix("error: ")
    if any(sign in line for sign in _OUT_OF_MEMORY) and not line.startswith("out of memory"):
        return f"out of memory: {line}"
    return line
