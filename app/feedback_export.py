"""Export corrections for training and evaluation. `cifar100 data` has commands for both steps.

    runs/feedback --export--> FOLDER/<label>/<id>.png --pack--> FILE.npz for `cifar100 train --extra-data`

An operator looks through the folders between both steps, because anybody may have sent the corrections.
"""

import shutil
from pathlib import Path

import numpy as np

from app.exceptions import Problem
from app.feedback import FeedbackStore
from app.inference.images.encoded import EncodedImage
from app.settings import Settings
from training.errors import ReportedError


class ExportError(ReportedError):
    """A folder cannot be exported or packed. The message names the file and a remedy."""


def export_folders(feedback: Path, folder: Path) -> int:
    """Copy all corrections into folders named by class.

    Args:
        feedback: Folder of a `FeedbackStore`.
        folder: A new or empty folder.

    Returns:
        The number of corrections.

    Raises:
        ExportError: The folder is not empty, or there are no corrections.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ExportError(f"{folder} is not empty; give a new folder")
    count = 0
    for file, correction in FeedbackStore(feedback, max_images=0).entries():
        target = folder / correction.label
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / file.name)
        count += 1
    if not count:
        raise ExportError(f"{feedback} has no corrections; name the runs folder of the service by --runs")
    return count


def pack_folders(folder: Path, file: Path) -> int:
    """Pack images into an npz file with the arrays `images`, uint8 [N, 32, 32, 3], and `labels`, N names of classes.

    The images are decoded as those of a prediction, and may have any size.

    Args:
        folder: Folder with a folder of images for each class.
        file: The npz file.

    Returns:
        The number of images.

    Raises:
        ExportError: An image cannot be decoded, or there are none.
    """
    settings = Settings()
    images, labels = [], []
    for path in sorted(folder.glob("*/*")):
        try:
            image = EncodedImage(path.read_bytes(), settings.max_image_bytes, settings.max_image_pixels)
            images.append(image.decode().transpose(1, 2, 0))
        except Problem as error:
            raise ExportError(f"{path}: {error.detail}") from None
        labels.append(path.parent.name)
    if not images:
        raise ExportError(f"{folder} has no images; give a folder with a folder of images for each class")
    np.savez(file, images=np.stack(images), labels=np.array(labels))
    return len(images)
