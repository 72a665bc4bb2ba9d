"""This module computes the features of a transfer network's frozen stages once and caches them.

Frozen stages give the same features in every epoch, so one computation is enough.

Input: a classifier whose first stages are frozen, and the images.
Output: float16 features, memory-mapped from a file in the cache folder ($CIFAR100_FEATURES, or
~/.cache/cifar100/features).

A later run with the same frozen stages and images reuses the file; a run with others replaces it. If the GPU has enough
memory, the features stay there without a file, because a GPU computes them faster than a disk writes them.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Generator, Iterator
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from training.augment import sample_augmentation
from training.evaluate import BATCH_SIZES
from training.networks import Classifier, TransferResNet18
from training.phase_report import PhaseReport, ProgressCounter
from training.recipes import Recipe
from training.resources import SPARE_BYTES, features_folder


class Features:
    """The features of a training split and of the split that is evaluated after every epoch.

    Args:
        values: float16 [views * train + M, H, W, C]: features of the training images, of their mirror images if `views`
            is 2, and of the M images to evaluate.
        train: Number of training images.
        views: 1, or 2 with mirrored images.
    """

    def __init__(self, values: Tensor, train: int, views: int):
        self._train = values[: views * train]
        self._count = train
        self.evaluation = values[views * train :]

    def batches(self, recipe: Recipe, generator: torch.Generator, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over one epoch of batches, in the same order as `augment.batches`.

        Yields:
            float16 features [B, C, H, W] in channels-last memory format, and the indices int64 [B] of their images.
        """
        augmentation = sample_augmentation(self._count, recipe, generator, epoch).to(self._train.device)
        rows = augmentation.order + self._count * augmentation.mirrored
        size = recipe.batch_size
        for indices, batch_rows in zip(augmentation.order.split(size), rows.split(size), strict=True):
            batch = self._train.index_select(0, batch_rows)
            yield batch.permute(0, 3, 1, 2), indices


def prepare(
    recipe: Recipe, classifier: Classifier, images: Tensor, evaluation: Tensor, dtype: torch.dtype
) -> Generator[PhaseReport, None, Features | None]:
    """Compute the features of a run, or load them from the cache.

    Args:
        images: uint8 [N, 32, 32, 3], the training split on the classifier's device.
        evaluation: uint8 [M, 32, 32, 3], the split that is evaluated after every epoch.
        dtype: Data type in which the frozen stages compute.

    Yields:
        Progress.

    Returns:
        The features. None if the recipe cannot train on features (no stage is frozen, images are shifted, or
        cache_features is false), or if the disk has no room for them.
    """
    network = classifier.network
    if not isinstance(network, TransferResNet18) or not network.frozen_stages:
        return None
    if recipe.crop_padding or not recipe.cache_features:
        return None
    flips = (False, True) if recipe.flip else (False,)
    views = len(flips)
    parts = [*((images, mirrored) for mirrored in flips), (evaluation, False)]
    total = sum(len(part) for part, _ in parts)

    def compute(batch: Tensor, mirrored: bool) -> Tensor:
        pixels = batch.flip(2) if mirrored else batch
        with torch.inference_mode(), torch.autocast(images.device.type, dtype, enabled=dtype is not torch.float32):
            features = network.forward_features(classifier.preprocess(pixels.permute(0, 3, 1, 2)))
            return features.permute(0, 2, 3, 1).half()

    def compute_all() -> Iterator[Tensor]:
        for part, mirrored in parts:
            for batch in part.split(BATCH_SIZES[images.device.type]):
                yield compute(batch, mirrored)

    shape = (total, *compute(images[:1], False).shape[1:])
    size = 2 * prod(shape)
    description = f"{size / 1e9:.1f} GB of features of the frozen stages"
    values: Tensor | None
    if images.is_cuda and 2 * size < torch.cuda.mem_get_info(images.device)[0]:
        values = yield from _compute_in_memory(description, compute_all(), images.new_empty(shape, dtype=torch.float16))
    else:
        file = features_folder() / f"{_make_cache_key(recipe, classifier, network, parts, dtype)}.float16"
        values = yield from _load_or_compute_file(description, compute_all(), shape, file)
    return None if values is None else Features(values, len(images), views)


def _compute_in_memory(
    description: str, computed: Iterator[Tensor], values: Tensor
) -> Generator[PhaseReport, None, Tensor]:
    """Fill a GPU tensor with features and yield progress."""
    message = f"computing {description}, which stay in GPU memory"
    yield (start := PhaseReport("features", message, images=len(values)))
    progress = ProgressCounter(start)
    for features in computed:
        values[progress.done : progress.done + len(features)] = features
        if report := progress.advance(len(features)):
            yield report
    return values


def _load_or_compute_file(
    description: str, computed: Iterator[Tensor], shape: tuple[int, ...], file: Path
) -> Generator[PhaseReport, None, Tensor | None]:
    """Memory-map the file of features and yield progress. If the file does not exist, compute and write it first.

    Returns:
        The mapped features, float16 of the given shape, or None if the disk is full or the file cannot be written.
    """
    total, folder = shape[0], file.parent
    with suppress(OSError), file.open("rb") as cached:
        values = _memory_map(cached, shape)
        yield PhaseReport("features", f"loading {description} from {file}", total, total)
        return values

    partial: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _delete_other_files(folder)
        if 2 * prod(shape) + SPARE_BYTES > shutil.disk_usage(folder).free:
            message = f"{folder} has no room for {description}; computing them in every epoch instead"
            yield PhaseReport("features", message)
            return None
        message = f"computing {description} into {file}"
        yield (start := PhaseReport("features", message, images=total))
        progress = ProgressCounter(start)
        with tempfile.NamedTemporaryFile("w+b", dir=folder, suffix=".partial", delete=False) as output:
            partial = Path(output.name)
            fcntl.flock(output, fcntl.LOCK_EX)
            for features in computed:
                output.write(features.cpu().contiguous().numpy().data)
                if report := progress.advance(len(features)):
                    yield report
            output.flush()
            os.fsync(output.fileno())
            values = _memory_map(output, shape)
            partial.replace(file)
    except OSError as error:
        reason = f"{partial or folder} cannot be written ({error.strerror})"
        yield PhaseReport("features", f"{reason}; computing the features in every epoch instead")
        return None
    finally:
        if partial:
            partial.unlink(missing_ok=True)
    return values


def _memory_map(file: IO[bytes], shape: tuple[int, ...]) -> Tensor:
    """Memory-map an open file of float16 values. The mapping stays valid if the file is deleted.

    Raises:
        OSError: The file size does not match the shape.
    """
    if os.fstat(file.fileno()).st_size != 2 * prod(shape):
        raise OSError(errno.EIO, "the file is incomplete", file.name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)  # read-only is fine
        return torch.from_numpy(np.memmap(file, np.float16, "r", shape=shape))


def _delete_other_files(folder: Path) -> None:
    """Delete the feature files of other runs, because one file of this size is enough."""
    for file in folder.glob("*.float16"):
        file.unlink(missing_ok=True)
    for partial in folder.glob("*.partial"):
        with suppress(OSError), partial.open("rb") as unfinished:  # a running writer holds the lock
            fcntl.flock(unfinished, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()


def _make_cache_key(
    recipe: Recipe,
    classifier: Classifier,
    network: TransferResNet18,
    parts: list[tuple[Tensor, bool]],
    dtype: torch.dtype,
) -> str:
    """Hash everything that the features depend on into a cache key of 16 hexadecimal digits."""
    digest = hashlib.sha256(f"{recipe.image_size} {dtype} {network.frozen_stages}".encode())
    weights = [
        value
        for stage in network.frozen_stages
        for layer in network.get_layers(stage)
        for value in layer.state_dict().values()
    ]
    for tensor in (classifier.mean, classifier.std, *weights, *(part for part, _ in parts)):
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]
