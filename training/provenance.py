"""This module records the device, library versions and commit of a training run for its model card."""

import importlib.metadata
import platform
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "torchvision", "numpy", "openvino", "nncf")


def collect_provenance() -> dict[str, Any]:
    """Return the fields device, libraries and commit of `store.ModelCard` for this process."""
    libraries = {library: _find_version(library) for library in LIBRARIES}
    return {
        "device": describe_device(),
        "libraries": {library: version for library, version in libraries.items() if version},
        "commit": find_commit(),
    }


def _find_version(library: str) -> str | None:
    """Return the version of a library, or None if it is not installed.

    OpenVINO may be missing, because it runs on CPUs only and training works without it.
    """
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(library)
    return None


def describe_device() -> str:
    """Return the name of the GPU, or else of the processor with its number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    return f"{cpu}, {torch.get_num_threads()} threads"


def find_commit() -> str | None:
    """Return the checked-out commit, with "-dirty" if files differ from it, or None outside a git checkout."""
    file = Path(__file__)
    try:
        for command in (
            ["ls-files", "--error-unmatch", file.name],
            ["describe", "--always", "--exclude=*", "--abbrev=40", "--dirty"],
        ):
            git = ["git", "-C", str(file.parent), *command]
            output = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return output
