"""Labeled images that a run trains on besides its data set, such as corrections of users.

    npz file: images uint8 [N, 32, 32, 3], labels [N] --add--> Dataset.extra --loop.make_splits--> training split

The images never change the test set or the images that are held out. An image that is in one of them is left out.
"""

import io
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from training.dataset import READ_ERRORS, DataError, Dataset, Extra, Split, hold_out
from training.text import quote


def add(dataset: Dataset, file: Path, validation_images: int) -> Dataset:
    """Return a data set with extra training images.

    Args:
        dataset: The data set.
        file: An npz file with the arrays `images`, uint8 [N, 32, 32, 3], and `labels`, N names of classes.
        validation_images: Number of training images that the run holds out.

    Raises:
        DataError: The file is damaged, names an unknown class, or has no image to train on.
    """
    content = file.read_bytes()
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            images, names = arrays["images"], arrays["labels"]
    except READ_ERRORS as error:
        raise DataError(f"{file} is not an npz file with the arrays images and labels ({error})") from error
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or names.shape != images.shape[:1]:
        raise DataError(
            f"{file}: 'images' is {images.dtype} {list(images.shape)} and 'labels' {list(names.shape)}, expected uint8 "
            "[N, 32, 32, 3] and [N]"
        )
    ids = {label: number for number, label in enumerate(dataset.classes)}
    if unknown := sorted(set(map(str, names)) - ids.keys()):
        raise DataError(f"{file}: {quote(unknown[0])} is not a class of the data set; correct or remove the label")
    _, held_out = hold_out(dataset.train, validation_images)
    reserved = {image.tobytes() for part in (dataset.test, held_out) for image in part.images}
    kept = np.flatnonzero([image.tobytes() not in reserved for image in images])
    if not len(kept):
        raise DataError(f"{file} has no image that is neither in the test set nor held out")
    labels = np.array([ids[str(name)] for name in names], np.int64)
    extra = Extra(Split(images, labels)[kept], left_out=len(images) - len(kept), sha256=sha256(content).hexdigest())
    return replace(dataset, extra=extra)
