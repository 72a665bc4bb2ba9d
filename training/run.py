"""A training run's folder: recipe.json, metrics.jsonl, checkpoint.pt, teacher_logits.pt, test_logits.pt,
published.json, and `stop` where it is not to go on.

In: a recipe and, epoch by epoch, metrics and training state.  Out: the same, read back to resume, watch or export.
"""

import fcntl
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch
from pydantic import BaseModel
from torch import Tensor

from training.recipes import Recipe, from_dict
from training.store import Evaluation, sync

State = dict[str, Any]
Parsed = TypeVar("Parsed")
TICK_S = 5.0  # between two lines of metrics within an epoch
START_S = 60.0  # a process that has inherited its lock writes its number sooner, once it has loaded its libraries


class Publication(BaseModel):
    """What became of a run's export."""

    model: str
    version: int
    live: bool
    """Whether the new version was made live."""
    test: Evaluation
    epoch: int | None = None
    """Of the checkpoint that was exported; earlier releases do not tell."""


class RunError(ValueError):
    """A run folder that cannot be used as asked."""


class RunBusy(RunError):
    """Another process is working in the run folder."""


class Run:
    """One run's folder.

    Args:
        path: the folder; `create` makes it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lock_file = path / "lock"
        self.stop_file = path / "stop"
        self.recipe_file = path / "recipe.json"
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoint_file = path / "checkpoint.pt"
        self.teacher_file = path / "teacher_logits.pt"
        self.logits_file = path / "test_logits.pt"
        self.announcement_file = path / "publishing.sha256"
        self.publication_file = path / "published.json"

    @contextmanager
    def lock(self, inherited: int | None = None) -> Iterator[None]:
        """Keep other processes out of the folder; the operating system releases it however this process ends.

        Args:
            inherited: descriptor of the lock file, where the parent process has locked it: see `lock_for_child`.

        Raises:
            RunBusy: another process holds it.
            RunError: there is no such folder, or the descriptor is that of another file.
        """
        if not self.path.is_dir():
            raise RunError(f"there is no run in {self.path}")
        with self.lock_file.open("a+") if inherited is None else self._inherited_lock(inherited) as file:
            if not _acquire(file):
                raise RunBusy(f"process {_read_pid(file) or '(unknown)'} is working in {self.path}")
            write_pid(file, os.getpid())
            yield

    @contextmanager
    def lock_for_child(self) -> Iterator[TextIO]:
        """Lock the folder for a child process, which inherits the lock with the descriptor of the file.

        A flock(2) belongs to the open file, so it lasts until the child ends as well. The caller passes the descriptor
        to the child and writes the child's number by `write_pid`.

        Yields:
            The lock file, empty.

        Raises:
            RunBusy: another process holds it.
        """
        with self.lock_file.open("a+") as file:
            if not _acquire(file):
                raise RunBusy(f"process {_read_pid(file) or '(unknown)'} is working in {self.path}")
            file.truncate(0)  # the number of an earlier holder must not be taken for the child's
            yield file

    def _inherited_lock(self, descriptor: int) -> TextIO:
        try:
            file = os.fdopen(descriptor, "a+")
        except OSError as error:
            raise RunError(f"the inherited descriptor {descriptor} cannot be used: {error.strerror}") from error
        os.set_inheritable(descriptor, False)  # processes that this one starts must not keep the lock
        if not (self.lock_file.exists() and os.path.samestat(os.fstat(descriptor), self.lock_file.stat())):
            file.close()
            raise RunError(f"the inherited descriptor {descriptor} is not that of {self.lock_file}")
        return file

    def holder(self, wait_s: float = START_S) -> int | None:
        """The process that holds the lock, if one does.

        Args:
            wait_s: time for a holder that is just starting to write its number; without one it counts as none.
        """
        latest = time.monotonic() + wait_s
        with suppress(FileNotFoundError), self.lock_file.open() as file:
            while _is_locked(file):
                pid = _read_pid(file)
                if pid or time.monotonic() > latest:
                    return pid
                time.sleep(0.05)
        return None

    def ask_to_stop(self) -> None:
        """Have whatever process works in the folder, now or later, end of its own accord: nobody else may see to it."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.stop_file.touch()

    def create(self, recipe: Recipe) -> None:
        """Start an empty run.

        Raises:
            RunError: the folder holds a run already.
        """
        if self.recipe_file.exists():
            raise RunError(f"{self.path} holds a run already; give --resume to go on with it, or another folder")
        self.path.mkdir(parents=True, exist_ok=True)
        _write_durably(self.recipe_file, recipe.model_dump_json(indent=2).encode())

    def discard(self) -> None:
        """Free the folder for another run, unless an epoch is finished."""
        if not self.checkpoint_file.exists():
            self.recipe_file.unlink(missing_ok=True)

    def recipe(self) -> Recipe:
        """The recipe the run was started with.

        Raises:
            RunError: there is no run in this folder, or its recipe is damaged.
            RecipeError: it is one that this release does not know.
        """
        if not self.recipe_file.exists():
            raise RunError(f"there is no run in {self.path}")
        return from_dict(_read(self.recipe_file, json.loads))

    def extend(self, epochs: int) -> Recipe:
        """Give a run more epochs whose learning rate does not depend on their number.

        Raises:
            RunError: the recipe's schedule depends on the number of epochs, or they are fewer than before.
        """
        recipe = self.recipe()
        if recipe.schedule not in {"constant", "step"} or recipe.finetune_epochs:
            raise RunError(f"the schedule {recipe.schedule} depends on epochs={recipe.epochs}; start a new run instead")
        if epochs < recipe.epochs:
            raise RunError(f"the run was started for {recipe.epochs} epochs and cannot be shortened to {epochs}")
        recipe = from_dict(recipe.model_dump() | {"epochs": epochs})
        _write_durably(self.recipe_file, recipe.model_dump_json(indent=2).encode())
        return recipe

    def record(self, metrics: dict[str, Any]) -> None:
        """Append one line of metrics; that of an epoch is on the disk when this returns."""
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            if metrics["event"] == "epoch":
                os.fsync(file.fileno())

    def metrics(self) -> Iterator[dict[str, Any]]:
        """All lines of metrics, oldest first."""
        return (metrics for _, metrics in self.numbered_metrics())

    def numbered_metrics(self, after: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """All lines of metrics whose number, counted from 1, is greater than `after`: number and metrics."""
        if self.metrics_file.exists():
            with self.metrics_file.open() as file:
                for number, line in islice(enumerate(file, start=1), after, None):
                    with suppress(json.JSONDecodeError):  # forgotten, or what a crash or a full disk has left of it
                        yield number, json.loads(line)

    def epochs(self) -> list[dict[str, Any]]:
        """The metrics of every finished epoch."""
        return [metrics for metrics in self.metrics() if metrics["event"] == "epoch"]

    def forget_after(self, epoch: int) -> None:
        """Drop the metrics of epochs later than `epoch`, which a resumed run will measure again; numbers stay taken."""
        lines = dict[int, str]()
        for number, metrics in self.numbered_metrics():
            lines[number] = json.dumps(metrics) if metrics["epoch"] <= epoch else ""
        content = "".join(lines.get(number, "") + "\n" for number in range(1, max(lines, default=0) + 1))
        _write_durably(self.metrics_file, content.encode())

    def save(self, state: State) -> None:
        """Replace the checkpoint atomically: a crash leaves the previous one or this one, whole.

        What was published of an earlier one is not what the run has come to any more.
        """
        self.announcement_file.unlink(missing_ok=True)
        self.publication_file.unlink(missing_ok=True)
        _write_durably(self.checkpoint_file, _serialised(state))

    def load(self, fingerprint: str | None = None) -> State:
        """The last checkpoint, on the CPU.

        Args:
            fingerprint: of the data set at hand, to make sure that it is the one the run was trained on.

        Raises:
            RunError: no epoch has been finished yet, the checkpoint is damaged, or the run was trained on other data.
        """
        if not self.checkpoint_file.exists():
            raise RunError(f"{self.path} has no checkpoint: no epoch has been finished yet")
        state: State = _read(self.checkpoint_file, _deserialised)
        if fingerprint and state["data"] != fingerprint:
            raise RunError(
                f"{self.path} was trained on other data (fingerprint {state['data'][:8]}, now {fingerprint[:8]}); "
                "name the same data set, or start a new run"
            )
        return state

    def save_teacher_logits(self, logits: Tensor, teacher: str, fingerprint: str) -> None:
        """Keep what a teacher makes of the training images of a data set: float [N, classes]."""
        _write_durably(self.teacher_file, _serialised({"logits": logits, "teacher": teacher, "data": fingerprint}))

    def teacher_logits(self, teacher: str, fingerprint: str) -> Tensor | None:
        """What this teacher makes of the training images of this data set, or None before it was asked."""
        if not self.teacher_file.exists():
            return None
        saved = _read(self.teacher_file, _deserialised)
        if not isinstance(saved, dict) or (saved["teacher"], saved["data"]) != (teacher, fingerprint):
            return None
        logits: Tensor = saved["logits"]
        return logits

    def save_test_logits(self, logits: Tensor, temperature: float) -> None:
        """Keep what the exported model makes of the test set: calibrated logits, float32 [N, classes]."""
        _write_durably(self.logits_file, _serialised({"logits": logits, "temperature": temperature}))

    def test_logits(self) -> tuple[Tensor, float]:
        """Calibrated logits of the test set, and the temperature in them.

        Raises:
            RunError: the run has not been exported yet.
        """
        if not self.logits_file.exists():
            raise RunError(f"{self.path} has not been exported yet; python -m training export {self.path} does it")
        saved = _read(self.logits_file, _deserialised)
        return saved["logits"], saved["temperature"]

    def announce_publication(self, sha256: str) -> None:
        """Note the checksum of the file that is about to be published, to find it in the store after a crash."""
        _write_durably(self.announcement_file, sha256.encode())

    def announced_publication(self) -> str | None:
        """The checksum of a file whose publication was begun but not recorded."""
        return self.announcement_file.read_text().strip() if self.announcement_file.exists() else None

    def record_publication(self, publication: Publication) -> None:
        """Note which version of which model the run has become."""
        _write_durably(self.publication_file, publication.model_dump_json(indent=1).encode())
        self.announcement_file.unlink(missing_ok=True)

    def publication(self) -> Publication | None:
        """What the run has become in the model store, or None so far."""
        if not self.publication_file.exists():
            return None
        return _read(self.publication_file, Publication.model_validate_json)

    def outcome(self) -> Publication | None:
        """What the run has become with all its epochs, or None so far."""
        published = self.publication()
        if published and (published.epoch or len(self.epochs())) == self.recipe().total_epochs:
            return published
        return None


def _acquire(file: TextIO) -> bool:
    """Lock a file, if no other process holds it; who only looks whether one does holds it for a moment."""
    for _ in range(5):
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.05)
    return False


def _is_locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def write_pid(file: TextIO, pid: int) -> None:
    """Write the number of the process that holds a lock into its file."""
    file.truncate(0)
    file.write(f"{pid}\n")
    file.flush()


def _read_pid(file: TextIO) -> int | None:
    """The number that its holder has written, or None so far."""
    file.seek(0)
    text = file.read().strip()
    return int(text) if text.isdecimal() else None


def _read(path: Path, parse: Callable[[bytes], Parsed]) -> Parsed:
    """What is in a file.

    Raises:
        RunError: the file is damaged.
    """
    content = path.read_bytes()
    try:
        return parse(content)
    except Exception as error:  # PyTorch raises many unrelated types
        raise RunError(f"{path} is damaged: {error}") from error


def _deserialised(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _serialised(value: Any) -> memoryview:
    """By way of memory: PyTorch may end the process if it cannot write to a file."""
    content = io.BytesIO()
    torch.save(value, content)
    return content.getbuffer()


def _write_durably(path: Path, content: bytes | memoryview) -> None:
    """Atomically, and on the disk when this returns."""
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        partial.unlink(missing_ok=True)  # what remains of a full disk is needed to say so
        raise
    partial.replace(path)
    sync(path.parent)
