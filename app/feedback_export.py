"""Export corrections for training and evaluation: `python -m app.feedback_export --help`.

    runs/feedback --export--> FOLDER/<label>/<id>.png --pack--> FILE.npz for `python -m training train --extra-data`

An operator looks through the folders between both steps, because anybody may have sent the corrections.
"""

import shutil
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from app.exceptions import Problem
from app.feedback import FEEDBACK, FeedbackStore
from app.inference.images.encoded import EncodedImage
from app.settings import Settings
from training.encoding import restart_in_utf8_mode

cli = typer.Typer(no_args_is_help=True, add_completion=False)

Folder = Annotated[Path, typer.Argument(help="Folder with a folder of images for each class.")]
File = Annotated[Path, typer.Argument(help="The npz file to write.")]
Runs = Annotated[Path, typer.Option(help="The runs folder of the service.", envvar="CIFAR100_RUNS")]


class ExportError(ValueError):
    """A folder cannot be exported or packed. The message names the file and a remedy."""


@cli.callback()
def start() -> None:
    """Export corrections of users for training and evaluation."""
    restart_in_utf8_mode()


@cli.command()
def export(folder: Folder, runs: Runs = Path("runs")) -> None:
    """Copy all corrections into folders named by class, which a zip for POST /evaluate may contain."""
    try:
        count = export_folders(runs / FEEDBACK, folder)
    except (ExportError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"corrections in {folder}: {count}; look through them, then pack them")


@cli.command()
def pack(folder: Folder, file: File) -> None:
    """Pack folders of images named by class into an npz file for `python -m training train --extra-data`."""
    try:
        count = pack_folders(folder, file)
    except (ExportError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"images in {file}: {count}")


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
        raise ExportError(f"{feedback} has no corrections; give the runs folder of the service with --runs")
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


if __name__ == "__main__":
    cli(prog_name="python -m app.feedback_export")
