"""`cifar100 data`: get and check the data set, and export the corrections of a service."""

from pathlib import Path
from typing import Annotated

import typer

from app.cli.options import Runs, local_settings
from training.__main__ import Data
from training.console import CommandGroup, Json, err, out, print_json, working
from training.dataset import ARCHIVE, FINGERPRINT, find_archive, load_dataset
from training.errors import ReportedError

cli = typer.Typer(name="data", cls=CommandGroup, help="Download and check the data set; export corrections.")

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder with a folder of images for each class.")]


@cli.command()
def download(data_source: Data = None, as_json: Json = False) -> None:
    """Download CIFAR-100 (170 MB) into the folder of the data set, unless it is there, and check it."""
    archive = find_archive(data_source)
    if archive and not archive.exists():
        err.print(f"downloading CIFAR-100 into {archive.parent.absolute()}")
    _check(data_source, archive, as_json)


@cli.command()
def check(data_source: Data = None, as_json: Json = False) -> None:
    """Read the data set and compare it with CIFAR-100."""
    archive = find_archive(data_source)
    if archive and not archive.exists():
        raise ReportedError(
            f"there is no {ARCHIVE} in {archive.parent.absolute()}; get it by 'cifar100 data download', or name "
            "another folder by --data or CIFAR100_DATA"
        )
    _check(data_source, archive, as_json)


@cli.command("export-feedback")
def export_feedback(folder: Folder, runs: Runs = None, as_json: Json = False) -> None:
    """Copy the corrections of a service into folders named by class. A zip of them can be evaluated."""
    from app.feedback import FEEDBACK
    from app.feedback_export import export_folders

    count = export_folders(local_settings(runs=runs).runs / FEEDBACK, folder)
    if as_json:
        print_json({"folder": str(folder), "images": count})
    else:
        out.print(f"{count:,} corrections are in {folder}. Look through them, then run 'cifar100 data pack'.")


@cli.command()
def pack(
    folder: Folder,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The npz file to write.")],
    as_json: Json = False,
) -> None:
    """Pack folders of images named by class into an npz file for 'cifar100 train --extra-data'."""
    from app.feedback_export import pack_folders

    with working("decoding the images"):
        count = pack_folders(folder, file)
    if as_json:
        print_json({"file": str(file), "images": count})
    else:
        out.print(f"{count:,} images are in {file}.")


def _check(source: str | None, archive: Path | None, as_json: bool) -> None:
    with working("reading the data set"):
        dataset = load_dataset(source)
    is_original = dataset.fingerprint == FINGERPRINT
    if as_json:
        print_json(
            {
                "file": str(archive) if archive else None,
                "train": len(dataset.train),
                "test": len(dataset.test),
                "classes": len(dataset.classes),
                "fingerprint": dataset.fingerprint,
                "is_cifar100": is_original,
            }
        )
        return
    out.print(
        f"{archive or 'synthetic'}: {len(dataset.train):,} training and {len(dataset.test):,} test images of "
        f"{len(dataset.classes)} classes"
    )
    out.print("It is CIFAR-100." if is_original else f"It is not CIFAR-100. Its fingerprint is {dataset.fingerprint}.")
