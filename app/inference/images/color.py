"""Convert pixels to sRGB, the color space of the images that the models were trained on.

In: a small image of 8 bits per channel and the color space of its file: an ICC profile or a `ColorSpace`.
Out: RGB or RGBA in sRGB.

The pixels are converted after they are scaled down, because that costs a thousandth. They are thus averaged in the
encoding of their file, as the pixels of an sRGB file are. A profile that is damaged, or that does not fit the image, is
ignored. Profiles are untrusted, so this module limits their size and the kinds of their tables.
"""

import io
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

MAX_PROFILE_BYTES = 4 << 20
"""Largest size of an ICC profile. Larger ones are ignored. Profiles of printers have up to 3 MB."""

_MAX_TAGS = 100
_MAX_VERSION = 4
_MAX_TRANSFORMS = 32
_PROFILE_NS, _PROFILE_BYTE_NS = 3e6, 6.0  # a matrix profile takes 2.5 ms, a table of 4 MB takes 20 ms
_CLASSES = frozenset((b"mntr", b"scnr", b"prtr", b"spac"))
_SPACES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}
# Modes of images by the mode of the profiles that fit them.
_FITTING = {"RGB": ("RGB", "RGBA", "YCbCr", "L", "LA"), "L": ("L", "LA"), "CMYK": ("CMYK",), "": ()}
# Tables of arbitrary length, which LittleCMS evaluates element by element for each pixel.
_UNBOUNDED_TAGS = (b"D2B", b"B2D")

Curve = tuple[float, float, float, float, float]
"""Parameters g, a, b, c, d of a tone curve: linear light is (a x + b)^g from x = d on, and c x below."""

SRGB_CURVE: Curve = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
_BT709_CURVE: Curve = (1 / 0.45, 1 / 1.099, 0.099 / 1.099, 1 / 4.5, 0.081)
_D65 = (0.3127, 0.3290)

# Code points of ITU-T H.273. The transfers of high dynamic range, 16 and 18, have no place in 8-bit sRGB.
_PRIMARIES = {
    1: (*_D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06),
    5: (*_D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (*_D65, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),
    9: (*_D65, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046),
    12: (*_D65, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
}
_TRANSFERS: dict[int, Curve] = {
    **dict.fromkeys((1, 6, 14, 15), _BT709_CURVE),
    4: (2.2, 1, 0, 0, 0),
    5: (2.8, 1, 0, 0, 0),
    8: (1, 1, 0, 0, 0),
    13: SRGB_CURVE,
}
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


@dataclass(frozen=True)
class ColorSpace:
    """An RGB color space: a tone curve, and x and y of white, red, green and blue."""

    curve: Curve
    primaries: tuple[float, ...]


SRGB = ColorSpace(SRGB_CURVE, _PRIMARIES[1])

Source = bytes | ColorSpace | None
"""The color space of a file: an ICC profile, primaries with a curve, or None for sRGB."""

Transform = Callable[[Image.Image], Image.Image]


def from_gamma(exponent: float | None, primaries: tuple[float, ...] | None) -> ColorSpace | None:
    """Return the color space of the chunks gAMA and cHRM of a PNG, or None if it is that of sRGB.

    Encoders write the exponent 0.45455 for the curve of sRGB. With other primaries it is taken literally.
    """
    exponent = exponent if exponent and 0.1 <= exponent <= 10 else None
    has_srgb_primaries = primaries is None or _is_close(primaries, SRGB.primaries, 0.002)
    if has_srgb_primaries and (exponent is None or abs(exponent - 0.45455) < 0.02):
        return None
    curve = SRGB_CURVE if exponent is None else (1 / exponent, 1, 0, 0, 0)
    return ColorSpace(curve, primaries or SRGB.primaries)


def cicp(content: bytes) -> ColorSpace | None:
    """Return the color space of a cICP chunk, or None if it has code points of another kind than 8-bit RGB."""
    if len(content) != 4 or content[2:] != b"\0\1":  # RGB of the full range
        return None
    primaries, curve = _PRIMARIES.get(content[0]), _TRANSFERS.get(content[1])
    return ColorSpace(curve, primaries) if primaries and curve else None


def to_srgb(image: Image.Image, source: Source) -> Image.Image:
    """Convert an image of the mode L, LA, RGB, RGBA, CMYK, YCbCr or LAB to RGB or RGBA.

    Args:
        image: Image of any size, best a small one.
        source: Color space of its pixels.
    """
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    if isinstance(source, bytes) and (transform := _find_transform(source, image.mode)):
        rgb = transform(image)
    else:
        rgb = image if image.mode == "RGB" else image.convert("RGB")  # `convert` would copy an RGB image
        if isinstance(source, ColorSpace):
            rgb = _convert(rgb, source)
    if alpha:
        rgb.putalpha(alpha)
    return rgb


def profile_ns(source: Source) -> float:
    """Estimate the CPU time of preparing a color space, in nanoseconds. A recent profile costs nothing."""
    if not isinstance(source, bytes) or len(source) > MAX_PROFILE_BYTES or _transforms.has(sha256(source).digest()):
        return 0.0
    return _PROFILE_NS + _PROFILE_BYTE_NS * len(source)


class _Transforms:
    """The transforms of the profiles that were used last, by digest. None stands for a profile without effect."""

    def __init__(self) -> None:
        self._kept = OrderedDict[bytes, tuple[str, Transform | None]]()
        self._lock = threading.Lock()

    def has(self, digest: bytes) -> bool:
        return digest in self._kept

    def find(self, profile: bytes) -> tuple[str, Transform | None]:
        """Return the mode that the profile of this content converts, and its transform."""
        digest = sha256(profile).digest()
        with self._lock:
            if found := self._kept.get(digest):
                self._kept.move_to_end(digest)
                return found
        made = _make_transform(profile)
        with self._lock:
            self._kept[digest] = made
            if len(self._kept) > _MAX_TRANSFORMS:
                self._kept.popitem(last=False)
        return made


_transforms = _Transforms()


def _find_transform(profile: bytes, mode: str) -> Transform | None:
    """Return the transform of a profile, or None if it is unusable, is that of sRGB, or is for other images."""
    if len(profile) > MAX_PROFILE_BYTES:
        return None
    space, transform = _transforms.find(profile)
    return transform if mode in _FITTING[space] else None


def _make_transform(profile: bytes) -> tuple[str, Transform | None]:
    mode = _profile_mode(profile)
    if not mode:
        return "", None
    # A table for all colors takes 25 ms to make for CMYK, and 0.2 ms less for each image than no table.
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
    flags |= ImageCms.Flags.NOOPTIMIZE if mode == "CMYK" else ImageCms.Flags.NONE
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        convert = ImageCms.ImageCmsTransform(
            opened, _srgb_profile(), mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC, flags=flags
        )
        probe = _probe(mode)
        colors = _apply(convert, mode, probe)
    except (OSError, ValueError, ImageCms.PyCMSError, ImportError):  # ImportError: Pillow without LittleCMS
        return mode, None
    change = np.abs(np.asarray(colors, np.int16) - np.asarray(probe.convert("RGB"), np.int16)).max()
    return mode, None if change <= 1 else lambda image: _apply(convert, mode, image)


def _apply(convert: ImageCms.ImageCmsTransform, mode: str, image: Image.Image) -> Image.Image:
    image = image if image.mode == mode else image.convert(mode)
    rgb = Image.new("RGB", image.size)
    convert.transform.apply(image.getim(), rgb.getim())
    return rgb


@lru_cache(1)
def _srgb_profile() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _probe(mode: str) -> Image.Image:
    """Return an image of colors all over the space. A profile that does not change them has no effect."""
    steps = np.arange(0, 256, 51).astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    return Image.fromarray(grid).convert(mode)


def _profile_mode(profile: bytes) -> str | None:
    """Return the mode of the images that an ICC profile describes, or None if it is damaged or of another kind."""
    if len(profile) < 132 or profile[36:40] != b"acsp" or profile[8] > _MAX_VERSION or profile[12:16] not in _CLASSES:
        return None
    (count,) = struct.unpack_from(">L", profile, 128)
    tags = [profile[132 + 12 * number : 136 + 12 * number] for number in range(min(count, _MAX_TAGS + 1))]
    if count > _MAX_TAGS or any(tag.startswith(_UNBOUNDED_TAGS) for tag in tags):
        return None
    return _SPACES.get(profile[16:20])


def _convert(image: Image.Image, space: ColorSpace) -> Image.Image:
    matrix = _matrix_to_srgb(space.primaries)
    if matrix is None:
        return image
    pixels = np.asarray(image, np.float32) / np.float32(255)
    light = _linear(pixels, space.curve) @ matrix.T
    return Image.fromarray(np.rint(_encode(light) * 255).astype(np.uint8))


def _linear(values: NDArray[np.float32], curve: Curve) -> NDArray[np.float32]:
    g, a, b, c, d = curve
    return np.where(values < d, c * values, (a * values + b) ** g)


def _encode(light: NDArray[np.float32]) -> NDArray[np.float32]:
    """Encode linear light with the curve of sRGB. Colors outside of sRGB are clipped."""
    g, a, b, c, d = SRGB_CURVE
    light = np.clip(light, 0, 1)
    return np.where(light < c * d, light / c, (light ** (1 / g) - b) / a)


def _matrix_to_srgb(primaries: tuple[float, ...]) -> NDArray[np.float32] | None:
    """Return the matrix from linear RGB of these primaries to linear sRGB, or None if they span no space."""
    try:
        with np.errstate(all="raise"):
            srgb = np.linalg.inv(_to_xyz(SRGB.primaries))
            matrix = srgb @ _adaptation(primaries[:2], SRGB.primaries[:2]) @ _to_xyz(primaries)
    except (np.linalg.LinAlgError, FloatingPointError, ZeroDivisionError):
        return None
    return matrix.astype(np.float32) if np.abs(matrix).max() < 100 else None


def _to_xyz(primaries: tuple[float, ...]) -> NDArray[np.float64]:
    white, *colors = (_xyz(*primaries[n : n + 2]) for n in (0, 2, 4, 6))
    columns = np.array(colors).T
    matrix: NDArray[np.float64] = columns * np.linalg.solve(columns, white)
    return matrix


def _xyz(x: float, y: float) -> NDArray[np.float64]:
    return np.array([x / y, 1.0, (1 - x - y) / y])


def _adaptation(white: tuple[float, ...], target: tuple[float, ...]) -> NDArray[np.float64]:
    """Return the Bradford matrix that takes one white point to another."""
    scale = (_BRADFORD @ _xyz(*target)) / (_BRADFORD @ _xyz(*white))
    matrix: NDArray[np.float64] = np.linalg.inv(_BRADFORD) @ np.diag(scale) @ _BRADFORD
    return matrix


def _is_close(values: tuple[float, ...], others: tuple[float, ...], tolerance: float) -> bool:
    return all(abs(value - other) < tolerance for value, other in zip(values, others, strict=True))
