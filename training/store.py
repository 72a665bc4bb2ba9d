"""The model store keeps versioned, immutable model folders and a live pointer for each model.

    models/<name>/<version>/card.json   model card: recipe, provenance and measures
    models/<name>/<version>/model.pt    TorchScript model; further files may accompany it
    models/<name>/<version>/cascade.json    instead of model.pt: two pinned versions that answer together
    models/<name>/live                  the number of the version that is served

`training` publishes versions and `app` reads them. A version appears by renaming a finished folder, and the pointer
changes by renaming a finished file. A crash at any point leaves a readable store with the old version live.
"""

import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, FiniteFloat, PositiveFloat, ValidationError, model_validator

from training.errors import ReportedError
from training.files import lock_folder, sha256, sync, write_durably
from training.text import quote, shorten

CARD = "card.json"
MODEL = "model.pt"
CASCADE = "cascade.json"
LIVE = "live"

FamiliarityScore = Literal["energy", "agreement"]
Promotion = Literal["if-better", "always", "never"]
Rate = Annotated[float, Field(ge=0, le=1)]

_DRAFT_EXPIRY_S = 24 * 3600
_ROUNDING = 1e-6
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


class StoreError(ReportedError, ValueError):
    """The model or version does not exist, is damaged, or cannot be used."""


class VersionInUse(StoreError):
    """The version cannot be deleted, because something depends on it."""


class Evaluation(BaseModel, use_attribute_docstrings=True):
    """Measures over one split. Rates are in 0-1."""

    images: int
    """Number of images."""
    top1: Rate
    """Fraction of the images whose most probable class is right."""
    top5: Rate
    """Fraction of the images whose class is among the five most probable ones."""
    loss: FiniteFloat
    """Mean cross-entropy in nats."""
    ece: Rate
    """Expected calibration error over 15 equal bins of confidence (Guo et al. 2017, arXiv:1706.04599)."""
    per_class: list[Rate | None]
    """Top-1 accuracy of each class; None for a class without images in the split."""


class QuantizationReport(BaseModel, use_attribute_docstrings=True):
    """The accuracy cost of quantization to int8."""

    accepted: bool
    """True if the quantized files are published beside the exported one."""
    images: int
    """Number of images in the comparison. They are held out from training, or training images if the recipe holds none
    out."""
    lost_top1: float
    """Top-1 accuracy on these images before quantization minus after, as a fraction; negative if it rises."""
    float_first_layer: bool = False
    """True if the first layer stays in floating point, because int8 in all layers lost too much accuracy."""
    test: Evaluation | None
    """Measures of the quantized model on the full test set, if it was accepted."""


class PinnedMember(BaseModel, use_attribute_docstrings=True):
    """A version that a cascade depends on."""

    name: str
    version: int
    files: dict[str, str]
    """sha256 of every file beside the member's card, by file name."""

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


class Cascade(BaseModel, use_attribute_docstrings=True):
    """The content of `cascade.json`. `training.runtimes.cascade` computes the answers."""

    members: tuple[PinnedMember, PinnedMember]
    """The member that sees every image, and the member that also sees the images that are sent on."""
    threshold: Rate
    """An image is sent on if the probability of the first member's best class is below this value."""
    weights: tuple[PositiveFloat, PositiveFloat]
    """Weights of the members' calibrated probabilities in the answer to an image that is sent on. Their sum is 1."""
    temperature: PositiveFloat
    """Divisor of the logarithm of the weighted mean. It calibrates the answer."""

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if abs(sum(self.weights) - 1) > _ROUNDING:
            raise ValueError(f"the weights {self.weights} have the sum {sum(self.weights)}, not 1")
        return self


class CascadeReport(BaseModel, use_attribute_docstrings=True):
    """The fit of a cascade, and the share of images that need both members."""

    members: list[str]
    """The pinned versions, such as resnet/4."""
    engines: list[str]
    """Names of the engines that computed the members for the fit and the test evaluation."""
    images: int
    """Number of images in the fit. They are held out from the training of both members."""
    sent_on: Rate
    """Share of these images that are sent on to the second member."""
    test_sent_on: Rate
    """Share of the test images that are sent on to the second member."""


class FamiliarityThreshold(BaseModel, use_attribute_docstrings=True):
    """The score below which an image is probably none of the classes."""

    score: FamiliarityScore = "energy"
    """Score of an image. `energy` is the logarithm of the sum of the exponentials of its calibrated logits, which is
    the negative energy of Liu et al. 2020, arXiv:2010.03759. `agreement` is that of the mean of both members'
    calibrated logits, which is high only where both members favor the same class."""
    threshold: FiniteFloat
    """Lowest score of a familiar image."""
    kept: Rate
    """Fraction of the held-out images whose score is at least the threshold."""
    images: int
    """Number of held-out images."""


class ExtraData(BaseModel, use_attribute_docstrings=True):
    """Training images that are not of the data set, such as corrections of users."""

    images: int
    """Number of these images."""
    sha256: str
    """sha256 of the npz file that had them."""


class EpochSummary(BaseModel, use_attribute_docstrings=True):
    """One point of the training curve."""

    epoch: int
    """Number of the epoch, counted from 1."""
    train_loss: float
    """Mean training loss of the epoch."""
    train_accuracy: float
    """Top-1 accuracy on the augmented training images, 0-1."""
    split: str
    """Evaluated split: "validation" if the recipe holds images out, otherwise "test"."""
    loss: float
    """Mean cross-entropy of the evaluated split in nats."""
    top1: float
    """Top-1 accuracy of the evaluated split, 0-1."""
    top5: float
    """Top-5 accuracy of the evaluated split, 0-1."""
    seconds: float
    """Wall time of the epoch, including its evaluation."""


class ModelCard(BaseModel, use_attribute_docstrings=True):
    """The metadata of one version of a model."""

    name: str
    """Name of the model."""
    version: int
    """Number of the version."""
    created: datetime
    """Time of the export."""
    recipe: dict[str, Any]
    """Recipe of the run, by its fields."""
    classes: list[str]
    """Labels of the classes, in the order of the logits."""
    superclasses: list[str]
    """Superclass of each class, in the order of `classes`."""
    parameters: int
    """Number of weights and biases."""
    seed: int
    """Seed of the run."""
    data: str
    """Fingerprint of the data set: sha256 over its images, labels and class names."""
    temperature: float
    """Calibration temperature, fitted on validation images; 1 if the recipe holds none out."""
    test: Evaluation
    """Measures of the exported file on the full test set, with calibrated logits."""
    test_ece_uncalibrated: Rate
    """Expected calibration error on the test set before calibration."""
    int8: QuantizationReport | None = None
    """The quantized model for OpenVINO; None if the version has none."""
    cascade: CascadeReport | None = None
    """The fit of a cascade; None for a version with a model of its own."""
    familiarity: FamiliarityThreshold | None = None
    """The threshold of familiar images; None if the recipe holds no images out, and in cards of earlier releases."""
    full_familiarity: FamiliarityThreshold | None = None
    """The same for the agreement of both members of a cascade; None for other models."""
    extra_data: ExtraData | None = None
    """Further training images; None if there were none."""
    curve: list[EpochSummary]
    """Measures of every epoch."""
    training_seconds: float
    """Wall time of all epochs."""
    device: str
    """Device that trained."""
    libraries: dict[str, str]
    """Versions of the libraries that trained, by name."""
    commit: str | None
    """Git commit of the code that trained the model, if known."""
    notes: str = ""
    """Free text."""
    files: dict[str, str]
    """sha256 of every file beside the card, by file name."""

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
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
        """The number of training images that the recipe held out for validation, which the model has never seen."""
        return int(self.recipe.get("validation_images", 0))

    @property
    def rank(self) -> tuple[bool, float]:
        """The key by which the default model is the greatest: a cascade before others, then the accuracy."""
        return CASCADE in self.files, self.test.top1


def open_store(root: Path) -> "Store":
    """Return the store in an existing folder.

    Raises:
        StoreError: There is no such folder.
        OSError: The folder cannot be read.
    """
    if not root.is_dir():
        raise StoreError(f"there is no model store {root.absolute()}; name one by --models or CIFAR100_MODELS")
    next(root.iterdir(), None)  # fails without permission
    return Store(root)


class Store:
    """A folder of models.

    Args:
        root: The folder. The first publication creates it.
    """

    def __init__(self, root: Path):
        self.root = root

    def names(self) -> list[str]:
        """List the models that have at least one version, in alphabetical order."""
        if not self.root.is_dir():
            return []
        return sorted(path.name for path in self.root.iterdir() if _NAME.fullmatch(path.name) and _list_versions(path))

    def versions(self, name: str) -> list[int]:
        """List the versions of a model, oldest first. An unknown model has none."""
        return _list_versions(self._model_folder(name))

    def live(self, name: str) -> int | None:
        """Return the version that is served, or None before the first promotion.

        Raises:
            StoreError: The name is invalid, or the pointer file is damaged.
        """
        try:
            return int((self._model_folder(name) / LIVE).read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StoreError(
                f"{self._model_folder(name) / LIVE} is damaged: it must contain a version number"
            ) from error

    def folder(self, name: str, version: int) -> Path:
        """Return the folder of a version.

        Raises:
            StoreError: There is no such version.
        """
        path = self._model_folder(name) / str(version)
        if not (path / CARD).is_file():
            raise StoreError(f"there is no version {version} of {name}")
        return path

    def parse(self, text: str) -> tuple[str, int]:
        """Parse NAME/VERSION, or NAME for the live version, into a name and a version.

        Raises:
            StoreError: The text has neither form, or the model has no live version.
        """
        name, slash, number = text.partition("/")
        if slash and not number.isdecimal():
            raise StoreError(
                f"{quote(number)} is not a version; give {shorten(name, 64)}/1, or {shorten(name, 64)} for the live one"
            )
        version = int(number) if slash else self.live(name)
        if version is None:
            root = self.root.absolute()
            if not self.versions(name):
                raise StoreError(f"there is no model {name} in {root}; there are: {', '.join(self.names()) or 'none'}")
            raise StoreError(f"{name} has no live version in {root}; give NAME/VERSION, or promote a version")
        return name, version

    def card(self, name: str, version: int) -> ModelCard:
        """Read the card of a version.

        Raises:
            StoreError: There is no such version, or its card is unreadable.
        """
        path = self.folder(name, version) / CARD
        try:
            card = ModelCard.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise StoreError(f"{path} is damaged: {error}") from error
        if (card.name, card.version) != (name, version):
            raise StoreError(f"{path} is the card of {card.name} version {card.version}")
        return card

    def default_card(self) -> ModelCard:
        """Read the card of the version that answers requests for no named model, see `ModelCard.rank`.

        Raises:
            StoreError: No model is live, or a card is unreadable.
        """
        live = [(name, version) for name in self.names() if (version := self.live(name)) is not None]
        if not live:
            raise StoreError(f"no model is live in {self.root.absolute()}; train one, or promote a version")
        return max((self.card(*each) for each in live), key=lambda card: card.rank)

    def locate(self, card: ModelCard) -> Path:
        """Return the folder of a version that has all files of its card, and all versions that it pins.

        Raises:
            StoreError: The folder, a file or a pinned version is missing.
        """
        folder = self.folder(card.name, card.version)
        for file in card.files:
            if Path(file).name != file or not (folder / file).is_file():
                raise StoreError(f"{folder / file} is missing; restore it, or publish the model again")
        if CASCADE in card.files:
            for member in self.cascade(card).members:
                self.locate(self.member_card(member))
        return folder

    def cascade(self, card: ModelCard) -> Cascade:
        """Read the cascade of a version.

        Raises:
            StoreError: The version is no cascade, or its file is unreadable.
        """
        path = self.folder(card.name, card.version) / CASCADE
        try:
            return Cascade.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise StoreError(f"{path} is damaged: {error}") from error

    def member_card(self, member: PinnedMember) -> ModelCard:
        """Read the card of a pinned version.

        Raises:
            StoreError: The version is missing, is a cascade itself, or has other files than those that were pinned.
        """
        card = self.card(member.name, member.version)
        if card.files != member.files or MODEL not in card.files:
            raise StoreError(f"{member} has other files than those that a cascade has pinned; fit the cascade again")
        return card

    def pins(self, name: str) -> dict[int, str]:
        """Return the versions of a model that cascades pin, each with one of these cascades, such as cascade/1."""
        pins = dict[int, str]()
        for path in sorted(self.root.glob(f"*/*/{CASCADE}")):
            if path.parent.name.isdecimal():
                with suppress(FileNotFoundError, ValidationError):  # deleted meanwhile, or damaged and never served
                    members = Cascade.model_validate_json(path.read_bytes()).members
                    owner = path.parent.relative_to(self.root).as_posix()
                    pins |= {member.version: owner for member in members if member.name == name}
        return pins

    def verify(self, card: ModelCard) -> Path:
        """Check every file of a version, and of the versions that it pins, against their cards.

        Returns:
            The version's folder.

        Raises:
            StoreError: A file is missing, its sha256 differs, or the folder has a file that the card does not list.
        """
        folder = self.locate(card)
        for file, expected in card.files.items():
            if sha256(folder / file) != expected:
                raise StoreError(f"{folder / file} is damaged: its sha256 differs from the one in {CARD}")
        for path in folder.iterdir():
            if path.name not in (CARD, *card.files) and not path.name.startswith("."):
                raise StoreError(f"{path} does not belong to this version: {CARD} does not list it; remove it")
        if CASCADE in card.files:
            for member in self.cascade(card).members:
                self.verify(self.member_card(member))
        elif MODEL not in card.files:
            raise StoreError(f"{folder / CARD} does not list {MODEL}; publish the model again")
        return folder

    def source_card(self, version: str) -> ModelCard:
        """Read the card of a version, such as resnet18/1, that has weights of its own.

        Raises:
            StoreError: The version does not exist, its card is unreadable, or it is a cascade.
        """
        card = self.card(*self.parse(version))
        if CASCADE in card.files:
            raise StoreError(f"{version} is a cascade, which has no weights of its own; give one of its members")
        return card

    def verify_source(self, version: str, classes: Sequence[str], data: str, validation_images: int) -> Path:
        """Return the exported file of a version that a run uses as teacher or for its initial weights.

        A run inherits knowledge of the images that the version was trained on, so these must not include the run's
        validation images. All recipes hold out the same images: a smaller validation split is a subset of a larger one.

        Args:
            version: The version, such as resnet18/1.
            classes: Class names of the run's data set.
            data: Fingerprint of the run's data set.
            validation_images: Number of images that the run holds out.

        Raises:
            StoreError: The version does not exist, is damaged, has other classes, or was trained on images that the
                run holds out.
        """
        card = self.source_card(version)
        if card.classes != list(classes):
            raise StoreError(f"{version} was trained on other classes than this data set has; give another version")
        if card.data == data and validation_images > card.held_out:
            raise StoreError(
                f"{version} was trained on all but {card.held_out} images, and on some that validation_images="
                f"{validation_images} holds out; give at most {card.held_out}"
            )
        return self.verify(card) / MODEL

    @contextmanager
    def draft(self, name: str) -> Iterator[Path]:
        """Create a folder inside the store to prepare a version in. It is removed afterwards unless published."""
        model = self._model_folder(name)
        model.mkdir(parents=True, exist_ok=True)
        for path in model.glob(".draft-*"):
            if _is_abandoned(path):
                shutil.rmtree(path, ignore_errors=True)
        path = Path(tempfile.mkdtemp(prefix=".draft-", dir=model))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def publish(self, draft: Path, card: ModelCard) -> ModelCard:
        """Turn a draft into the next version of its model, atomically.

        Args:
            draft: The folder from `draft`, with all files except the card.
            card: The card without version and files, which this method fills in.

        Returns:
            The published card.

        Raises:
            StoreError: The draft is a cascade, and a version that it pins is missing.
        """
        files = {path.name: sha256(path) for path in sorted(draft.iterdir()) if path.name != CARD}
        with self._hold_members(draft / CASCADE) if CASCADE in files else nullcontext():
            return self._rename_draft(draft, card, files)

    @contextmanager
    def _hold_members(self, file: Path) -> Iterator[None]:
        """Hold the locks of a cascade's members, so that no other process deletes them before they are pinned."""
        members = Cascade.model_validate_json(file.read_bytes()).members
        with ExitStack() as locks:
            for name in sorted({member.name for member in members}):
                locks.enter_context(lock_folder(self._model_folder(name)))
            for member in members:
                self.member_card(member)
            yield

    def _rename_draft(self, draft: Path, card: ModelCard, files: dict[str, str]) -> ModelCard:
        """Complete a draft with its card, and rename it to the next free version of its model."""
        model = self._model_folder(card.name)
        while True:
            version = max(_list_numbers(model), default=0) + 1
            card = card.model_copy(update={"version": version, "files": files})
            (draft / CARD).write_text(card.model_dump_json(indent=1) + "\n")
            for path in draft.iterdir():
                sync(path)
            draft.chmod(0o755)  # mkdtemp creates folders with mode 0o700
            sync(draft)
            try:
                draft.rename(model / str(version))
            except OSError:
                if not (model / str(version)).exists():
                    raise
                continue  # another process published this number first
            sync(model)
            return card

    def amend(self, card: ModelCard) -> None:
        """Replace the card of a published version. A service that has loaded the version keeps the former card.

        Raises:
            StoreError: There is no such version, or the new card lists other files.
        """
        with lock_folder(self._model_folder(card.name)):
            if self.card(card.name, card.version).files != card.files:
                raise StoreError(f"the card of {card.name} version {card.version} cannot list other files")
            content = card.model_dump_json(indent=1) + "\n"
            write_durably(self.folder(card.name, card.version) / CARD, content.encode())

    def promote(self, name: str, version: int) -> None:
        """Make a version live.

        Raises:
            StoreError: There is no such version.
        """
        self.folder(name, version)
        with lock_folder(self._model_folder(name)):
            self.folder(name, version)  # another process may have pruned it before the lock was free
            self._write_live_pointer(name, version)

    def _write_live_pointer(self, name: str, version: int) -> None:
        """Replace the pointer to the live version. The caller holds the lock of the model's folder."""
        write_durably(self._model_folder(name) / LIVE, f"{version}\n".encode())

    def promote_if(self, card: ModelCard, promotion: Promotion) -> bool:
        """Make a version live if the promotion rule allows it.

        Args:
            card: Card of the version.
            promotion: "always", "never" or "if-better". "if-better" promotes a version whose top-1 accuracy on the test
                set is at least that of the live version, or the first version. It never promotes a version with
                another data set than the live one, because their accuracies are not comparable.

        Returns:
            True if the version is now live.
        """
        # Without the lock, two processes could each find their version better than the live one.
        with lock_folder(self._model_folder(card.name)):
            live = self.live(card.name)
            if promotion == "if-better" and live is not None:
                current = self.card(card.name, live)
                better = card.data == current.data and card.test.top1 >= current.test.top1
            else:
                better = promotion != "never"
            if better:
                self._write_live_pointer(card.name, card.version)
            return better

    def find_by_checksum(self, name: str, file_sha256: str) -> ModelCard | None:
        """Return the card of the newest version that has a file with this checksum, or None."""
        return next((card for card in self._readable_cards(name) if file_sha256 in card.files.values()), None)

    def find_by_files(self, name: str, files: dict[str, str]) -> ModelCard | None:
        """Return the card of the newest version with exactly these files, given as in `ModelCard.files`, or None."""
        return next((card for card in self._readable_cards(name) if card.files == files), None)

    def _readable_cards(self, name: str) -> Iterator[ModelCard]:
        """Iterate over the cards of a model, newest first, without damaged ones."""
        for version in reversed(self.versions(name)):
            with suppress(StoreError):
                yield self.card(name, version)

    def prune(self, name: str, keep: int, protected: Collection[int] = ()) -> list[int]:
        """Remove all versions except the newest `keep`. The live version and those that cascades pin always stay.

        Args:
            keep: Number of versions to keep. It is at least 1, so that no version number is assigned twice.
            protected: Further versions to keep.

        Returns:
            The removed versions.

        Raises:
            ValueError: `keep` is less than 1.
        """
        if keep < 1:
            raise ValueError(f"keep={keep} would remove every version; give at least 1")
        model = self._model_folder(name)
        with lock_folder(model):
            kept = {self.live(name), *protected, *self.pins(name)}
            removed = [each for each in self.versions(name)[:-keep] if each not in kept]
            _remove(model, removed)
        return removed

    def delete(self, name: str, version: int) -> None:
        """Remove a version.

        Raises:
            StoreError: There is no such version.
            VersionInUse: The version is live, a cascade pins it, or it is the newest one, whose number the next
                publication would assign again.
        """
        self.folder(name, version)
        model = self._model_folder(name)
        with lock_folder(model):
            self.folder(name, version)  # another process may have removed it before the lock was free
            if version == self.live(name):
                raise VersionInUse(f"{name}/{version} is live; promote another version first")
            if cascade := self.pins(name).get(version):
                raise VersionInUse(f"{cascade} pins {name}/{version}; delete {cascade} first")
            if version == max(_list_numbers(model)):
                raise VersionInUse(f"{name}/{version} is the newest version; its number would be assigned again")
            _remove(model, [version])

    def _model_folder(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise StoreError(f"{quote(name)} is not a model name; give lower-case letters, digits, - and _ only")
        return self.root / name


def _remove(model: Path, versions: Collection[int]) -> None:
    """Remove versions from a model's folder. Each disappears at once. The caller holds the lock of the folder."""
    with tempfile.TemporaryDirectory(prefix=".draft-", dir=model) as trash:
        for version in versions:
            (model / str(version)).rename(Path(trash, str(version)))


def _is_abandoned(path: Path) -> bool:
    """Return whether a draft belongs to a killed process: it has not changed for a day."""
    try:
        return time.time() - path.stat().st_mtime > _DRAFT_EXPIRY_S
    except FileNotFoundError:  # its owner has published or removed it
        return False


def _list_versions(model: Path) -> list[int]:
    if not model.is_dir():
        return []
    return [number for number in _list_numbers(model) if (model / str(number) / CARD).is_file()]


def _list_numbers(model: Path) -> list[int]:
    """List the version numbers in use, including folders without a card."""
    return sorted(int(path.name) for path in model.iterdir() if path.name.isdecimal())
