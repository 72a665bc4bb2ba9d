"""The web service: it serves the models of the store and runs training and evaluation jobs."""

from importlib import metadata


def version() -> str:
    """Return the version of the installed package, or 0 if it runs from a folder without being installed."""
    try:
        return metadata.version("cifar100")
    except metadata.PackageNotFoundError:
        return "0"
