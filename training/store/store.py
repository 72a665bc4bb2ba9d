"""The rules of a model store: versions, the live version of each model, and what may be removed.

    <name>/<version>/card.json      model card: recipe, provenance and measures
    <name>/<version>/model.pt       TorchScript model; further files may accompany it
    <name>/<version>/cascade.json   instead of model.pt: two pinned versions that answer together

A store is a folder (`LocalStore`) or a prefix in an object store such as S3 (`ObjectStore`). Both keep these
guarantees, even if processes are killed at any moment:

- A version appears complete and at once. Its files never change, and its number is never assigned again.
- The live version of a model has been promoted and not been removed.
- A version that is live, or that a cascade pins, is not removed.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from pydantic import ValidationError

from training.errors import ReportedError
from training.files import sha256
from training.store.cards import CARD, CASCADE, MODEL, Cascade, ModelCard, PinnedMember, Promotion
from training.text import quote, shorten

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


class StoreError(ReportedError, ValueError):
    """The model or version does not exist, is damaged, or cannot be used."""


class VersionInUse(StoreError):
    """The version cannot be deleted, because something depends on it."""


class StoreUnavailable(OSError):
    """The object store does not answer, or refuses a request."""

    def __init__(self, message: str):
        super().__init__(message)
        self.strerror = message


class Store(ABC):
    """The models at one location."""

    location: str
    """Absolute path of the folder, or URL."""

    @abstractmethod
    def require_access(self) -> None:
        """Check that the store exists and can be read.

        Raises:
            StoreError: There is no such store.
            OSError: The store cannot be read.
        """

    @abstractmethod
    def require_writable(self) -> None:
        """Check that versions can be published.

        Raises:
            StoreError: They cannot.
            OSError: The store does not answer.
        """

    @abstractmethod
    def names(self) -> list[str]:
        """List the models that have at least one version, in alphabetical order."""

    @abstractmethod
    def versions(self, name: str) -> list[int]:
        """List the versions of a model, oldest first. An unknown model has none."""

    @abstractmethod
    def live(self, name: str) -> int | None:
        """Return the version that is served, or None before the first promotion.

        Raises:
            StoreError: The name is invalid, or the pointer to the live version is damaged.
        """

    @abstractmethod
    def fetch(self, card: ModelCard) -> Path:
        """Return a folder of this machine with the card and the files of a version. Do not change the folder.

        Raises:
            StoreError: A file or a pinned version is missing.
        """

    @abstractmethod
    def draft(self, name: str) -> AbstractContextManager[Path]:
        """Create a folder to prepare a version in. It is removed afterwards unless `publish` moves it."""

    @abstractmethod
    def amend(self, card: ModelCard) -> None:
        """Replace the card of a published version. A service that has loaded the version keeps the former card.

        Raises:
            StoreError: There is no such version, or the new card lists other files.
        """

    @abstractmethod
    def _list_numbers(self, name: str) -> list[int]:
        """List the version numbers in use, in ascending order, including those of versions without a card."""

    @abstractmethod
    def _list_files(self, name: str, version: int) -> Collection[str]:
        """List the names of a version's files, including the card. A version that does not exist has none."""

    @abstractmethod
    def _read(self, name: str, version: int, file: str) -> bytes:
        """Return the content of a file. Raises FileNotFoundError if it does not exist."""

    @abstractmethod
    def _publish(self, draft: Path, card: ModelCard, members: Sequence[PinnedMember]) -> ModelCard:
        """Turn a draft into the next version of its model.

        Args:
            draft: The folder from `draft`.
            card: The card, complete except for the version.
            members: Versions that the draft pins. They are not removed from now on.
        """

    @abstractmethod
    def _replace_live(self, name: str, version: int, is_allowed: Callable[[int | None], bool]) -> bool:
        """Make a version live, unless `is_allowed` returns False for the version that is live at that moment.

        Raises:
            StoreError: There is no such version.
        """

    @abstractmethod
    def _remove(self, name: str, select: Callable[[], list[int]]) -> list[int]:
        """Remove the versions that `select` returns, and return them.

        No version becomes live or pinned between the call of `select` and the removal. `select` may be called twice.
        """

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
            if not self.versions(name):
                raise StoreError(
                    f"there is no model {name} in {self.location}; there are: {', '.join(self.names()) or 'none'}"
                )
            raise StoreError(f"{name} has no live version in {self.location}; give NAME/VERSION, or promote a version")
        return name, version

    def require(self, name: str, version: int) -> None:
        """Check that a version exists.

        Raises:
            StoreError: There is no such version, or the name is invalid.
        """
        if CARD not in self._list_files(name, version):
            raise StoreError(f"there is no version {version} of {name}")

    def card(self, name: str, version: int) -> ModelCard:
        """Read the card of a version.

        Raises:
            StoreError: There is no such version, or its card is unreadable.
        """
        self.require(name, version)
        path = self._path(name, version, CARD)
        try:
            card = ModelCard.model_validate_json(self._read(name, version, CARD))
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
            raise StoreError(f"no model is live in {self.location}; train one, or promote a version")
        return max((self.card(*each) for each in live), key=lambda card: card.rank)

    def require_files(self, card: ModelCard) -> None:
        """Check that a version has all files of its card, and that all versions that it pins exist.

        Raises:
            StoreError: The version, a file or a pinned version is missing.
        """
        self.require(card.name, card.version)
        present = self._list_files(card.name, card.version)
        for file in card.files:
            if Path(file).name != file or file not in present:
                path = self._path(card.name, card.version, file)
                raise StoreError(f"{path} is missing; restore it, or publish the model again")
        if CASCADE in card.files:
            for member in self.cascade(card).members:
                self.require_files(self.member_card(member))

    def cascade(self, card: ModelCard) -> Cascade:
        """Read the cascade of a version.

        Raises:
            StoreError: The version is no cascade, or its file is unreadable.
        """
        try:
            return Cascade.model_validate_json(self._read(card.name, card.version, CASCADE))
        except (OSError, ValidationError) as error:
            raise StoreError(f"{self._path(card.name, card.version, CASCADE)} is damaged: {error}") from error

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
        for owner in self.names():
            for version in self.versions(owner):
                if CASCADE in self._list_files(owner, version):
                    with suppress(FileNotFoundError, ValidationError):  # deleted meanwhile, or damaged and never served
                        members = Cascade.model_validate_json(self._read(owner, version, CASCADE)).members
                        pins |= {each.version: f"{owner}/{version}" for each in members if each.name == name}
        return pins

    def verify(self, card: ModelCard) -> Path:
        """Check every file of a version, and of the versions that it pins, against their cards.

        Returns:
            A folder of this machine with the files of the version, see `fetch`.

        Raises:
            StoreError: A file is missing, its sha256 differs, or the version has a file that the card does not list.
        """
        folder = self.fetch(card)
        for file, expected in card.files.items():
            if sha256(folder / file) != expected:
                self._mend(card, file, folder)
        for file in self._list_files(card.name, card.version):
            if file not in (CARD, *card.files) and not file.startswith("."):
                path = self._path(card.name, card.version, file)
                raise StoreError(f"{path} does not belong to this version: {CARD} does not list it; remove it")
        if CASCADE in card.files:
            for member in self.cascade(card).members:
                self.verify(self.member_card(member))
        elif MODEL not in card.files:
            path = self._path(card.name, card.version, CARD)
            raise StoreError(f"{path} does not list {MODEL}; publish the model again")
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
        members = Cascade.model_validate_json((draft / CASCADE).read_bytes()).members if CASCADE in files else ()
        return self._publish(draft, card.model_copy(update={"files": files}), members)

    def promote(self, name: str, version: int) -> None:
        """Make a version live.

        Raises:
            StoreError: There is no such version.
        """
        self._replace_live(name, version, lambda _: True)

    def promote_if(self, card: ModelCard, promotion: Promotion) -> bool:
        """Make a version live if the promotion rule allows it.

        Args:
            card: Card of the version.
            promotion: "always", "never" or "if-better". "if-better" promotes a version whose top-1 accuracy on the test
                set is at least that of the live version, or the first version. It never promotes a version with
                another data set than the live one, because their accuracies are not comparable.

        Returns:
            True if the version is now live.

        Raises:
            StoreError: There is no such version.
        """

        def is_better(live: int | None) -> bool:
            if promotion == "always" or live is None:
                return True
            current = self.card(card.name, live)
            return card.data == current.data and card.test.top1 >= current.test.top1

        return promotion != "never" and self._replace_live(card.name, card.version, is_better)

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
            name: Name of the model.
            keep: Number of versions to keep. It is at least 1, so that no version number is assigned twice.
            protected: Further versions to keep.

        Returns:
            The removed versions.

        Raises:
            ValueError: `keep` is less than 1.
        """
        if keep < 1:
            raise ValueError(f"keep={keep} would remove every version; give at least 1")

        def select() -> list[int]:
            kept = {self.live(name), *protected, *self.pins(name)}
            return [each for each in self.versions(name)[:-keep] if each not in kept]

        return self._remove(name, select)

    def delete(self, name: str, version: int) -> None:
        """Remove a version.

        Raises:
            StoreError: There is no such version.
            VersionInUse: The version is live, a cascade pins it, or it is the newest one, whose number the next
                publication would assign again.
        """

        def select() -> list[int]:
            self.require(name, version)
            if version == self.live(name):
                raise VersionInUse(f"{name}/{version} is live; promote another version first")
            if cascade := self.pins(name).get(version):
                raise VersionInUse(f"{cascade} pins {name}/{version}; delete {cascade} first")
            if version == max(self._list_numbers(name)):
                raise VersionInUse(f"{name}/{version} is the newest version; its number would be assigned again")
            return [version]

        self.require(name, version)
        self._remove(name, select)

    def _mend(self, card: ModelCard, file: str, folder: Path) -> None:  # noqa: ARG002
        """Replace a damaged file in the folder from `fetch`. Raises StoreError if there is no other copy."""
        raise self._damage_error(card, file)

    def _damage_error(self, card: ModelCard, file: str) -> StoreError:
        path = self._path(card.name, card.version, file)
        return StoreError(f"{path} is damaged: its sha256 differs from the one in {CARD}")

    def _require_same_files(self, card: ModelCard) -> None:
        """Check that an amended card lists the files of the published one. Raises the errors of `amend`."""
        if self.card(card.name, card.version).files != card.files:
            raise StoreError(f"the card of {card.name} version {card.version} cannot list other files")

    def _path(self, *parts: object) -> str:
        """Return the place of a model, a version or a file, for messages."""
        return "/".join(map(str, (self.location, *parts)))


def require_name(name: str) -> None:
    """Check the name of a model.

    Raises:
        StoreError: The name is invalid.
    """
    if not is_name(name):
        raise StoreError(f"{quote(name)} is not a model name; give lower-case letters, digits, - and _ only")


def is_name(name: str) -> bool:
    """Return whether a model may have this name."""
    return bool(_NAME.fullmatch(name))
