"""A model store in a folder, which processes of one machine or of several machines share.

The pointer to the live version is the file `<name>/live`. A version appears by renaming a finished folder, and the
pointer changes by renaming a finished file. A process that promotes or removes versions of a model holds an flock(2) on
the model's folder, which the operating system releases if the process dies.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from training.files import lock_folder, sync, write_durably
from training.store.cards import CARD, ModelCard, PinnedMember
from training.store.store import Store, StoreError, is_name, require_name

LIVE = "live"

_DRAFT_EXPIRY_S = 24 * 3600


class LocalStore(Store):
    """The models in a folder.

    Args:
        root: The folder. The first publication creates it.
    """

    def __init__(self, root: Path):
        self.root = root
        self.location = str(root.absolute())

    def require_access(self) -> None:
        """Check that the folder exists and can be read. Raises the errors of `Store.require_access`."""
        if not os.path.lexists(self.root):
            raise StoreError(f"there is no model store {self.location}; name one by --models or CIFAR100_MODELS")
        next(self.root.iterdir(), None)  # fails for a file, and without permission

    def require_writable(self) -> None:
        """Check that this process may write to the folder. Raises the errors of `Store.require_writable`."""
        if not os.access(self.root, os.W_OK):
            raise StoreError(f"{self.location} cannot be written")

    def names(self) -> list[str]:
        """List the models that have at least one version, in alphabetical order."""
        if not self.root.is_dir():
            return []
        return sorted(path.name for path in self.root.iterdir() if is_name(path.name) and self.versions(path.name))

    def versions(self, name: str) -> list[int]:
        """List the versions of a model, oldest first. An unknown model has none."""
        return [number for number in self._list_numbers(name) if (self._folder(name, number) / CARD).is_file()]

    def live(self, name: str) -> int | None:
        """Return the version that is served, or None. Raises the errors of `Store.live`."""
        file = self._model_folder(name) / LIVE
        try:
            return int(file.read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StoreError(f"{file} is damaged: it must contain a version number") from error

    def fetch(self, card: ModelCard) -> Path:
        """Return the folder of a version that has all its files. Raises the errors of `Store.fetch`."""
        self.require_files(card)
        return self.folder(card.name, card.version)

    def folder(self, name: str, version: int) -> Path:
        """Return the folder of a version.

        Raises:
            StoreError: There is no such version.
        """
        self.require(name, version)
        return self._folder(name, version)

    @contextmanager
    def draft(self, name: str) -> Iterator[Path]:
        """Create a folder beside the versions, see `Store.draft`. It also removes drafts of killed processes."""
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

    def amend(self, card: ModelCard) -> None:
        """Replace the card of a published version. Raises the errors of `Store.amend`."""
        with lock_folder(self._model_folder(card.name)):
            self._require_same_files(card)
            write_durably(self._folder(card.name, card.version) / CARD, card.to_bytes())

    def _list_numbers(self, name: str) -> list[int]:
        model = self._model_folder(name)
        if not model.is_dir():
            return []
        return sorted(int(path.name) for path in model.iterdir() if path.name.isdecimal())

    def _list_files(self, name: str, version: int) -> Collection[str]:
        try:
            return {path.name for path in self._folder(name, version).iterdir()}
        except (FileNotFoundError, NotADirectoryError):
            return ()

    def _read(self, name: str, version: int, file: str) -> bytes:
        return (self._folder(name, version) / file).read_bytes()

    def _publish(self, draft: Path, card: ModelCard, members: Sequence[PinnedMember]) -> ModelCard:
        with ExitStack() as locks:  # no other process removes the members before they are pinned
            for name in sorted({member.name for member in members}):
                locks.enter_context(lock_folder(self._model_folder(name)))
            for member in members:
                self.member_card(member)
            return self._rename_draft(draft, card)

    def _rename_draft(self, draft: Path, card: ModelCard) -> ModelCard:
        """Complete a draft with its card, and rename it to the next free version of its model."""
        model = self._model_folder(card.name)
        while True:
            version = max(self._list_numbers(card.name), default=0) + 1
            card = card.model_copy(update={"version": version})
            (draft / CARD).write_bytes(card.to_bytes())
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

    def _replace_live(self, name: str, version: int, is_allowed: Callable[[int | None], bool]) -> bool:
        self.require(name, version)  # before the lock creates a file in the folder of a model
        with lock_folder(self._model_folder(name)):
            self.require(name, version)  # another process may have removed it before the lock was free
            if not is_allowed(self.live(name)):
                return False
            write_durably(self._model_folder(name) / LIVE, f"{version}\n".encode())
            return True

    def _remove(self, name: str, select: Callable[[], list[int]]) -> list[int]:
        model = self._model_folder(name)
        with lock_folder(model):
            versions = select()
            with tempfile.TemporaryDirectory(prefix=".draft-", dir=model) as trash:
                for version in versions:  # a renamed folder disappears at once
                    (model / str(version)).rename(Path(trash, str(version)))
        return versions

    def _folder(self, name: str, version: int) -> Path:
        return self._model_folder(name) / str(version)

    def _model_folder(self, name: str) -> Path:
        require_name(name)
        return self.root / name


def _is_abandoned(path: Path) -> bool:
    """Return whether a draft belongs to a killed process: it has not changed for a day."""
    try:
        return time.time() - path.stat().st_mtime > _DRAFT_EXPIRY_S
    except FileNotFoundError:  # its owner has published or removed it
        return False
