"""Batches of training images, augmented by one gather on the device.

Selecting, mirroring and shifting are all a choice of which pixel to read, so a batch costs a single indexing
operation on the uint8 data set: no per-image Python, no worker processes, no intermediate copies.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from training.recipes import Recipe


def batches(
    images: Tensor, labels: Tensor, recipe: Recipe, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled, augmented batches; the last one may be smaller.

    Args:
        images: uint8 [N, 32, 32, 3] on the device.
        labels: int64 [N] on the device.
        recipe: batch size, flip and crop padding.
        generator: on the CPU, so that every device trains on the same batches; decides everything random here.

    Yields:
        uint8 images [B, 3, 32, 32] in channels-last memory format, and int64 labels [B].
    """
    count = len(labels)
    order = torch.randperm(count, generator=generator)
    rows, columns = crops(count, recipe, generator)
    order, rows, columns = (tensor.to(images.device) for tensor in (order, rows, columns))
    for start in range(0, count, recipe.batch_size):
        batch = slice(start, start + recipe.batch_size)
        picked = order[batch]
        pixels = images[picked[:, None, None], rows[batch, :, None], columns[batch, None, :]]
        yield pixels.permute(0, 3, 1, 2), labels[picked]


def crops(count: int, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Source rows and columns of `count` augmented images.

    Returns:
        int64 [count, 32] each: pixel (i, j) of an augmented image is pixel (rows[i], columns[j]) of its source.
    """
    line = torch.arange(32).expand(count, 32)
    rows, columns = line, line
    if recipe.crop_padding:
        shifts = torch.randint(-recipe.crop_padding, recipe.crop_padding + 1, (2, count, 1), generator=generator)
        rows, columns = _reflect(line + shifts[0]), _reflect(line + shifts[1])
    if recipe.flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    return rows, columns


def _reflect(coordinates: Tensor) -> Tensor:
    """Reflect pixel coordinates beyond the border back into 0-31, without repeating the border pixel."""
    return 31 - (31 - coordinates.abs()).abs()
