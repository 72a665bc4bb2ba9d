"""Read labeled images for an evaluation: a split of the data set, or an uploaded zip with a folder for each class."""

import threading
import zipfile
from collections.abc import Callable
from contextlib import closing
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from app.archives import open_zip, read_chunks
from app.exceptions import BadRequest, Problem, TooLarge, Unavailable
from app.inference import decoding
from app.inference.decode_process import DecodeProcess
from app.inference.images import encoded
from app.settings import Settings
from training.dataset import DataError, load_dataset, sample_rows
from training.encoding import replace_surrogates
from training.text import quote

# In lower case. Names that begin with a dot, such as .DS_Store, are hidden files and are skipped as well.
_SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"}
_SYSTEM_FOLDERS = {"__macosx", "@eadir", "$recycle.bin", "system volume information"}


class LabeledImages(BaseModel, arbitrary_types_allowed=True):
    """Labeled images: uint8 [N, 3, 32, 32], with class ids int64 [N] and N names.

    The name of an image of a split is the split and the number of the image in it, such as test/17.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    names: list[str]
    split: str


Read = Callable[[threading.Event], LabeledImages]
"""Function that reads the images of a measurement. It returns or raises early once the event is set."""


def read_split(
    settings: Settings, split: Literal["test", "train"], limit: int | None, classes: list[str]
) -> LabeledImages:
    """Read `limit` images of a split, chosen at random with a fixed seed so that the classes are mixed.

    Args:
        settings: The folder of the data set.
        split: "test" or "train".
        limit: Number of images. None reads all.
        classes: Class names of the model.

    Raises:
        Unavailable: The data set is missing or damaged.
        BadRequest: The model was trained for other classes.
    """
    try:
        dataset = load_dataset(settings.data)
    except DataError as error:
        raise Unavailable(str(error)) from error
    if list(dataset.classes) != classes:
        raise BadRequest("the classes of the model differ from those of the data set")
    part = dataset.test if split == "test" else dataset.train
    rows = sample_rows(len(part), limit)
    chosen = part[rows]
    names = [f"{split}/{number}" for number in rows]
    return LabeledImages(images=chosen.images.transpose(0, 3, 1, 2), labels=chosen.labels, names=names, split=split)


def read_zip(settings: Settings, file: BinaryIO, classes: list[str], stop_event: threading.Event) -> LabeledImages:
    """Read and decode the images of a zip whose folders are named by class, such as `apple/1.png`.

    Args:
        settings: Limits of images and archives.
        file: The zip, seekable.
        classes: Class names of the model.
        over: Event that stops the reading.

    Raises:
        Unavailable: `stop_event` was set.
        BadRequest: The file is not a zip, has no images, or has a folder that names no class.
        TooLarge: The zip has too many entries, or unpacks to more bytes than the limit.
        Problem: An image cannot be decoded.
    """
    ids = {_folder_name(label): number for number, label in enumerate(classes)}
    pixels, labels, names = [], [], []
    limits = settings.max_image_bytes, settings.max_image_pixels
    with open_zip(file, settings.max_archive_images) as archive, closing(DecodeProcess(*limits)) as process:
        entries = [entry for entry in archive.infolist() if not _is_ignored(entry)]
        if sum(entry.file_size for entry in entries) > settings.max_archive_bytes:
            raise TooLarge(f"the zip unpacks to more than {settings.max_archive_bytes:,} bytes")
        for entry in entries:
            if stop_event.is_set():
                raise Unavailable("the evaluation was stopped")
            folder = ["", *_parts(entry)][-2]
            if _folder_name(folder) not in ids:
                raise BadRequest(
                    f"{quote(entry.filename)}: the folder {quote(folder)} is not a class; "
                    "GET /models/{name} names them"
                )
            if entry.file_size > settings.max_image_bytes:
                raise TooLarge(f"{entry.filename} is larger than {settings.max_image_bytes:,} bytes")
            content = b"".join(read_chunks(archive, entry))
            try:
                pixels.append(_decode(content, limits, process))
            except Problem as error:
                error.detail = f"{entry.filename}: {error.detail}"
                raise
            labels.append(ids[_folder_name(folder)])
            names.append(replace_surrogates(entry.filename))
    if not pixels:
        raise BadRequest("the zip has no images; put them into folders named by class, such as apple/1.png")
    return LabeledImages(images=np.stack(pixels), labels=np.array(labels, np.int64), names=names, split="zip")


def _decode(content: bytes, limits: tuple[int, int], process: DecodeProcess) -> NDArray[np.uint8]:
    """Decode an image to uint8 [3, 32, 32]. A costly image goes to the process."""
    try:
        return encoded.decode(content, *limits, decoding.MEDIUM)
    except encoded.CostlyImage:
        return process.decode(content)[0]


def _parts(entry: zipfile.ZipInfo) -> list[str]:
    """Return the folders and the name of an entry. Some programs for Windows separate them with backslashes."""
    return entry.filename.replace("\\", "/").split("/")


def _is_ignored(entry: zipfile.ZipInfo) -> bool:
    """Return True for folders, for hidden files, and for files that operating systems and NAS devices add."""
    *folders, name = [part.lower() for part in _parts(entry)]
    hidden = any(part.startswith(".") and part not in (".", "..") for part in (*folders, name))
    return not name or hidden or name in _SYSTEM_FILES or not _SYSTEM_FOLDERS.isdisjoint(folders)


def _folder_name(text: str) -> str:
    return text.strip().lower().replace(" ", "_")
