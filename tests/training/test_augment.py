"""Test augmented batches against plain NumPy: order, flips, crops and combinations of images."""

from collections import Counter
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from training.augment import batches, combine
from training.recipes import Recipe, make_recipe

PLAIN = {"flip": False, "crop_padding": 0, "batch_size": 64}


def chosen(**fields: Any) -> Recipe:
    return make_recipe("resnet", PLAIN | fields)


def noise(count: int) -> Tensor:
    """Return random images, uint8 [N, 32, 32, 3]."""
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def epoch(count: int, recipe: Recipe, seed: int = 0, number: int = 1) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return all images [N, 32, 32, 3] and labels [N] of one epoch, in batch order."""
    drawn = list(batches(noise(count), recipe, torch.Generator().manual_seed(seed), number))
    return (
        torch.cat([batch for batch, _ in drawn]).permute(0, 2, 3, 1).numpy(),
        torch.cat([labels for _, labels in drawn]).numpy(),
    )


def test_without_augmentation_an_epoch_is_a_permutation_of_the_data() -> None:
    images, labels = epoch(200, chosen())
    assert not np.array_equal(labels, np.arange(200))
    np.testing.assert_array_equal(np.sort(labels), np.arange(200))
    np.testing.assert_array_equal(images, noise(200).numpy()[labels])


def test_batches_are_full_but_for_the_last_and_in_channels_last_uint8() -> None:
    drawn = [batch for batch, _ in batches(noise(150), chosen(), torch.Generator(), 1)]
    assert [tuple(batch.shape) for batch in drawn] == [(64, 3, 32, 32), (64, 3, 32, 32), (22, 3, 32, 32)]
    assert all(batch.dtype is torch.uint8 for batch in drawn)
    assert all(batch.is_contiguous(memory_format=torch.channels_last) for batch in drawn)


def test_flip_mirrors_about_half_of_the_images_and_no_label() -> None:
    images, labels = epoch(400, chosen(flip=True))
    sources = noise(400).numpy()[labels]
    mirrored = (images == sources[:, :, ::-1]).all(axis=(1, 2, 3))
    unchanged = (images == sources).all(axis=(1, 2, 3))
    assert (mirrored ^ unchanged).all()
    assert 160 < mirrored.sum() < 240  # 200 expected, plus or minus four standard deviations


def test_alternating_flips_mirror_each_image_in_every_second_epoch() -> None:
    mirrored = []
    for number in (1, 2, 3):
        images, labels = epoch(400, chosen(flip_alternates=True, flip=True), seed=number, number=number)
        sources = noise(400).numpy()
        by_source = np.empty_like(images)
        by_source[labels] = images
        mirrored.append((by_source == sources[:, :, ::-1]).all(axis=(1, 2, 3)))
        unchanged = (by_source == sources).all(axis=(1, 2, 3))
        assert (mirrored[-1] ^ unchanged).all()
    assert 160 < mirrored[0].sum() < 240  # 200 expected, plus or minus four standard deviations
    np.testing.assert_array_equal(mirrored[1], ~mirrored[0])
    np.testing.assert_array_equal(mirrored[2], mirrored[0])


@pytest.mark.parametrize(("fill", "mode"), [("reflection", "reflect"), ("zeros", "constant")])
@pytest.mark.parametrize(("padding", "flip", "count"), [(2, False, 400), (2, True, 400), (16, False, 30)])
def test_crops_are_those_of_numpy_pad_and_all_shifts_occur(
    padding: int, flip: bool, count: int, fill: str, mode: Literal["reflect", "constant"]
) -> None:
    images, labels = epoch(count, chosen(crop_padding=padding, flip=flip, crop_fill=fill))
    shifts: Counter[tuple[int, int]] = Counter()
    for image, source in zip(images, noise(count).numpy()[labels], strict=True):
        matches = set()
        for turned in (image, image[:, ::-1]) if flip else (image,):
            padded = np.pad(source, ((padding, padding), (padding, padding), (0, 0)), mode)
            windows = sliding_window_view(padded, (32, 32), axis=(0, 1))
            matches |= {tuple(place) for place in np.argwhere((windows == turned.transpose(2, 0, 1)).all((2, 3, 4)))}
        assert len(matches) == 1
        shifts.update(matches)
    rows, columns = ({shift[axis] for shift in shifts} for axis in (0, 1))
    if padding == 2:
        assert len(shifts) == 25
    else:
        assert max(rows) - min(rows) > 25
        assert max(columns) - min(columns) > 25


def test_the_same_seed_gives_the_same_batches_and_another_seed_others() -> None:
    augmented = chosen(flip=True, crop_padding=4)
    (images, labels), (same_images, same_labels) = epoch(100, augmented, seed=5), epoch(100, augmented, seed=5)
    np.testing.assert_array_equal(images, same_images)
    np.testing.assert_array_equal(labels, same_labels)
    assert not np.array_equal(labels, epoch(100, augmented, seed=6)[1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_a_blend_has_as_much_of_each_image_as_its_share_says(dtype: torch.dtype) -> None:
    batch = (noise(40).permute(0, 3, 1, 2) / (1 if dtype is torch.uint8 else 256)).to(dtype)
    blend, partners, share = combine(batch, chosen(mixup=0.5), torch.Generator().manual_seed(0))
    assert blend.dtype is dtype
    assert 0.05 < share < 0.95
    assert not torch.equal(partners, torch.arange(40))
    expected = share * batch.double() + (1 - share) * batch[partners].double()
    torch.testing.assert_close(blend.double(), expected, rtol=1e-3, atol=0.5001 if dtype is torch.uint8 else 1e-3)
    again, _, same = combine(batch, chosen(mixup=0.5), torch.Generator().manual_seed(0))
    assert torch.equal(again, blend)
    assert same == share


def test_shares_follow_the_beta_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([combine(torch.zeros(2, 1, 1, 1), chosen(mixup=0.2), generator)[2] for _ in range(2000)])
    assert shares.mean() == pytest.approx(0.5, abs=0.04)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.2 + 1)), rel=0.08)  # the variance of Beta(a, a), a = 0.2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_cutmix_replaces_one_rectangle_of_the_share_that_it_says(dtype: torch.dtype) -> None:
    own = torch.arange(40, dtype=dtype)
    batch = own[:, None, None, None].expand(40, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    generator, shares = torch.Generator().manual_seed(0), []
    for _ in range(200):
        combined, partners, share = combine(batch, chosen(cutmix=1.0), generator)
        assert combined.dtype is dtype
        one = int((partners != torch.arange(40)).nonzero()[0])
        replaced = combined[one, 0] != own[one]
        rows, columns = replaced.any(1).nonzero(), replaced.any(0).nonzero()
        if replaced.any():
            assert replaced[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
        assert share == 1 - replaced.double().mean()
        mask = replaced.expand(40, 3, 32, 32)
        assert torch.equal(combined, torch.where(mask, batch[partners], batch))
        shares.append(share)
    assert min(shares) < 0.3
    assert max(shares) > 0.9
    assert torch.equal(batch[:, 0, 0, 0], own)  # the batch itself is unchanged
