"""A model store in an object store, such as `s3://bucket/models`, which any number of machines share.

    <name>/<version>/claim              reserves the number of a version for one publisher
    <name>/<version>/model.pt, ...      files of the version
    <name>/<version>/card.json          written last: a version exists if it has a card
    <name>/<version>/removing-<id>      says that a process is about to remove the version
    <name>/promotions/<number>          version that the promotion with this number made live

An object store has neither locks nor renames. It can create an object only if none exists (a conditional write). Every
later list and read includes the object. These two properties replace the lock of `LocalStore`:

- The publisher that creates `claim` owns a version number. Its card appears after its files.
- A promotion creates the object that follows the newest promotion. If two processes promote at once, one of them fails,
  reads again and decides again. A promotion whose version has no card is void, and the promotion before it counts.
- A process that removes a version marks it, and then checks that it is neither live nor pinned. A process that promotes
  or pins a version does so, and then looks for a mark. At least one of the two sees the other and gives up.

The files of a version are copied into a folder of this machine before use. A copy is used only if its sha256 is that of
the card.

fsspec gives access to S3, Google Cloud Storage, Azure and others.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import cached_property
from hashlib import sha256 as hash_sha256
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

import fsspec

from training.files import lock_folder, sha256, write_durably
from training.store.cards import CARD, ModelCard, PinnedMember
from training.store.local import LIVE
from training.store.store import Store, StoreError, StoreUnavailable, is_name, require_name

CACHE_VARIABLE = "CIFAR100_MODELS_CACHE"
"""Environment variable with the folder for copies of versions."""

_DEFAULT_CACHE = "~/.cache/cifar100/models"
_CLAIM = "claim"
_MARK = "removing"
_PROMOTIONS = "promotions"
_PROBE = ".conditional-writes"

_LISTING_S = 0.2  # age up to which a listing answers several calls
_KEPT_PROMOTIONS = 20
_ABANDONED = timedelta(days=1)  # a publisher takes minutes
_UNUSED_S = 7 * 24 * 3600  # copies that nothing has used for so long are deleted
_MARK_WAIT_S = 5.0
_MARK_POLL_S = 0.1

# A request fails after seconds, not minutes. The callers retry.
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": 5, "read_timeout": 30, "retries": {"max_attempts": 3}}}
}


class _Listing:
    """The names of all objects of a store at one moment."""

    def __init__(self, objects: dict[str, dict[str, Any]]):
        self.files: dict[str, dict[int, dict[str, str]]] = {}
        """A fingerprint of each file, by model, version and name of the file."""
        self.promotions: dict[str, list[int]] = {}
        """Numbers of the promotions of each model, in ascending order."""
        self.pointers: set[str] = set()
        """Models with a `live` file, as copied from a folder."""
        for path, details in objects.items():
            match PurePosixPath(path).parts:
                case name, file if is_name(name) and file == LIVE:
                    self.pointers.add(name)
                case name, folder, file if is_name(name) and folder == _PROMOTIONS and file.isdecimal():
                    self.promotions.setdefault(name, []).append(int(file))
                case name, version, file if is_name(name) and version.isdecimal():
                    versions = self.files.setdefault(name, {})
                    versions.setdefault(int(version), {})[file] = repr(sorted(details.items()))
        for numbers in self.promotions.values():
            numbers.sort()

    def versions(self, name: str) -> list[int]:
        """List the versions of a model that have a card, oldest first."""
        return sorted(version for version, files in self.files.get(name, {}).items() if CARD in files)

    def has(self, name: str, version: int, file: str) -> bool:
        """Return whether a version has a file."""
        return file in self.files.get(name, {}).get(version, {})

    def is_marked(self, name: str, version: int) -> bool:
        """Return whether a process is about to remove a version."""
        return _has_mark(self.files.get(name, {}).get(version, {}))


class ObjectStore(Store):
    """The models under a prefix of an object store.

    Args:
        url: URL of the prefix, in a form that fsspec knows.

    Raises:
        StoreError: The URL has an unknown scheme, or a package for its scheme is missing.
    """

    def __init__(self, url: str):
        self.location = url.rstrip("/")
        self._scheme = url.partition("://")[0]
        if self._scheme not in fsspec.available_protocols():
            raise StoreError(f"{url}: the scheme is unknown; give a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
        self._listing: tuple[float, _Listing] | None = None
        self._contents: dict[tuple[str, int, str], tuple[str, bytes]] = {}  # small files with their fingerprints
        self._promoted: dict[tuple[str, int], bytes] = {}  # content of promotions
        self._writes_are_conditional = False

    @cached_property
    def _filesystem(self) -> tuple[Any, str]:
        """The file system of fsspec, and the path of the store in it."""
        try:
            options = _OPTIONS.get(self._scheme, {})
            filesystem, path = fsspec.core.url_to_fs(self.location, use_listings_cache=False, **options)
        except ImportError as error:
            raise StoreError(f"{self.location} needs a package: pip install 'cifar100[cloud]' ({error})") from error
        except Exception as error:  # each file system raises other types
            raise StoreError(f"{self.location} cannot be opened: {error}") from error
        return filesystem, path

    def _call(self, method: str, path: str, *args: Any, **options: Any) -> Any:
        """Call a method of the file system with a path below the store. Raises the errors of `_report_errors`."""
        filesystem, root = self._filesystem
        with _report_errors(self.location):
            return getattr(filesystem, method)(f"{root}/{path}".rstrip("/"), *args, **options)

    def require_access(self) -> None:
        """Check that the objects can be listed. A prefix without objects is an empty store."""
        self._list(fresh=True)

    def require_writable(self) -> None:
        """Check that the object store refuses to create an object that exists, see `Store.require_writable`.

        Raises:
            StoreError: The server overwrites the object.
        """
        if self._writes_are_conditional:
            return
        with suppress(FileExistsError):
            self._create(_PROBE, b"")  # the first writer of the store
            self._create(_PROBE, b"")
            raise StoreError(
                f"{self.location} ignores If-None-Match, so two processes could publish the same version; use an "
                "object store with conditional writes"
            )
        self._writes_are_conditional = True

    def _list(self, fresh: bool = False) -> _Listing:
        """List all objects.

        Args:
            fresh: If false, a listing of the last 0.2 s answers as well. Writers need a fresh one.
        """
        now = time.monotonic()
        if fresh or self._listing is None or now - self._listing[0] > _LISTING_S:
            try:
                found: dict[str, dict[str, Any]] = self._call("find", "", detail=True)
            except FileNotFoundError as error:
                raise StoreUnavailable(f"{self.location} cannot be listed: {error}") from error
            skip = len(self._filesystem[1]) + 1
            self._listing = now, _Listing({path[skip:]: details for path, details in found.items()})
        return self._listing[1]

    def names(self) -> list[str]:
        """List the models that have at least one version, in alphabetical order."""
        listing = self._list()
        return sorted(name for name in listing.files if listing.versions(name))

    def versions(self, name: str) -> list[int]:
        """List the versions of a model, oldest first. An unknown model has none."""
        require_name(name)
        return self._list().versions(name)

    def live(self, name: str) -> int | None:
        """Return the version that is served, or None. Raises the errors of `Store.live`."""
        require_name(name)
        return self._find_live(self._list(), name)

    def _find_live(self, listing: _Listing, name: str) -> int | None:
        """Return the version of the newest promotion that is not void."""
        for number in reversed(listing.promotions.get(name, [])):
            with suppress(FileNotFoundError):  # another process has deleted this old promotion
                version = self._read_promotion(name, number)
                if listing.has(name, version, CARD):
                    return version
        if name in listing.pointers:
            return self._parse_pointer(f"{name}/{LIVE}", self._call("cat_file", f"{name}/{LIVE}"))
        return None

    def _read_promotion(self, name: str, number: int) -> int:
        """Return the version of a promotion. Promotions never change, so each is read once."""
        path = _promotion_path(name, number)
        if (name, number) not in self._promoted:
            self._promoted[name, number] = self._call("cat_file", path)
        return self._parse_pointer(path, self._promoted[name, number])

    def _parse_pointer(self, path: str, content: bytes) -> int:
        try:
            return int(content)
        except ValueError as error:
            raise StoreError(f"{self._path(path)} is damaged: it must contain a version number") from error

    def fetch(self, card: ModelCard) -> Path:
        """Copy the files of a version that the cache lacks, see `Store.fetch`. `verify` replaces damaged copies.

        Raises:
            StoreError: A file or a pinned version is missing, or an object is damaged.
            OSError: The object store does not answer, or the cache cannot be written.
        """
        self.require_files(card)
        key = hash_sha256(repr((self.location, card.name, card.version, sorted(card.files.items()))).encode())
        cache = Path(os.environ.get(CACHE_VARIABLE) or _DEFAULT_CACHE).expanduser()
        folder = cache / f"{card.name}-{card.version}-{key.hexdigest()[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        folder.touch()  # the time of its last use
        with lock_folder(folder):  # the workers of a service copy a version once
            for file in card.files:
                if not (folder / file).is_file():
                    self._copy(card, file, folder)
            if not (folder / CARD).is_file() or (folder / CARD).read_bytes() != card.to_bytes():
                write_durably(folder / CARD, card.to_bytes())
        _delete_unused(cache)
        return folder

    def _copy(self, card: ModelCard, file: str, folder: Path) -> None:
        """Copy a file of a version into a folder of this machine."""
        with tempfile.TemporaryDirectory(prefix=".copy-", dir=folder) as temporary:
            copy = Path(temporary, file)
            self._call("get_file", f"{card.name}/{card.version}/{file}", str(copy))
            if sha256(copy) != card.files[file]:
                raise self._damage_error(card, file)
            copy.replace(folder / file)

    def _mend(self, card: ModelCard, file: str, folder: Path) -> None:
        with lock_folder(folder):
            self._copy(card, file, folder)

    @contextmanager
    def draft(self, name: str) -> Iterator[Path]:
        """Create a temporary folder on this machine, see `Store.draft`."""
        require_name(name)
        with tempfile.TemporaryDirectory(prefix="cifar100-draft-") as folder:
            yield Path(folder)

    def amend(self, card: ModelCard) -> None:
        """Replace the card of a published version. If two processes amend it at once, the last one wins."""
        self._list(fresh=True)
        self._require_same_files(card)
        self._write(f"{card.name}/{card.version}/{CARD}", card.to_bytes())

    def _list_numbers(self, name: str) -> list[int]:
        require_name(name)
        return sorted(self._list().files.get(name, {}))

    def _list_files(self, name: str, version: int) -> Collection[str]:
        require_name(name)
        files = self._list().files.get(name, {}).get(version, {})
        return [file for file in files if file != _CLAIM and not file.startswith(_MARK)]

    def _read(self, name: str, version: int, file: str) -> bytes:
        """Return the content of a small file. It is read again only if its fingerprint has changed."""
        fingerprint = self._list().files.get(name, {}).get(version, {}).get(file)
        if fingerprint is None:
            raise FileNotFoundError(self._path(name, version, file))
        known, content = self._contents.get((name, version, file), (None, b""))
        if known != fingerprint:
            content = self._call("cat_file", f"{name}/{version}/{file}")
            self._contents[name, version, file] = fingerprint, content
        return content

    def _publish(self, draft: Path, card: ModelCard, members: Sequence[PinnedMember]) -> ModelCard:
        self.require_writable()
        self._list(fresh=True)
        for member in members:
            self.member_card(member)
        self._delete_abandoned(card.name)
        version = self._claim_number(card.name)
        card = card.model_copy(update={"version": version})
        try:
            for file in card.files:
                self._upload(draft / file, f"{card.name}/{version}/{file}")
            self._write(f"{card.name}/{version}/{CARD}", card.to_bytes())
            for member in members:
                self._require_kept(member.name, member.version)
        except BaseException:
            with suppress(OSError):
                self._delete_files(card.name, version)
            raise
        return card

    def _claim_number(self, name: str) -> int:
        """Reserve the next version number of a model."""
        while True:
            version = max(self._list(fresh=True).files.get(name, {}), default=0) + 1
            with suppress(FileExistsError):  # another publisher was first
                self._create(f"{name}/{version}/{_CLAIM}", b"")
                return version

    def _replace_live(self, name: str, version: int, is_allowed: Callable[[int | None], bool]) -> bool:
        self.require_writable()
        while True:
            listing = self._list(fresh=True)
            self.require(name, version)
            if listing.is_marked(name, version):
                raise StoreError(f"{name}/{version} is being removed by another process")
            if not is_allowed(self._find_live(listing, name)):
                return False
            number = max(listing.promotions.get(name, []), default=0) + 1
            with suppress(FileExistsError):  # another process was first, so the live version may be another one
                self._create(_promotion_path(name, number), f"{version}\n".encode())
                break
        self._require_kept(name, version)
        for old in listing.promotions.get(name, [])[: -_KEPT_PROMOTIONS + 1]:
            self._delete(_promotion_path(name, old))
        return True

    def _require_kept(self, name: str, version: int) -> None:
        """Check that no process removes a version that has just become live or pinned.

        A process that has marked the version before may not have seen this. It removes the version or the mark.

        Raises:
            StoreError: The version has been removed, or the process with the mark has died.
        """
        deadline = time.monotonic() + _MARK_WAIT_S
        while True:
            listing = self._list(fresh=True)
            if not listing.has(name, version, CARD):
                raise StoreError(f"{name}/{version} was removed by another process at the same time")
            if not listing.is_marked(name, version):
                return
            if time.monotonic() > deadline:
                raise StoreError(f"the removal of {name}/{version} was begun and not finished; delete it again")
            time.sleep(_MARK_POLL_S)

    def _remove(self, name: str, select: Callable[[], list[int]]) -> list[int]:
        self._list(fresh=True)
        # One version after the other, so that a process that is killed here has made some progress.
        removed = [version for version in select() if self._remove_version(name, version, select)]
        self._delete_abandoned(name)
        return removed

    def _remove_version(self, name: str, version: int, select: Callable[[], list[int]]) -> bool:
        """Remove a version unless `select` no longer returns it after it was marked."""
        mark = f"{name}/{version}/{_MARK}-{uuid4().hex}"  # each process has its own mark
        self._write(mark, b"")
        is_selected = False
        try:
            self._list(fresh=True)
            is_selected = version in select()
        finally:
            if not is_selected:
                self._delete(mark)
        if is_selected:
            self._delete_files(name, version)
        return is_selected

    def _delete_abandoned(self, name: str) -> None:
        """Delete the files of versions whose publisher or remover was killed."""
        for version, files in self._list(fresh=True).files.get(name, {}).items():
            if CARD not in files:
                with suppress(FileNotFoundError):  # another process deletes them as well
                    if _has_mark(files) or self._age(f"{name}/{version}/{_CLAIM}") > _ABANDONED:
                        self._delete_files(name, version)

    def _age(self, path: str) -> timedelta:
        """Return the time since an object was written. Raises FileNotFoundError if it does not exist."""
        modified: datetime = self._call("modified", path)
        return datetime.now(UTC) - modified

    def _delete_files(self, name: str, version: int) -> None:
        """Delete the objects of a version. Keep the claim of the greatest number, so that it is not assigned again."""
        versions = self._list(fresh=True).files.get(name, {})
        files = versions.get(version, {}).keys() - ({_CLAIM} if version == max(versions) else set())
        # The version disappears with its card. The claim or a mark is last, so that `_delete_abandoned` finds the rest.
        for file in sorted(files, key=lambda file: (file != CARD, file == _CLAIM, file.startswith(_MARK))):
            self._delete(f"{name}/{version}/{file}")

    def _create(self, path: str, content: bytes) -> None:
        """Create an object. Raises FileExistsError if it exists."""
        self._listing = None
        self._call("pipe_file", path, content, mode="create")

    def _write(self, path: str, content: bytes) -> None:
        self._listing = None
        self._call("pipe_file", path, content)

    def _upload(self, file: Path, path: str) -> None:
        self._listing = None
        filesystem, root = self._filesystem
        with _report_errors(self.location):
            filesystem.put_file(str(file), f"{root}/{path}")

    def _delete(self, path: str) -> None:
        self._listing = None
        with suppress(FileNotFoundError):
            self._call("rm_file", path)


def _has_mark(files: Iterable[str]) -> bool:
    return any(file.startswith(_MARK) for file in files)


def _promotion_path(name: str, number: int) -> str:
    return f"{name}/{_PROMOTIONS}/{number:08}"


def _delete_unused(cache: Path) -> None:
    """Delete copies of versions that nothing has used for a week."""
    for folder in cache.iterdir():
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > _UNUSED_S:
                shutil.rmtree(folder)


@contextmanager
def _report_errors(location: str) -> Iterator[None]:
    """Raise every error of a file system as `StoreUnavailable`, except that an object does not exist, or exists."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except Exception as error:  # the packages raise exceptions of many types
        raise StoreUnavailable(f"{location} cannot be used: {error or type(error).__name__}") from error
