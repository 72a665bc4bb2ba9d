"""Receive a version that another service has published, as a zip of its card and files.

    zip --unpack--> temporary folder --CheckProcess--> draft --Store.publish--> next version of the model

Nothing is kept of a version that is refused. Its model is computed in another process only, until it is loaded.
"""

import logging
import shutil
import stat
import tempfile
import threading
from pathlib import Path
from typing import BinaryIO, TypeVar

from pydantic import BaseModel, ValidationError

from app.archives import open_zip, read_chunks
from app.exceptions import BadRequest, TooLarge, Unavailable
from app.inference.check_process import CheckProcess, CheckResult
from app.machine import MIB
from app.settings import Settings
from app.threads import Threads
from training.files import sha256
from training.runtimes.forms import FORM_FILES
from training.runtimes.openvino import INT8
from training.store import CARD, CASCADE, MODEL, Cascade, ModelCard, Store, StoreError
from training.text import quote

log = logging.getLogger(__name__)

FILES = (CARD, MODEL, CASCADE, INT8, Path(INT8).with_suffix(".bin").name, *FORM_FILES.values())
"""Names that the files of an uploaded version may have."""

_MAX_CARD_BYTES = MIB
_MAX_ENTRIES = 10_000  # a TorchScript file is a zip of hundreds of entries
_THREADS = 2  # one checks an upload, the other refuses a second one

Parsed = TypeVar("Parsed", bound=BaseModel)


class VersionReceiver:
    """Checks uploaded versions, one at a time, and publishes them.

    Args:
        settings: Limits of an upload, and the inputs of a check.
        store: The model store.
    """

    def __init__(self, settings: Settings, store: Store):
        self.threads = Threads("the check of uploads", _THREADS)
        """Threads in which requests call `receive`."""
        self._max_bytes = settings.max_archive_bytes
        self._store = store
        self._process = CheckProcess(settings)
        self._busy = threading.Lock()

    def receive(self, name: str, file: BinaryIO, classes: list[str] | None) -> tuple[ModelCard, CheckResult | None]:
        """Check a version and publish it, unless the model has a version with the same files.

        Args:
            name: Name of the model.
            file: The zip, seekable.
            classes: Class names of the live models. None if no model is live.

        Returns:
            The card of the published version, and the result of its check, or None if the store had it already.

        Raises:
            BadRequest: The zip, its card or its model is refused.
            TooLarge: The zip has more files or bytes than the limits.
            Unavailable: Another upload is being checked, or the service stops.
        """
        if not self._busy.acquire(blocking=False):
            raise Unavailable("another upload is being checked; try again later")
        try:
            with tempfile.TemporaryDirectory(prefix="cifar100-upload-") as temporary:
                folder, members = Path(temporary, "version"), Path(temporary, "members")
                folder.mkdir()
                card = self._unpack(file, folder)
                _require_fit(card, name, classes)
                if known := self._store.find_by_files(name, card.files):
                    return known, None
                self._link_members(folder / CASCADE, members)
                check = self._process.run(folder, members)
                card = self._publish(folder, card)
        except StoreError as error:
            raise BadRequest(str(error)) from None
        finally:
            self._busy.release()
        log.info("%s version %d was uploaded", card.name, card.version)
        return card, check

    def close(self) -> None:
        """End a running check, and refuse further calls."""
        self._process.close()
        self.threads.close()

    def _unpack(self, file: BinaryIO, folder: Path) -> ModelCard:
        """Write the files of a version into a folder, and return its card, which describes these files."""
        unpack(file, folder, self._max_bytes)
        card = _parse(ModelCard, folder / CARD)
        files = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != CARD}
        for name in sorted(files.keys() | card.files.keys()):
            if name not in files:
                raise BadRequest(f"the zip lacks {quote(name)}, which {CARD} lists; send all files of the version")
            if name not in card.files:
                raise BadRequest(f"{CARD} does not list {name}; remove it from the zip")
            if files[name] != card.files[name]:
                raise BadRequest(f"{name} is damaged: its sha256 differs from the one in {CARD}; download it again")
        if (CASCADE in files) == (MODEL in files) or (CASCADE in files) != (card.cascade is not None):
            raise BadRequest(f"a version has {MODEL}, or {CASCADE} and the fit of the cascade in its card")
        if card.cascade:
            card = self._pin_members(card, folder / CASCADE)
        return card

    def _pin_members(self, card: ModelCard, file: Path) -> ModelCard:
        """Let a cascade pin the versions of this store that have the files of its members."""
        cascade = _parse(Cascade, file)
        members = []
        for member in cascade.members:
            found = self._store.find_by_files(member.name, member.files)
            if not found:
                raise BadRequest(
                    f"the cascade pins {member}, and this store has no version of {member.name} with the same files; "
                    f"upload {member} first"
                )
            members.append(member.model_copy(update={"version": found.version}))
        file.write_text(cascade.model_copy(update={"members": tuple(members)}).model_dump_json(indent=1) + "\n")
        report = card.cascade and card.cascade.model_copy(update={"members": [str(member) for member in members]})
        card = card.model_copy(update={"files": {CASCADE: sha256(file)}, "cascade": report})
        file.with_name(CARD).write_text(card.model_dump_json())
        return card

    def _link_members(self, file: Path, store: Path) -> None:
        """Create a folder of a store with the members of a cascade, because the check has no network."""
        if not file.exists():
            return
        for member in _parse(Cascade, file).members:
            link = store / member.name / str(member.version)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(self._store.fetch(self._store.member_card(member)).absolute())

    def _publish(self, folder: Path, card: ModelCard) -> ModelCard:
        try:
            with self._store.draft(card.name) as draft:
                for file in card.files:
                    shutil.copyfile(folder / file, draft / file)
                return self._store.publish(draft, card)
        except OSError as error:
            raise Unavailable(f"the model store cannot be changed: {error.strerror}") from error


def unpack(file: BinaryIO, folder: Path, max_bytes: int) -> None:
    """Write the files of an uploaded version into a folder.

    Args:
        file: The zip, seekable.
        folder: An empty folder.
        max_bytes: Largest total size of the files.

    Raises:
        BadRequest: The file is not a zip, is damaged, or has other files than a version.
        TooLarge: The zip has too many or too large files.
    """
    with open_zip(file, _MAX_ENTRIES) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        for entry in entries:
            if entry.filename not in FILES or stat.S_ISLNK(entry.external_attr >> 16):
                raise BadRequest(
                    f"{quote(entry.filename)} is no file of a version; a zip may have {', '.join(FILES)}, without a "
                    "folder"
                )
        if len(set(names)) < len(names):
            raise BadRequest("the zip has a file twice; send each file once")
        if CARD not in names:
            raise BadRequest(f"the zip has no {CARD}; send the card with the files that it lists")
        if archive.getinfo(CARD).file_size > _MAX_CARD_BYTES:
            raise TooLarge(f"{CARD} is larger than {_MAX_CARD_BYTES:,} bytes")
        if sum(entry.file_size for entry in entries) > max_bytes:
            raise TooLarge(f"the zip unpacks to more than {max_bytes:,} bytes")
        for entry in entries:
            with (folder / entry.filename).open("wb") as output:
                output.writelines(read_chunks(archive, entry))


def _parse(kind: type[Parsed], file: Path) -> Parsed:
    try:
        return kind.model_validate_json(file.read_bytes())
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise BadRequest(f"{file.name} is invalid: {place + ': ' if place else ''}{fault['msg']}") from None


def _require_fit(card: ModelCard, name: str, classes: list[str] | None) -> None:
    if card.name != name:
        raise BadRequest(f"the card is that of {quote(card.name)}, not of {name}; upload it under the name of its card")
    if classes is not None and card.classes != classes:
        raise BadRequest(f"{CARD} names other classes than the live models of this service")
