"""Explain a class by occlusion: how much each region of an image speaks for it.

    image --occlude--> masked images --engine--> probabilities --importance_map--> numbers --draw_overlay--> PNG

A masked image hides a part under the mean color of the image (Zeiler & Fergus 2014, arXiv:1311.2901). Each of 64 cells
is hidden alone, and together with its neighbors in a block, because a network may need only one of two neighbors. A
linear model of the fall of the logarithm of the probability gives each cell its share (Ribeiro et al. 2016,
arXiv:1602.04938). `benchmarks/explain.py` measures the time, and `research/explanations.py` checks the maps.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.exceptions import BadRequest
from app.inference.images.encoded import SIZE
from training.store import ModelCard
from training.text import quote, suggest

CELL = 4
"""Side of a cell of the map in pixels."""

DECIMALS = 4
"""Decimals of the numbers of a map in an answer."""

_BLOCK = 2 * CELL  # side of a block of cells in pixels
_PENALTY = 0.1  # of the ridge regression
_OVERLAY = 128  # side of the overlay in pixels
_FOR, _AGAINST = (255, 96, 0), (0, 96, 255)  # colors of regions that speak for the class, and against it
_OPACITY = 0.8  # of the region that speaks most


def _make_squares(side: int) -> NDArray[np.bool_]:
    """Return masks that each hide one square, and together the whole image, bool [masks, SIZE, SIZE]."""
    count = SIZE // side
    hidden = np.eye(count**2, dtype=bool).reshape(-1, count, count)
    return hidden.repeat(side, 1).repeat(side, 2)


def _make_masks() -> NDArray[np.bool_]:
    # A block at the border continues at the opposite one, so that every cell is in one block.
    return np.concatenate([_make_squares(CELL), np.roll(_make_squares(_BLOCK), (CELL, CELL), (1, 2))])


def _make_solver(masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the matrix that solves the ridge regression of falls on hidden cells, float64 [cells, masks]."""
    hidden = masks[:, ::CELL, ::CELL].reshape(len(masks), -1).astype(np.float64)
    return np.linalg.solve(hidden.T @ hidden + _PENALTY * np.eye(hidden.shape[1]), hidden.T).astype(np.float64)


_MASKS = _make_masks()
_SOLVER = _make_solver(_MASKS)
_LEAST = np.finfo(np.float64).tiny  # a probability of 0 has no logarithm

COUNT = 1 + len(_MASKS)
"""Number of images that `occlude` returns."""


def occlude(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an image, followed by its masked images.

    Args:
        image: uint8 [3, 32, 32].

    Returns:
        uint8 [COUNT, 3, 32, 32].
    """
    color = image.mean((1, 2)).round().astype(np.uint8)[:, None, None]
    return np.concatenate([image[None], np.where(_MASKS[:, None], color, image)])


def find_class(label: str, card: ModelCard) -> int:
    """Return the id of a class.

    Raises:
        BadRequest: The model has no such class.
    """
    if label not in card.classes:
        raise BadRequest(f"{card.name} has no class {quote(label)}; {suggest(label, card.classes, 'classes')}")
    return card.classes.index(label)


def importance_map(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute how much each cell speaks for a class.

    Args:
        probabilities: Probability of the class for each image of `occlude`, float64 [COUNT].

    Returns:
        float64 [8, 8] in nats: the share of each cell in the fall of the logarithm of the probability where it is
        hidden. Negative where the probability rises.
    """
    logarithms = np.log(np.maximum(probabilities, _LEAST))
    importance: NDArray[np.float64] = _SOLVER @ (logarithms[0] - logarithms[1:])
    return importance.reshape(SIZE // CELL, SIZE // CELL)


def draw_overlay(importance: NDArray[np.float64]) -> bytes:
    """Draw a map as a transparent PNG of 128x128 pixels, to be laid over the square that the network sees.

    Regions that speak for the class are orange, those that speak against it are blue. The region that speaks most has
    the highest opacity.

    Args:
        importance: float64 [8, 8] from `importance_map`.
    """
    smooth = np.asarray(
        Image.fromarray(importance.astype(np.float32)).resize((_OVERLAY, _OVERLAY), Image.Resampling.BICUBIC)
    )
    strength = smooth / max(float(np.abs(importance).max()), _LEAST)
    pixels = np.empty((_OVERLAY, _OVERLAY, 4), np.uint8)
    pixels[..., :3] = np.where(strength[..., None] > 0, _FOR, _AGAINST)
    pixels[..., 3] = (255 * _OPACITY * np.abs(strength).clip(0, 1)).round()
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", compress_level=1)
    return content.getvalue()
