"""`cifar100 data`: get and check the data set."""

from pathlib import Path

import typer

from training.__main__ import Data
from training.console import CommandGroup, Json, err, out, print_json, working
from training.dataset import ARCHIVE, FINGERPRINT, find_archive, load_dataset
from training.errors import ReportedError

cli = typer.Typer(name="data", cls=CommandGroup, help="Download and check the data set.")


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
