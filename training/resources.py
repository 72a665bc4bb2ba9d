"""This module estimates the memory and disk that a recipe needs, and compares them with the machine's free resources.

Input: a recipe and a device.
Output: estimates in bytes, and `require`, which refuses a run that does not fit.

The estimates are upper bounds: 1.1 to 1.7 times the measured peaks for batches of 100 to 800 images, widths of 32 to
128 and images of 64 to 224 pixels. `tests/training/test_resources.py` repeats the smallest measurements.
"""

import os
import resource
import shutil
import sys
from itertools import dropwhile
from math import ceil
from pathlib import Path

import torch

from training.control_groups import CGROUPS, PROC, list_groups
from training.evaluate import BATCH_SIZES
from training.recipes import ALL_STAGES, Recipe, RecipeError, Stage
from training.runtimes.torchscript import computes_bfloat16

MIB = 1 << 20
SPARE_BYTES = 1 << 30
"""Bytes that stay free on the disk of the cached features."""
_PROCESS = {"cpu": 1100 * MIB, "cuda": 1500 * MIB}
"""Memory of the libraries and of quantization; on a GPU, of its context and the workspaces of cuDNN."""
_DATA_COPIES = 4  # copies of the data set's images: as read, as split, and as evaluated
_IMAGE_BYTES = 32 * 32 * 3
_COPIES = 6  # copies of the parameters: weights, gradients, optimizer state (2 copies), and a checkpoint being written
_TRANSIENT = 1.25  # factor on the saved activations, for their gradients and workspaces
# Limit, usage and inactive file cache of a control group, by its version
_MEMORY_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
_FORWARD = 4  # number of largest activations alive at once in a forward pass without gradients


def choose_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """Return the dtype of the activations. "auto" selects a half precision only if the device is faster in it."""
    if recipe.precision != "auto":
        dtype: torch.dtype = getattr(torch, recipe.precision)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if computes_bfloat16() else torch.float32


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def features_folder() -> Path:
    """Return the folder of cached features: $CIFAR100_FEATURES, or ~/.cache/cifar100/features."""
    return Path(os.environ.get("CIFAR100_FEATURES", "~/.cache/cifar100/features")).expanduser()


def training_bytes(recipe: Recipe, device: torch.device, images: int) -> int:
    """Estimate an upper bound for the memory of a training run, in bytes: GPU memory if `device` is a GPU.

    Args:
        images: Number of images in the training split, an upper bound for the batch size.
    """
    activation_bytes = 4 if choose_dtype(recipe, device) is torch.float32 else 2
    batch = min(recipe.batch_size, images)
    inference_batch = BATCH_SIZES[device.type]
    if recipe.network == "resnet18":
        parameters = 11_700_000
        pixels = recipe.image_size**2
        trained = ALL_STAGES if recipe.finetune_epochs else recipe.trainable
        stages = dropwhile(lambda stage: stage not in trained, ALL_STAGES)
        saved = sum(_saved_bytes_per_pixel(stage, activation_bytes) for stage in stages) * pixels
        largest = 16 * activation_bytes * pixels
        computes_frozen = "stem" not in recipe.trainable and not _caches_features(recipe)
    else:
        parameters = 3_600_000 * recipe.width**2 // 32**2
        # Each unit saves 4 tensors of the size of the first block's output: the outputs of convolutions and of ReLU.
        largest = 1024 * recipe.width * activation_bytes
        saved = 23 * largest
        computes_frozen = False
    backward = _TRANSIENT * batch * saved
    forward = _FORWARD * largest * max(inference_batch, batch if computes_frozen else 0)
    fixed = _PROCESS[device.type] + _DATA_COPIES * _IMAGE_BYTES * images + _COPIES * 4 * parameters
    return int(fixed + max(backward, forward))


def _saved_bytes_per_pixel(stage: Stage, activation_bytes: int) -> float:
    """Return the bytes that a stage of ResNet-18 saves for its gradients, per pixel of the upsampled image.

    Args:
        activation_bytes: Bytes per activation, 2 or 4.
    """
    match stage:
        case "stem":  # the image in float32, two tensors before and two after pooling, and int64 indices of pooling
            return 6 * 4 + (32 + 4) * activation_bytes + 4 * 8
        case "layer1":
            return 32 * activation_bytes
        case "layer2":
            return 20 * activation_bytes
        case "layer3":
            return 10 * activation_bytes
        case "layer4":
            return 5 * activation_bytes
        case "fc":
            return 0.1 * activation_bytes


def _caches_features(recipe: Recipe) -> bool:
    """Return whether a run computes the features of its frozen stages once and caches them."""
    frozen = recipe.network == "resnet18" and "stem" not in recipe.trainable
    return frozen and recipe.cache_features and not recipe.crop_padding


def feature_bytes(recipe: Recipe, train: int, evaluation: int) -> int:
    """Return the size of a run's cached features in bytes; 0 if it caches none.

    Args:
        train: Number of training images.
        evaluation: Number of images evaluated after every epoch.
    """
    if not _caches_features(recipe):
        return 0
    first = next(number for number, stage in enumerate(ALL_STAGES) if stage in recipe.trainable)
    channels, stride = ((64, 4), (64, 4), (128, 8), (256, 16), (512, 32))[first - 1]
    values = channels * ceil(recipe.image_size / stride) ** 2
    return 2 * values * (train * (2 if recipe.flip else 1) + evaluation)


def available_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Return the bytes available to a new process, or None if unknown.

    The limits are the machine's available memory and the control groups of this process.
    """
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        rooms = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        return None
    groups = list_groups("memory", proc, cgroups)
    limited = (_read_room(group.folder, *_MEMORY_FILES[group.version]) for group in groups)
    return min([*rooms, *(room for room in limited if room is not None)], default=None)


def resident_memory(process: int, proc: Path = PROC) -> int:
    """Return the anonymous resident memory (RssAnon) of a process in bytes; 0 if it cannot be read."""
    try:
        lines = (proc / str(process) / "status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def describe_peak_memory(device: torch.device) -> str:
    """Describe the peak memory of this process in GiB, and its peak GPU memory if `device` is a GPU."""
    kibibyte = 1 if sys.platform == "darwin" else 1024  # bytes per unit of ru_maxrss
    text = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kibibyte / 2**30:.2f} GiB"
    if device.type == "cuda":
        text += f", {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the GPU"
    return text


def _read_room(group: Path, limit: str, usage: str, cache: str) -> int | None:
    """Return the bytes left below the limit of a control group, or None without a limit.

    Inactive file cache counts as free, because the kernel drops it under memory pressure.
    """
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int((group / limit).read_text()) - int((group / usage).read_text()) + int(stat.get(cache, 0))
    except (OSError, ValueError):  # no such group, or the limit is "max"
        return None


def require(recipe: Recipe, device: torch.device, train: int, evaluation: int, freed: int = 0) -> None:
    """Refuse a run that does not fit into the machine.

    Args:
        device: The device of the run.
        train: Number of training images.
        evaluation: Number of images evaluated after every epoch.
        freed: Bytes of memory that will be released before the run starts.

    Raises:
        RecipeError: The run needs more memory than is available, or more disk space for its cached features.
    """
    needed = training_bytes(recipe, device, train)
    gpu = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    available = gpu if gpu is not None else available_memory()
    if available is not None and needed > available + freed:
        smaller = "image_size" if recipe.network == "resnet18" else "width"
        raise RecipeError(
            f"training would take about {needed / 1e9:.1f} GB of memory, and {(available + freed) / 1e9:.1f} GB are "
            f"available{' on the GPU' if gpu is not None else ''}; lower batch_size={recipe.batch_size} or "
            f"{smaller}={getattr(recipe, smaller)}"
        )
    features = feature_bytes(recipe, train, evaluation)
    if not features or (gpu is not None and 2 * features < gpu):
        return
    folder = features_folder()
    room = _find_features_room(folder)
    if features > room:
        raise RecipeError(
            f"the features of the frozen stages would take {features / 1e9:.1f} GB, and {max(0, room) / 1e9:.1f} GB "
            f"are free in {folder}; set cache_features=false to compute them in every epoch, or lower image_size"
        )


def _find_features_room(folder: Path) -> int:
    """Return the bytes that a run may write into the features folder, where it first deletes earlier features."""
    replaced = sum(file.stat().st_size for file in folder.glob("*.float16")) if folder.is_dir() else 0
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    return shutil.disk_usage(existing).free + replaced - SPARE_BYTES
