"""The model store: versioned, immutable model folders and a live pointer for each model.

    models/<name>/<version>/card.json   what the model is, how it was made, how good it is
    models/<name>/<version>/model.pt    TorchScript; further files may stand beside it
    models/<name>/live                  the number of the version that is served

`training` publishes, `app` reads. A version appears by renaming a finished folder and the pointer changes by renaming
a finished file, so a crash at any point leaves a readable store with the old version live.
"""

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, FiniteFloat, ValidationError, model_validator

from training.text import quote, shorten

CARD = "card.json"
MODEL = "model.pt"
LIVE = "live"

Promotion = Literal["if-better", "always", "never"]
Rate = Annotated[float, Field(ge=0, le=1)]

_ABANDONED_S = 24 * 3600
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


class StoreError(ValueError):
    """A model or version that does not exist or is damaged."""


class Evaluation(BaseModel):
    """Measures over one split. Rates are in 0-1."""

    images: int
    top1: Rate
    top5: Rate
    loss: FiniteFloat
    """Mean cross-entropy in nats."""
    ece: Rate
    """Expected calibration error over 15 equal bins of confidence (Guo et al. 2017, arXiv:1706.04599)."""
    per_class: list[Rate]
    """Top-1 of each class; 0 where the split has no image of it."""


class Quantised(BaseModel):
    """What quantisation to int8 costs."""

    accepted: bool
    """Whether its files stand beside the exported one."""
    images: int
    """It was judged on: held out from training or, where the recipe holds none out, seen in training."""
    lost_top1: float
    """Accuracy on these images before minus after, 0-1."""
    float_first_layer: bool = False
    """Whether the first layer stays in floating point, as int8 throughout lost too much."""
    test: Evaluation | None
    """The quantised form on the full test set, if it was accepted."""


class EpochSummary(BaseModel):
    """One point of the training curve."""

    epoch: int
    train_loss: float
    train_accuracy: float
    split: str
    loss: float
    top1: float
    top5: float
    seconds: float


class ModelCard(BaseModel):
    """All that is known of one version of a model."""

    name: str
    version: int
    created: datetime
    recipe: dict[str, Any]
    classes: list[str]
    superclasses: list[str]
    """Of each class, in the order of `classes`."""
    parameters: int
    seed: int
    data: str
    """Fingerprint of the data set: sha256 over its images, labels and class names."""
    temperature: float
    """Fitted on validation images; 1 where the recipe holds none out."""
    test: Evaluation
    """The exported file on the full test set, calibrated."""
    test_ece_uncalibrated: Rate
    int8: Quantised | None = None
    """The quantised form, for OpenVINO; versions may have none."""
    curve: list[EpochSummary]
    training_seconds: float
    device: str
    libraries: dict[str, str]
    commit: str | None
    """Git commit of the code that trained it, if known."""
    notes: str = ""
    files: dict[str, str]
    """sha256 of every file beside the card."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.classes:
            raise ValueError("classes is empty")
        if len(set(self.classes)) < len(self.classes):
            twice = next(label for label in self.classes if self.classes.count(label) > 1)
            raise ValueError(f"classes names {quote(twice)} twice")
        for field, count in (("superclasses", len(self.superclasses)), ("test.per_class", len(self.test.per_class))):
            if count != len(self.classes):
                raise ValueError(f"{field} has {count} entries for {len(self.classes)} classes")
        return self

    @property
    def held_out(self) -> int:
        """How many training images its recipe kept for validation: they are unknown to it."""
        return int(self.recipe.get("validation_images", 0))


class Store:
    """A folder of models.

    Args:
        root: the folder; it need not exist before something is published.
    """

    def __init__(self, root: Path):
        self.root = root

    def names(self) -> list[str]:
        """All models that have at least one version."""
        if not self.root.is_dir():
            return []
        return sorted(path.name for path in self.root.iterdir() if _NAME.fullmatch(path.name) and _versions(path))

    def versions(self, name: str) -> list[int]:
        """Versions of a model, oldest first; empty where there is no such model."""
        return _versions(self._model(name))

    def live(self, name: str) -> int | None:
        """The version that is served, or None before the first promotion."""
        try:
            return int((self._model(name) / LIVE).read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StoreError(f"{self._model(name) / LIVE} does not hold a version number") from error

    def folder(self, name: str, version: int) -> Path:
        """The folder of a version.

        Raises:
            StoreError: there is no such version.
        """
        path = self._model(name) / str(version)
        if not (path / CARD).is_file():
            raise StoreError(f"there is no version {version} of {name}")
        return path

    def parse(self, text: str) -> tuple[str, int]:
        """Name and version in a text: NAME/VERSION, or NAME for the live one.

        Raises:
            StoreError: it is neither, or the model has no live version.
        """
        name, slash, number = text.partition("/")
        if slash and not number.isdecimal():
            raise StoreError(
                f"{quote(number)} is not a version; give {shorten(name, 64)}/1, or {shorten(name, 64)} for the live one"
            )
        version = int(number) if slash else self.live(name)
        if version is None:
            raise StoreError(f"{name} has no live version in {self.root}")
        return name, version

    def card(self, name: str, version: int) -> ModelCard:
        """The card of a version.

        Raises:
            StoreError: there is no such version, or its card is unreadable.
        """
        path = self.folder(name, version) / CARD
        try:
            card = ModelCard.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise StoreError(f"{path} is damaged: {error}") from error
        if (card.name, card.version) != (name, version):
            raise StoreError(f"{path} is the card of {card.name} version {card.version}")
        return card

    def verify(self, card: ModelCard) -> Path:
        """Check every file of a version against its card.

        Returns:
            The version's folder.

        Raises:
            StoreError: a file is missing, its sha256 differs, or there is one too many.
        """
        folder = self.folder(card.name, card.version)
        for file, expected in card.files.items():
            path = folder / file
            if Path(file).name != file or not path.is_file():
                raise StoreError(f"{path} is missing")
            if sha256(path) != expected:
                raise StoreError(f"{path} is damaged: its sha256 is not the one in {CARD}")
        for path in folder.iterdir():
            if path.name not in (CARD, *card.files) and not path.name.startswith("."):
                raise StoreError(f"{path} does not belong to this version: it is not in {CARD}")
        if MODEL not in card.files:
            raise StoreError(f"{folder / CARD} names no {MODEL}")
        return folder

    def learnable(self, version: str, classes: Sequence[str], data: str, validation_images: int) -> Path:
        """The exported file of a version that a run is to learn from, as a teacher or a start.

        What a version has seen it passes on, so it must not know the images that the run validates on. Held out are
        always the same images, fewer of them are some of these.

        Args:
            version: such as resnet18/1.
            classes: of the run's data set.
            data: its fingerprint.
            validation_images: that the run holds out.

        Raises:
            StoreError: there is no such version, it is damaged, has other classes, or knows images that are held out.
        """
        card = self.card(*self.parse(version))
        if card.classes != list(classes):
            raise StoreError(f"{version} was trained on other classes and cannot be learnt from")
        if card.data == data and validation_images > card.held_out:
            raise StoreError(
                f"{version} was trained on all but {card.held_out} images and knows those that validation_images="
                f"{validation_images} holds out; give at most {card.held_out}"
            )
        return self.verify(card) / MODEL

    @contextmanager
    def draft(self, name: str) -> Iterator[Path]:
        """A folder inside the store to prepare a version in; it is gone afterwards unless published."""
        model = self._model(name)
        model.mkdir(parents=True, exist_ok=True)
        for path in model.glob(".draft-*"):
            if _abandoned(path):
                shutil.rmtree(path, ignore_errors=True)
        path = Path(tempfile.mkdtemp(prefix=".draft-", dir=model))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def publish(self, draft: Path, card: ModelCard) -> ModelCard:
        """Turn a draft into the next version of its model, atomically.

        Args:
            draft: the folder that `draft` gave, with all files but the card.
            card: version and files are filled in here.

        Returns:
            The card as it was published.
        """
        model = self._model(card.name)
        files = {path.name: sha256(path) for path in sorted(draft.iterdir()) if path.name != CARD}
        while True:
            version = max(_numbers(model), default=0) + 1
            card = card.model_copy(update={"version": version, "files": files})
            (draft / CARD).write_text(card.model_dump_json(indent=1) + "\n")
            for path in draft.iterdir():
                sync(path)
            draft.chmod(0o755)  # mkdtemp makes private folders
            sync(draft)
            try:
                draft.rename(model / str(version))
            except OSError:
                if not (model / str(version)).exists():
                    raise
                continue  # somebody else published this number first
            sync(model)
            return card

    def promote(self, name: str, version: int) -> None:
        """Make a version live.

        Raises:
            StoreError: there is no such version.
        """
        self.folder(name, version)
        with locked(self._model(name)):
            self.folder(name, version)  # it may have been removed while this waited
            self._point(name, version)

    def _point(self, name: str, version: int) -> None:
        """Replace the pointer to the live version; to be called by one at a time."""
        model = self._model(name)
        partial = model / f".{LIVE}"
        partial.write_text(f"{version}\n")
        sync(partial)
        partial.replace(model / LIVE)
        sync(model)

    def promote_if(self, card: ModelCard, promotion: Promotion) -> bool:
        """Make a version live if the rule says so.

        Args:
            card: the version.
            promotion: "always", "never", or "if-better": at least as accurate on the test set as the live version.
                Accuracies on different data cannot be compared, so such a version is not promoted.

        Returns:
            Whether it was made live.
        """
        with locked(self._model(card.name)):  # two that are better than the live version may come at once
            live = self.live(card.name)
            if promotion == "if-better" and live is not None:
                current = self.card(card.name, live)
                better = card.data == current.data and card.test.top1 >= current.test.top1
            else:
                better = promotion != "never"
            if better:
                self._point(card.name, card.version)
            return better

    def find(self, name: str, file_sha256: str) -> ModelCard | None:
        """The newest version that has a file of this checksum."""
        for version in reversed(self.versions(name)):
            try:
                card = self.card(name, version)
            except StoreError:  # damaged; not what is looked for
                continue
            if file_sha256 in card.files.values():
                return card
        return None

    def prune(self, name: str, keep: int, needed: Collection[int] = ()) -> list[int]:
        """Remove all versions but the newest `keep`; the live one stays whatever its age.

        Args:
            keep: at least 1, so that no version number is ever given twice.
            needed: further versions that stay.

        Returns:
            The versions that are gone.
        """
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one version must stay")
        model = self._model(name)
        with locked(model):
            gone = [each for each in self.versions(name)[:-keep] if each != self.live(name) and each not in needed]
            with tempfile.TemporaryDirectory(prefix=".draft-", dir=model) as trash:
                for version in gone:
                    (model / str(version)).rename(Path(trash, str(version)))
        return gone

    def _model(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise StoreError(f"{quote(name)} is not a model name: lower-case letters, digits, - and _ only")
        return self.root / name


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep out other processes and threads that lock a folder as well."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _abandoned(path: Path) -> bool:
    """Whether a draft is that of a killed process: untouched for a day."""
    try:
        return time.time() - path.stat().st_mtime > _ABANDONED_S
    except FileNotFoundError:  # its owner has finished it in the meantime
        return False


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions(model: Path) -> list[int]:
    if not model.is_dir():
        return []
    return [number for number in _numbers(model) if (model / str(number) / CARD).is_file()]


def _numbers(model: Path) -> list[int]:
    """Version numbers taken, whatever is in their folders."""
    return sorted(int(path.name) for path in model.iterdir() if path.name.isdecimal())


def sync(path: Path) -> None:
    """Have what a file or folder holds on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
