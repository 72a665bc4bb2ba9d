"""This module draws batches of training images and augments each batch by one gather on the device.

Selection, mirroring and shifting all determine which pixel to read. A batch therefore costs a single indexing operation
on the uint8 data set, without per-image Python, worker processes or intermediate copies.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from training.recipes import Recipe


@dataclass(frozen=True)
class Augmentation:
    """The random choices for the images of one epoch.

    Attributes:
        order: int64 [N], a permutation: index of the source image at each position.
        mirrored: bool [N], true if the image at the position is mirrored.
        shifts: int64 [2, N], shift of the image at the position, in rows and columns.
    """

    order: Tensor
    mirrored: Tensor
    shifts: Tensor

    def to(self, device: torch.device) -> Self:
        """Return a copy on a device. The copy is asynchronous if possible."""
        return replace(self, **{name: values.to(device, non_blocking=True) for name, values in vars(self).items()})


def sample_augmentation(count: int, recipe: Recipe, generator: torch.Generator, epoch: int) -> Augmentation:
    """Draw the random choices for one epoch of `count` images.

    Args:
        count: Number of images, N.
        recipe: Recipe that sets flip and crop padding.
        generator: Generator on the CPU, so that every device trains on the same batches.
        epoch: Number of the epoch, counted from 1. With `flip_alternates` it determines which half of the images is
            mirrored (Jordan 2024, arXiv:2404.00498).
    """
    order = torch.randperm(count, generator=generator)
    shifts, mirrored = torch.zeros(2, count, dtype=torch.int64), torch.zeros(count, dtype=torch.bool)
    if recipe.crop_padding:
        shifts = torch.randint(-recipe.crop_padding, recipe.crop_padding + 1, (2, count), generator=generator)
    if recipe.flip_alternates:
        in_odd_epochs = torch.rand(count, generator=torch.Generator().manual_seed(recipe.seed)) < 0.5
        mirrored = in_odd_epochs[order] == (epoch % 2 == 1)
    elif recipe.flip:
        mirrored = torch.rand(count, generator=generator) < 0.5
    return Augmentation(order, mirrored, shifts)


def batches(images: Tensor, recipe: Recipe, generator: torch.Generator, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over one epoch of shuffled, augmented batches. The last batch may be smaller.

    Args:
        images: uint8 [N, 32, 32, 3] on the device.
        recipe: Recipe that sets batch size, flip, crop padding and crop fill.
        generator: Generator on the CPU, see `sample_augmentation`.
        epoch: Number of the epoch, see `sample_augmentation`.

    Yields:
        uint8 images [B, 3, 32, 32] in channels-last memory format, and their indices among the N images, int64 [B].
    """
    augmentation = sample_augmentation(len(images), recipe, generator, epoch).to(images.device)
    rows, columns = compute_source_pixels(augmentation)
    rows_inside, columns_inside = (_is_inside(coordinates) for coordinates in (rows, columns))
    rows, columns = _reflect(rows), _reflect(columns)
    for start in range(0, len(images), recipe.batch_size):
        batch = slice(start, start + recipe.batch_size)
        indices = augmentation.order[batch]
        pixels = images[indices[:, None, None], rows[batch, :, None], columns[batch, None, :]]
        if recipe.crop_fill == "zeros":
            pixels *= (rows_inside[batch, :, None] & columns_inside[batch, None, :])[..., None]
        yield pixels.permute(0, 3, 1, 2), indices


def combine(batch: Tensor, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Combine a batch with a permutation of itself, by mixup or CutMix.

    One share per batch is drawn from Beta(s, s). `mixup=s` blends every pixel by this share (Zhang et al. 2018,
    arXiv:1710.09412). `cutmix=s` replaces a rectangle of area 1 - share, as a fraction of the image (Yun et al.
    2019, arXiv:1905.04899). The rectangle is clipped at the border of the image.

    Args:
        batch: Images or features [B, C, H, W].
        recipe: Recipe with mixup or cutmix greater than 0.
        generator: Generator on the CPU, see `sample_augmentation`.

    Returns:
        The combined batch in the dtype of `batch`; the index of each image's partner in the batch, int64 [B]; and the
        share of the batch itself in the combination, 0-1. The partners have the rest.
    """
    random = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
    strength = recipe.mixup or recipe.cutmix
    share = float(random.beta(strength, strength))
    partners = torch.randperm(len(batch), generator=generator).to(batch.device, non_blocking=True)
    if recipe.mixup:
        blend = torch.lerp(batch[partners].float(), batch.float(), share)
        return (blend if batch.is_floating_point() else blend.round()).to(batch.dtype), partners, share
    rows, columns = (_choose_interval(length, math.sqrt(1 - share), random) for length in batch.shape[2:])
    combined = batch.clone()
    combined[:, :, rows, columns] = batch[:, :, rows, columns][partners]
    replaced = combined[0, 0, rows, columns].numel() / combined[0, 0].numel()
    return combined, partners, 1 - replaced


def _choose_interval(length: int, share: float, random: np.random.Generator) -> slice:
    """Choose a random part of a side: `share` of its length around a random center, clipped at both ends."""
    center, radius = random.integers(length), round(length * share) / 2
    return slice(max(0, math.ceil(center - radius)), min(length, math.ceil(center + radius)))


def compute_source_pixels(augmentation: Augmentation) -> tuple[Tensor, Tensor]:
    """Compute the source rows and columns of augmented images.

    Returns:
        rows and columns, int64 [N, 32] each. Pixel (i, j) of an augmented image is pixel (rows[i], columns[j]) of its
        source image. A coordinate outside 0-31 lies outside the source image.
    """
    rows, columns = (torch.arange(32, device=shift.device) + shift[:, None] for shift in augmentation.shifts)
    return rows, torch.where(augmentation.mirrored[:, None], columns.flip(1), columns)


def _is_inside(coordinates: Tensor) -> Tensor:
    return (coordinates >= 0) & (coordinates < 32)


def _reflect(coordinates: Tensor) -> Tensor:
    """Reflect pixel coordinates beyond the border back into 0-31, without repeating the border pixel."""
    return 31 - (31 - coordinates.abs()).abs()
