"""Batches of training images, augmented by one gather on the device.

Selecting, mirroring and shifting are all a choice of which pixel to read, so a batch costs a single indexing
operation on the uint8 data set: no per-image Python, no worker processes, no intermediate copies.
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
class Draw:
    """Everything random about one epoch's images.

    Attributes:
        order: int64 [N], a permutation: which source image comes at each place.
        mirrored: bool [N], whether the image at each place is mirrored.
        shifts: int64 [2, N], rows and columns by which it is shifted.
    """

    order: Tensor
    mirrored: Tensor
    shifts: Tensor

    def to(self, device: torch.device) -> Self:
        return replace(self, **{name: drawn.to(device, non_blocking=True) for name, drawn in vars(self).items()})


def draw(count: int, recipe: Recipe, generator: torch.Generator, epoch: int) -> Draw:
    """Draw one epoch of `count` images.

    Args:
        recipe: flip and crop padding.
        generator: on the CPU, so that every device trains on the same batches.
        epoch: counted from 1; with `flip_alternates` it decides which half of the images is mirrored
            (Jordan 2024, arXiv:2404.00498).
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
    return Draw(order, mirrored, shifts)


def batches(images: Tensor, recipe: Recipe, generator: torch.Generator, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled, augmented batches; the last one may be smaller.

    Args:
        images: uint8 [N, 32, 32, 3] on the device.
        recipe: batch size, flip, crop padding and how it is filled.
        generator: see `draw`.
        epoch: see `draw`.

    Yields:
        uint8 images [B, 3, 32, 32] in channels-last memory format, and int64 [B]: which of the N images they are.
    """
    drawn = draw(len(images), recipe, generator, epoch).to(images.device)
    rows, columns = source_pixels(drawn)
    rows_inside, columns_inside = (_is_inside(coordinates) for coordinates in (rows, columns))
    rows, columns = _reflect(rows), _reflect(columns)
    for start in range(0, len(images), recipe.batch_size):
        batch = slice(start, start + recipe.batch_size)
        picked = drawn.order[batch]
        pixels = images[picked[:, None, None], rows[batch, :, None], columns[batch, None, :]]
        if recipe.crop_fill == "zeros":
            pixels *= (rows_inside[batch, :, None] & columns_inside[batch, None, :])[..., None]
        yield pixels.permute(0, 3, 1, 2), picked


def combine(batch: Tensor, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Combine a batch with itself in another order, all of it by one share drawn from Beta(s, s).

    `mixup=s` blends every pixel (Zhang et al. 2018, arXiv:1710.09412), `cutmix=s` replaces a rectangle of that share of
    the image, as far as it lies within (Yun et al. 2019, arXiv:1905.04899).

    Args:
        batch: images or features [B, C, H, W].
        recipe: with either of the two.
        generator: see `draw`.

    Returns:
        The combination, of the same type as the batch; int64 [B], each one's partner in the batch; and the share of the
        batch itself in the combination, 0-1, its partners have the rest.
    """
    random = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
    strength = recipe.mixup or recipe.cutmix
    share = float(random.beta(strength, strength))
    partners = torch.randperm(len(batch), generator=generator).to(batch.device, non_blocking=True)
    if recipe.mixup:
        blend = torch.lerp(batch[partners].float(), batch.float(), share)
        return (blend if batch.is_floating_point() else blend.round()).to(batch.dtype), partners, share
    rows, columns = (_part(length, math.sqrt(1 - share), random) for length in batch.shape[2:])
    combined = batch.clone()
    combined[:, :, rows, columns] = batch[:, :, rows, columns][partners]
    replaced = combined[0, 0, rows, columns].numel() / combined[0, 0].numel()
    return combined, partners, 1 - replaced


def _part(length: int, share: float, random: np.random.Generator) -> slice:
    """A part of a side of this length, around a random place, cut off where it would reach beyond."""
    centre, reach = random.integers(length), round(length * share) / 2
    return slice(max(0, math.ceil(centre - reach)), min(length, math.ceil(centre + reach)))


def source_pixels(drawn: Draw) -> tuple[Tensor, Tensor]:
    """Source rows and columns of augmented images.

    Returns:
        int64 [N, 32] each: pixel (i, j) of an augmented image is pixel (rows[i], columns[j]) of its source, or lies
        outside it, where a coordinate is not within 0-31.
    """
    rows, columns = (torch.arange(32, device=shift.device) + shift[:, None] for shift in drawn.shifts)
    return rows, torch.where(drawn.mirrored[:, None], columns.flip(1), columns)


def _is_inside(coordinates: Tensor) -> Tensor:
    return (coordinates >= 0) & (coordinates < 32)


def _reflect(coordinates: Tensor) -> Tensor:
    """Reflect pixel coordinates beyond the border back into 0-31, without repeating the border pixel."""
    return 31 - (31 - coordinates.abs()).abs()
