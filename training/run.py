"""`Run` reads and writes the folder of a training run.

The folder holds recipe.json, metrics.jsonl, checkpoint.pt, teacher_logits.pt, test_logits.pt, published.json,
extra_data.npz if the run has extra training images, and `stop` if the run must end. The export adds the folder
pictures, and a job of the service output.log.

Input: a recipe and, for every epoch, metrics and training state.
Output: the same data, read back to resume, watch or export the run.
"""

import fcntl
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO, TypeVar

from pydantic import BaseModel

from training.errors import ReportedError
from training.files import write_durably
from training.recipes import Recipe, parse_recipe
from training.store import Evaluation

if TYPE_CHECKING:  # checkpoints alone need PyTorch, which takes seconds to import
    from torch import Tensor

State = dict[str, Any]
Parsed = TypeVar("Parsed")
RunPhase = Literal["loading", "features", "training", "exporting", "quantizing", "measuring", "publishing"]
"""The work that a run does now, in the order of a run.

loading: weights, data and a checkpoint; features: outputs of frozen stages and logits of a teacher; exporting:
batch-normalization statistics, calibration, `model.pt` and its other forms; quantizing: the int8 form and its
comparison; measuring: the exported files on the test set; publishing: the version in the store and the figures of the
run.
"""
FIGURES = ("curves", "superclasses", "reliability", "classes", "mistakes")
"""Names of the PNG files in the folder `pictures` of an exported run."""

OUTPUT = "output.log"
"""File with the output of the process that trains, if the service started it."""

PUBLISHED = "published"
"""Event of the line that `PrintedRun` prints for the publication."""

_TAIL_BYTES = 16 << 10  # a line of metrics has a few hundred bytes
TICK_S = 5.0  # seconds between two lines of metrics within an epoch
START_TIMEOUT_S = 60.0  # upper bound for a child with an inherited lock to load its libraries and write its pid


class Publication(BaseModel, use_attribute_docstrings=True):
    """The result of exporting a run."""

    model: str
    """Name of the model."""
    version: int
    """Number of the new version."""
    live: bool
    """True if the new version was made live."""
    test: Evaluation
    """Measures of the exported file on the full test set."""
    epoch: int | None = None
    """Epoch of the exported checkpoint; None in files of earlier releases."""


class RunError(ReportedError, ValueError):
    """The run folder cannot be used for the requested operation."""


class RunBusy(RunError):
    """Another process holds the lock of the run folder."""

    exit_status = os.EX_TEMPFAIL


class Run:
    """The folder of one run.

    Args:
        path: The folder. `create` makes it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lock_file = path / "lock"
        self.stop_file = path / "stop"
        self.recipe_file = path / "recipe.json"
        self.extra_file = path / "extra_data.npz"
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoint_file = path / "checkpoint.pt"
        self.teacher_file = path / "teacher_logits.pt"
        self.logits_file = path / "test_logits.pt"
        self.announcement_file = path / "publishing.sha256"
        self.publication_file = path / "published.json"
        self.output_file = path / OUTPUT
        self.pictures = path / "pictures"

    def files(self) -> dict[str, Path]:
        """Return the existing files that people read, by name: recipe, metrics, publication, output and figures."""
        known = [self.recipe_file, self.metrics_file, self.publication_file, self.output_file]
        known += [self.pictures / f"{name}.png" for name in FIGURES]
        return {file.name: file for file in known if file.is_file()}

    @contextmanager
    def lock(self, inherited: int | None = None) -> Iterator[None]:
        """Lock the folder against other processes. The operating system releases the lock when this process ends.

        Args:
            inherited: Descriptor of a lock file that the parent process has locked, see `lock_for_child`.

        Raises:
            RunBusy: Another process holds the lock.
            RunError: The folder does not exist, or the descriptor belongs to another file.
        """
        if not self.path.is_dir():
            raise RunError(f"there is no run in {self.path}; give the folder of a run")
        with self.lock_file.open("a+") if inherited is None else self._inherited_lock(inherited) as file:
            if not _try_lock(file):
                raise RunBusy(_describe_holder(file, self.path))
            write_pid(file, os.getpid())
            yield

    @contextmanager
    def lock_for_child(self) -> Iterator[TextIO]:
        """Lock the folder for a child process, which inherits the lock with the descriptor of the file.

        A flock(2) belongs to the open file description, so it lasts until the child ends as well. The caller passes the
        descriptor to the child and writes the child's pid with `write_pid`.

        Yields:
            The empty lock file.

        Raises:
            RunBusy: Another process holds the lock.
        """
        with self.lock_file.open("a+") as file:
            if not _try_lock(file):
                raise RunBusy(_describe_holder(file, self.path))
            file.truncate(0)  # an earlier holder's pid must not be mistaken for the child's
            yield file

    def _inherited_lock(self, descriptor: int) -> TextIO:
        try:
            file = os.fdopen(descriptor, "a+")
        except OSError as error:
            raise RunError(f"the inherited descriptor {descriptor} cannot be used: {error.strerror}") from error
        os.set_inheritable(descriptor, False)  # child processes of this one must not inherit the lock
        if not (self.lock_file.exists() and os.path.samestat(os.fstat(descriptor), self.lock_file.stat())):
            file.close()
            raise RunError(f"the inherited descriptor {descriptor} is not that of {self.lock_file}")
        return file

    def holder(self, wait_s: float = START_TIMEOUT_S) -> int | None:
        """Return the pid of the process that holds the lock, or None.

        Args:
            wait_s: Seconds to wait for a starting holder to write its pid. A holder without a pid counts as none.
        """
        deadline = time.monotonic() + wait_s
        with suppress(FileNotFoundError), self.lock_file.open() as file:
            while _is_locked(file):
                pid = _read_pid(file)
                if pid or time.monotonic() > deadline:
                    return pid
                time.sleep(0.05)
        return None

    def request_stop(self) -> None:
        """Create the stop file, which makes a process that trains in the folder, now or later, end itself.

        This works without a supervisor that could send the process a signal.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.stop_file.touch()

    def create(self, recipe: Recipe, extra_data: bytes | None = None) -> None:
        """Create the folder and write the recipe.

        Args:
            recipe: Recipe of the run.
            extra_data: Content of the file with its extra training images.

        Raises:
            RunError: The folder already holds a run.
        """
        if self.recipe_file.exists():
            raise RunError(f"{self.path} contains a run already; give --resume to continue it, or another folder")
        self.path.mkdir(parents=True, exist_ok=True)
        if extra_data is None:
            self.extra_file.unlink(missing_ok=True)
        else:
            write_durably(self.extra_file, extra_data)
        write_durably(self.recipe_file, recipe.model_dump_json(indent=2).encode())

    def discard(self) -> None:
        """Delete the recipe so that the folder is free for another run, unless a checkpoint exists."""
        if not self.checkpoint_file.exists():
            self.recipe_file.unlink(missing_ok=True)

    def recipe(self) -> Recipe:
        """Read the recipe of the run.

        Raises:
            RunError: There is no run in this folder, or its recipe is damaged.
            RecipeError: This release does not support the recipe.
        """
        if not self.recipe_file.exists():
            raise RunError(f"there is no run in {self.path}; give the folder of a run")
        return parse_recipe(_read_file(self.recipe_file, json.loads))

    def extend(self, epochs: int) -> Recipe:
        """Raise the number of epochs of a run whose learning rates do not depend on that number.

        Raises:
            RunError: The recipe's schedule depends on the number of epochs, or `epochs` is less than before.
        """
        recipe = self.recipe()
        if recipe.schedule not in {"constant", "step"} or recipe.finetune_epochs:
            raise RunError(f"the schedule {recipe.schedule} depends on epochs={recipe.epochs}; start a new run instead")
        if epochs < recipe.epochs:
            raise RunError(
                f"the run was started for {recipe.epochs} epochs and cannot be shortened to {epochs}; start a new run"
            )
        recipe = parse_recipe(recipe.model_dump() | {"epochs": epochs})
        write_durably(self.recipe_file, recipe.model_dump_json(indent=2).encode())
        return recipe

    def record(self, metrics: dict[str, Any]) -> None:
        """Append one line of metrics. The line of an epoch is flushed to disk with fsync."""
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            if metrics["event"] == "epoch":
                os.fsync(file.fileno())

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Iterate over all lines of metrics, oldest first."""
        return (metrics for _, metrics in self.numbered_metrics())

    def numbered_metrics(self, after: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """Iterate over (number, metrics) of the lines whose number, counted from 1, is greater than `after`."""
        if self.metrics_file.exists():
            with self.metrics_file.open() as file:
                yield from parse_metrics(file, after)

    def latest_metrics(self) -> dict[str, Any] | None:
        """Return the last line of metrics, or None. This reads only the end of the file."""
        with suppress(FileNotFoundError), self.metrics_file.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            for line in reversed(file.read().splitlines()):
                with suppress(json.JSONDecodeError):  # blank or cut off, as in `parse_metrics`
                    latest: dict[str, Any] = json.loads(line)
                    return latest
        return None

    def epochs(self) -> list[dict[str, Any]]:
        """List the metrics of every finished epoch."""
        return [metrics for metrics in self.metrics() if metrics["event"] == "epoch"]

    def drop_metrics_after(self, epoch: int) -> None:
        """Blank the metrics of epochs after `epoch`, which a resumed run measures again. Line numbers do not change."""
        lines = dict[int, str]()
        for number, metrics in self.numbered_metrics():
            lines[number] = json.dumps(metrics) if metrics["epoch"] <= epoch else ""
        content = "".join(lines.get(number, "") + "\n" for number in range(1, max(lines, default=0) + 1))
        write_durably(self.metrics_file, content.encode())

    def save(self, state: State) -> None:
        """Replace the checkpoint atomically: after a crash, either the previous or the new one is complete.

        The records of an earlier publication are deleted, because they refer to an earlier checkpoint.
        """
        self.announcement_file.unlink(missing_ok=True)
        self.publication_file.unlink(missing_ok=True)
        write_durably(self.checkpoint_file, _serialize(state))

    def load(self, fingerprint: str | None = None) -> State:
        """Load the last checkpoint onto the CPU.

        Args:
            fingerprint: Expected fingerprint of the run's data set; None skips the check.

        Raises:
            RunError: No epoch is finished, the checkpoint is damaged, or the run was trained on other data.
        """
        if not self.checkpoint_file.exists():
            raise RunError(f"{self.path} has no checkpoint because no epoch has been finished yet; train first")
        state: State = _read_file(self.checkpoint_file, _deserialize)
        if fingerprint and state["data"] != fingerprint:
            raise RunError(
                f"{self.path} was trained on other data (fingerprint {state['data'][:8]}, now {fingerprint[:8]}); "
                "give the same data set, or start a new run"
            )
        return state

    def save_teacher_logits(self, logits: "Tensor", teacher: str, fingerprint: str) -> None:
        """Save a teacher's logits on the training images of a data set, float [N, classes]."""
        write_durably(self.teacher_file, _serialize({"logits": logits, "teacher": teacher, "data": fingerprint}))

    def teacher_logits(self, teacher: str, fingerprint: str) -> "Tensor | None":
        """Return the saved logits of this teacher for this data set, float [N, classes], or None."""
        if not self.teacher_file.exists():
            return None
        saved = _read_file(self.teacher_file, _deserialize)
        if not isinstance(saved, dict) or (saved["teacher"], saved["data"]) != (teacher, fingerprint):
            return None
        logits: Tensor = saved["logits"]
        return logits

    def save_test_logits(self, logits: "Tensor", temperature: float) -> None:
        """Save the exported model's calibrated logits on the test set, float32 [N, classes]."""
        write_durably(self.logits_file, _serialize({"logits": logits, "temperature": temperature}))

    def test_logits(self) -> tuple["Tensor", float]:
        """Return the calibrated logits of the test set, float32 [N, classes], and the temperature that divided them.

        Raises:
            RunError: The run has not been exported yet.
        """
        if not self.logits_file.exists():
            raise RunError(f"{self.path} has not been exported yet; python -m training export {self.path} does it")
        saved = _read_file(self.logits_file, _deserialize)
        return saved["logits"], saved["temperature"]

    def announce_publication(self, sha256: str) -> None:
        """Record the checksum of the file to be published, so that it can be found in the store after a crash."""
        write_durably(self.announcement_file, sha256.encode())

    def announced_publication(self) -> str | None:
        """Return the checksum of a file whose publication began but was not recorded, or None."""
        return self.announcement_file.read_text().strip() if self.announcement_file.exists() else None

    def record_publication(self, publication: Publication) -> None:
        """Record the model and version under which the run was published."""
        write_durably(self.publication_file, publication.model_dump_json(indent=1).encode())
        self.announcement_file.unlink(missing_ok=True)

    def publication(self) -> Publication | None:
        """Return the publication of the last checkpoint, or None before it was published."""
        if not self.publication_file.exists():
            return None
        return _read_file(self.publication_file, Publication.model_validate_json)

    def outcome(self) -> Publication | None:
        """Return the publication of the finished run, or None if epochs or the publication are missing."""
        published = self.publication()
        if published and (published.epoch or len(self.epochs())) == self.recipe().total_epochs:
            return published
        return None


class FollowedRun(Run):
    """A run folder that another process of the group writes. This process only reads it."""

    def record(self, metrics: dict[str, Any]) -> None:
        """Do nothing."""

    def drop_metrics_after(self, epoch: int) -> None:
        """Do nothing."""

    def save(self, state: State) -> None:
        """Do nothing."""

    def save_teacher_logits(self, logits: "Tensor", teacher: str, fingerprint: str) -> None:
        """Do nothing."""


class PrintedRun(Run):
    """A run folder whose metrics and publication are also printed, one JSON object per line.

    A job of a Ray cluster uses it, because the service reads its output, not its folder.
    """

    def record(self, metrics: dict[str, Any]) -> None:
        """Append and print one line of metrics."""
        super().record(metrics)
        print(json.dumps(metrics), flush=True)

    def record_publication(self, publication: Publication) -> None:
        """Record and print the publication."""
        super().record_publication(publication)
        print(json.dumps({"event": PUBLISHED} | publication.model_dump(mode="json")), flush=True)


def parse_metrics(lines: Iterable[str], after: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Iterate over (number, metrics) of the lines whose number, counted from 1, is greater than `after`."""
    for number, line in islice(enumerate(lines, start=1), after, None):
        # A line is blank after drop_metrics_after, or cut off after a crash or on a full disk.
        with suppress(json.JSONDecodeError):
            yield number, json.loads(line)


def _try_lock(file: TextIO) -> bool:
    """Try to lock a file.

    It tries five times, because `_is_locked` in another process holds the lock for a moment.

    Returns:
        False if another process holds the lock.
    """
    for _ in range(5):
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.05)
    return False


def _describe_holder(file: TextIO, folder: Path) -> str:
    return f"process {_read_pid(file) or '(unknown)'} is working in {folder}; wait for its end or stop it"


def _is_locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def write_pid(file: TextIO, pid: int) -> None:
    """Write the pid of the process that holds a lock into the lock file."""
    file.truncate(0)
    file.write(f"{pid}\n")
    file.flush()


def _read_pid(file: TextIO) -> int | None:
    """Read the pid of the lock's holder, or None before it was written."""
    file.seek(0)
    text = file.read().strip()
    return int(text) if text.isdecimal() else None


def _read_file(path: Path, parse: Callable[[bytes], Parsed]) -> Parsed:
    """Read and parse a file.

    Raises:
        RunError: The file is damaged.
    """
    content = path.read_bytes()
    try:
        return parse(content)
    except Exception as error:  # PyTorch raises many unrelated types
        raise RunError(f"{path} is damaged: {error}") from error


def _deserialize(content: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _serialize(value: Any) -> memoryview:
    """Serialize in memory, because PyTorch may abort the process if it cannot write to a file."""
    import torch

    content = io.BytesIO()
    torch.save(value, content)
    return content.getbuffer()
