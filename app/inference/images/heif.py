"""Open AVIF and HEIC images. Use it only in a process that can be killed.

In: the bytes of a file.  Out: its kind, its declared size, an estimate of its cost, and an image of Pillow.

AVIF is decoded by Pillow. HEIC needs the package pi-heif, the extra `heif` of this project. Their decoders take the
size of a picture from the compressed data, which may differ from the size in the header. No header limits their cost,
so the kernel does, see `app.inference.decode_process`.
"""

import io
import re
from functools import cache
from importlib.util import find_spec
from itertools import islice
from typing import Literal

from PIL import Image, ImageFile, UnidentifiedImageError, features

from app.exceptions import UnsupportedImage
from app.inference.images import formats
from app.inference.images.cost import DecodeCost
from app.machine import MIB

Kind = Literal["AVIF", "HEIC"]

# The image spatial extents property: the size of the picture, of its parts and of previews.
_SIZES = re.compile(rb"ispe\0\0\0\0(.{4})(.{4})", re.DOTALL)
_MAX_SIZES = 1_000

_FILE_NS, _FILE_BYTES = 2e6, 16 * MIB
_PIXEL_NS: dict[Kind, float] = {"AVIF": 32.0, "HEIC": 40.0}
_BYTE_NS: dict[Kind, float] = {"AVIF": 75.0, "HEIC": 75.0}
_PIXEL_BYTES = 12  # the decoded picture, its RGB form, and Pillow's image


def kind(data: bytes) -> Kind | None:
    """Return the kind of a HEIF file, or None for other files and other kinds."""
    if data[4:8] != b"ftyp":
        return None
    match formats.recognize(data):
        case "AVIF":
            return "AVIF"
        case "HEIC":
            return "HEIC"
        case _:
            return None


@cache
def supported_kinds() -> tuple[Kind, ...]:
    """Return the kinds that the installed packages decode."""
    kinds: list[Kind] = ["AVIF"] if features.check("avif") else []
    return (*kinds, "HEIC") if find_spec("pi_heif") else tuple(kinds)


def require_support(kind: Kind) -> None:
    """Raise `UnsupportedImage` if no decoder for this kind is installed."""
    if kind not in supported_kinds():
        raise UnsupportedImage(f"{kind} images are not supported by this service; export the image as JPEG")


def declared_size(data: bytes) -> tuple[int, int]:
    """Return width and height of the largest picture that the header declares, or zeros if there is none."""
    found = islice(_SIZES.finditer(data), _MAX_SIZES)
    sizes = ((int.from_bytes(each[1]), int.from_bytes(each[2])) for each in found)
    return max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))


def estimate(kind: Kind, size: tuple[int, int], length: int) -> DecodeCost:
    """Estimate the cost of decoding a picture of a declared size from a file of `length` bytes."""
    pixels = size[0] * size[1]
    nanoseconds = _FILE_NS + pixels * _PIXEL_NS[kind] + length * _BYTE_NS[kind]
    return DecodeCost(nanoseconds / 1e6, pixels * _PIXEL_BYTES + _FILE_BYTES)


def open_image(data: bytes) -> ImageFile.ImageFile:
    """Open an image. Opening a HEIC or decoding an AVIF may take any time and memory that the process has.

    Raises:
        OSError, ValueError, SyntaxError: The file is damaged.
    """
    try:
        return _open_avif(data) if kind(data) == "AVIF" else _open_heic(data)
    except UnidentifiedImageError:
        raise OSError("the structure of the file is damaged") from None


def _open_avif(data: bytes) -> ImageFile.ImageFile:
    from PIL import AvifImagePlugin

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # more threads would take CPU time from others
    return Image.open(io.BytesIO(data), formats=["AVIF"])


def _open_heic(data: bytes) -> ImageFile.ImageFile:
    import pi_heif

    pi_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)
    return Image.open(io.BytesIO(data), formats=["HEIF"])
