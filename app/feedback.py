"""Keep corrections of predictions: the image as the network sees it, its right class, and the model's answer.

    POST /feedback --FeedbackStore--> runs/feedback/<id>.png --cifar100 data export-feedback--> labeled folders, npz

Each correction is one file: a PNG of 32x32 pixels, with the record as a text chunk. It takes at most 4 KiB. The photo
itself, its metadata, its file name and the address of its sender are not kept. The id is the time and a hash of the
pixels, so a second correction of the same image replaces the first.
"""

import asyncio
import hashlib
import io
import logging
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, ValidationError

from app.exceptions import NotFound, StorageFull, Unavailable
from app.threads import Threads
from training.files import lock_folder, write_durably
from training.text import quote

log = logging.getLogger(__name__)

FEEDBACK = "feedback"
"""Name of the folder in the runs folder."""

_RECORD = "feedback"  # key of the text chunk
_TIME = "%Y%m%d-%H%M%S"
_EXPIRY_POLL_S = 3600.0
_THREADS = 2


class Answer(BaseModel, use_attribute_docstrings=True):
    """The answer of a model for an image."""

    model: str
    """Name of the model."""
    version: int
    """Version of the model."""
    predicted: str
    """Label of the most probable class."""
    probability: float
    """Probability of that class, 0-1."""


class Correction(BaseModel, use_attribute_docstrings=True):
    """The right class of an image, and the model's answer."""

    id: str
    """Id of the correction."""
    created: datetime
    """Time of the correction."""
    label: str
    """Label of the right class."""
    answer: Answer
    """The answer that it corrects."""


class FeedbackStore:
    """The folder of corrections. All server processes on a runs folder share it.

    Args:
        folder: The folder. The first correction creates it.
        max_images: Largest number of corrections.
        days: Days after which a correction is deleted. None keeps all.
    """

    def __init__(self, folder: Path, max_images: int, days: int | None = None):
        self.folder = folder
        self.threads = Threads("the feedback", _THREADS)
        """Threads in which requests call the other methods."""
        self._max_images = max_images
        self._days = days

    def require_room(self) -> None:
        """Check that there is room for another correction.

        Raises:
            StorageFull: There is none.
        """
        if len(self._files()) >= self._max_images:
            raise StorageFull(
                f"the service keeps {self._max_images:,} corrections, as many as CIFAR100_MAX_FEEDBACK allows; an "
                "operator has to export and delete some"
            )

    def add(self, pixels: NDArray[np.uint8], label: str, answer: Answer) -> Correction:
        """Keep a correction. It replaces an earlier one of the same image.

        Args:
            pixels: uint8 [3, 32, 32].
            label: Label of the right class.
            answer: The answer of the model.

        Raises:
            StorageFull: There is no room.
            Unavailable: The folder cannot be written.
        """
        created = datetime.now(UTC).replace(microsecond=0)
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()[:16]
        correction = Correction(id=f"{created:{_TIME}}-{digest}", created=created, label=label, answer=answer)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with lock_folder(self.folder):
                self._delete_expired()
                replaced = [file for file in self._files() if file.stem.endswith(digest)]
                if not replaced:
                    self.require_room()
                file = self.folder / f"{correction.id}.png"
                write_durably(file, _encode(pixels, correction))
                for former in replaced:
                    if former != file:
                        former.unlink(missing_ok=True)
        except OSError as error:
            raise Unavailable(f"the correction cannot be kept: {error.strerror}") from error
        return correction

    def newest(self, limit: int) -> list[Correction]:
        """Return the latest corrections, newest first. Damaged files are left out."""
        return [correction for _, correction in self._read(self._files()[-limit:])][::-1]

    def entries(self) -> Iterator[tuple[Path, Correction]]:
        """Iterate over the files and the corrections, oldest first. Damaged files are left out."""
        return self._read(self._files())

    def delete(self, correction_id: str) -> int:
        """Delete a correction. Return the number of the others.

        Raises:
            NotFound: There is none with this id.
        """
        files = self._files()
        found = [file for file in files if file.stem == correction_id]
        if not found:
            raise NotFound(f"there is no correction {quote(correction_id)}; GET /feedback lists them")
        found[0].unlink(missing_ok=True)
        return len(files) - 1

    async def expire_periodically(self) -> None:
        """Delete corrections that are older than `days`, every hour."""
        while self._days:
            with suppress(OSError, Unavailable):  # the next attempt is in an hour
                await self.threads.run(self._delete_expired)
            await asyncio.sleep(_EXPIRY_POLL_S)

    def _delete_expired(self) -> None:
        if self._days:
            first = f"{datetime.now(UTC) - timedelta(self._days):{_TIME}}"
            expired = [file for file in self._files() if file.stem < first]
            for file in expired:
                file.unlink(missing_ok=True)
            if expired:
                log.info("%d corrections were older than %d days and are deleted", len(expired), self._days)

    def _files(self) -> list[Path]:
        """List the files of all corrections, oldest first."""
        return sorted(self.folder.glob("*.png"))

    def _read(self, files: list[Path]) -> Iterator[tuple[Path, Correction]]:
        for file in files:
            with suppress(OSError, KeyError, AttributeError, SyntaxError, ValidationError), Image.open(file) as image:
                yield file, Correction.model_validate_json(image.text[_RECORD])  # type: ignore[attr-defined]


def _encode(pixels: NDArray[np.uint8], correction: Correction) -> bytes:
    text = PngInfo()
    text.add_text(_RECORD, correction.model_dump_json())
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()
