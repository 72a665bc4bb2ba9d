"""Explain a class by occlusion (Zeiler & Fergus 2014, arXiv:1311.2901): how much each region of an image speaks for it.

    image --occlude--> masked images --engine--> probabilities --importance_map--> numbers --draw_overlay--> PNG

A masked image hides one square window under the mean color of the image. The windows overlap, so that each cell of the
map is hidden by several of them. `benchmarks/explain.py` measures the time and checks the maps.
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
"""Side of a cell of the map in pixels, which is also the distance of two windows."""

DECIMALS = 4
"""Decimals of the numbers of a map in an answer."""

_WINDOW = 8  # side of a window in pixels
_OVERLAY = 128  # side of the overlay in pixels
_FOR, _AGAINST = (255, 96, 0), (0, 96, 255)  # colors of regions that speak for the class, and against it
_OPACITY = 0.8  # of the region that speaks most


def _make_windows() -> NDArray[np.bool_]:
    starts = range(
        CELL - _WINDOW, SIZE, CELL
    )  # windows reach over the border, so that it is hidden as often as the rest
    windows = np.zeros((len(starts) ** 2, SIZE, SIZE), bool)
    for window, (top, left) in zip(windows, ((top, left) for top in starts for left in starts), strict=True):
        window[max(top, 0) : top + _WINDOW, max(left, 0) : left + _WINDOW] = True
    return windows


_WINDOWS = _make_windows()
_CELLS = _WINDOWS[:, ::CELL, ::CELL].astype(np.float64)  # whether a window hides a cell, [windows, cells, cells]
_CELLS /= _CELLS.sum(0)
_LEAST = np.finfo(np.float64).tiny  # a probability of 0 has no logarithm

COUNT = 1 + len(_WINDOWS)
"""Number of images that `occlude` returns."""


def occlude(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an image, followed by its masked images.

    Args:
        image: uint8 [3, 32, 32].

    Returns:
        uint8 [COUNT, 3, 32, 32].
    """
    color = image.mean((1, 2)).round().astype(np.uint8)[:, None, None]
    return np.concatenate([image[None], np.where(_WINDOWS[:, None], color, image)])


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
        float64 [8, 8] in nats: how much the logarithm of the probability falls, in the mean over the windows that hide
        the cell. Negative where the probability rises.
    """
    logarithms = np.log(np.maximum(probabilities, _LEAST))
    return np.tensordot(logarithms[0] - logarithms[1:], _CELLS, 1)


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
