"""Decode untrusted bytes to the pixels that a model takes.

    bytes -> (size limit) -> header -> (format, pixel limit, cost limit) -> decoded -> center square, 32x32 -> upright
          -> RGB

In: an encoded image.  Out: uint8 [3, 32, 32], or `UnsupportedImage`, `DamagedImage`, `TooLarge`, `CostlyImage`.
An image of exactly 32x32 is not resampled. An image is refused before it is decoded if decoding would take far more
time or memory than a photo takes. This applies to images with too many scans or parts, or with a compression that
Pillow decodes in Python.
"""

import io
import struct
import warnings
import zlib
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from app.exceptions import DamagedImage, TooLarge, UnsupportedImage
from app.inference.decode_cost import JPEG_SIDE, DecodeCost, estimate
from app.machine import MIB

SIZE = 32
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

MAX_COST = DecodeCost(2_000, 320 * MIB)
"""Largest estimated cost of an image, 2 s of CPU time and 320 MiB. Images above it are refused."""

# Pillow reads a file piece by piece in Python, and the directory of a TIFF value by value. These limits keep each of
# the two below about 50 ms. Files of up to _SMALL_BYTES cannot take longer.
_MAX_HEADER_PIECES = 5_000
_MAX_PIECES = 50_000
_MAX_TIFF_VALUES = 20_000
_SMALL_BYTES = 64 << 10
_BYTES_AS_THEY_ARE = (1, 2, 7)  # TIFF value types that Pillow keeps as one bytes object

# A compressed text or color profile of a PNG may decompress to a thousand times its size. Pillow limits each to 1 MiB.
PngImagePlugin.MAX_TEXT_MEMORY = 4 * MIB
_MAX_PROFILES = 4

# EXIF orientations and the transposition that turns the image upright. A JPEG segment holds 64 KiB. A crafted field may
# hold many numbers instead of one. Pillow takes 0.1 s for the numbers that four segments hold.
_MAX_EXIF_BYTES = 256 << 10
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# The client gets the error of a damaged file. Pillow's warnings about it would only fill the log.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# Exceptions that Pillow's decoders raise for damaged files. ValueError includes the struct-like errors of its plugins.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    NotImplementedError,
    struct.error,
    zlib.error,
)


class CostlyImage(Exception):
    """Error for an image that costs more to decode than the caller allows, but no more than `MAX_COST`.

    Args:
        cost: Estimated cost.
    """

    def __init__(self, cost: DecodeCost):
        super().__init__(cost)
        self.cost = cost


class _PieceLimitedFile(io.BytesIO):
    """An in-memory file with a limited number of calls to `read`."""

    left = _MAX_HEADER_PIECES

    def read(self, size: int | None = -1) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise _too_many_parts()
        return super().read(size)


def _too_many_parts() -> TooLarge:
    return TooLarge("the image consists of more parts than any encoder writes; save it again as a PNG or JPEG")


class EncodedImage:
    """An image whose header has been read and that is within all limits, but is not decoded yet.

    Args:
        data: The bytes of a JPEG, PNG, WebP, GIF (first frame), BMP or TIFF file.
        max_bytes: Largest size of the file.
        max_pixels: Largest product of width and height.

    Raises:
        UnsupportedImage: The bytes are not an image in one of these formats, or are a run-length encoded BMP.
        DamagedImage: The file is empty, or its header is damaged.
        TooLarge: The image exceeds one of the limits or `MAX_COST`, or has more parts than any encoder writes.
    """

    cost: DecodeCost
    """Estimated cost of decoding."""

    def __init__(self, data: bytes, max_bytes: int, max_pixels: int):
        if not data:
            raise DamagedImage("the image is empty; send the bytes of a file")
        if len(data) > max_bytes:
            raise TooLarge(f"the image has more than {max_bytes:,} bytes; send a smaller one")
        self._image = image = _open(data)
        if image.width * image.height > max_pixels:
            raise TooLarge(
                f"the image has {image.width}x{image.height} pixels, the limit is {max_pixels:,}; send a smaller one"
            )
        try:
            self.cost = estimate(image, data)
        except _DECODE_ERRORS as error:
            raise DamagedImage(f"the {image.format} image's header is damaged: {error}") from error
        _require_affordable(self.cost)

    def decode(self) -> NDArray[np.uint8]:
        """Decode the center square to 32x32 RGB, upright and over a white background. This can be called once.

        Returns:
            uint8 [3, 32, 32].

        Raises:
            DamagedImage: The file is truncated or cannot be decoded.
        """
        image, kind = self._image, self._image.format
        del self._image  # frees its memory before the next image needs as much
        try:
            return np.asarray(_square(image), np.uint8).transpose(2, 0, 1).copy()
        except _DECODE_ERRORS as error:
            raise DamagedImage(f"the {kind} image cannot be decoded: {error}") from error


def decode(data: bytes, max_bytes: int, max_pixels: int, max_cost: DecodeCost = MAX_COST) -> NDArray[np.uint8]:
    """Decode an image if its estimated cost is within `max_cost`.

    Args:
        data: The bytes of an image file, see `EncodedImage`.
        max_bytes: Largest size of the file.
        max_pixels: Largest product of width and height.
        max_cost: Largest estimated cost.

    Returns:
        uint8 [3, 32, 32].

    Raises:
        Problem: An error of `EncodedImage` or `EncodedImage.decode`.
        CostlyImage: The estimated cost exceeds `max_cost`.
    """
    image = EncodedImage(data, max_bytes, max_pixels)
    if image.cost.exceeds(max_cost):
        raise CostlyImage(image.cost)
    return image.decode()


def _require_affordable(cost: DecodeCost) -> None:
    if cost.cpu_ms > MAX_COST.cpu_ms:
        raise TooLarge(
            f"decoding the image would take about {cost.cpu_ms / 1000:.1f} s of CPU time, the limit is "
            f"{MAX_COST.cpu_ms / 1000:.0f} s; send a smaller image, or a JPEG that is not progressive"
        )
    if cost.memory_bytes > MAX_COST.memory_bytes:
        raise TooLarge(
            f"decoding the image would take about {cost.memory_bytes // MIB:,} MiB of memory, the limit is "
            f"{MAX_COST.memory_bytes // MIB:,} MiB; send a smaller image, or a JPEG that is not progressive"
        )


def _open(data: bytes) -> ImageFile.ImageFile:
    """Open an image and read only its header.

    Raises:
        UnsupportedImage: The format or its compression is not supported.
        DamagedImage: The header is damaged.
        TooLarge: The image has more parts than any encoder writes, or more pixels than Pillow allows.
    """
    file = io.BytesIO(data) if len(data) <= _SMALL_BYTES else _PieceLimitedFile(data)
    if data.startswith((b"II", b"MM")) and _tiff_values(data) > _MAX_TIFF_VALUES:
        raise _too_many_parts()
    if data.startswith(b"\x89PNG") and data.count(b"iCCP") > _MAX_PROFILES:
        raise _too_many_parts()
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise UnsupportedImage(
            f"the bytes are not a supported image; supported formats are {', '.join(FORMATS)}"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLarge(str(error)) from None
    except _DECODE_ERRORS as error:
        raise DamagedImage(f"the image's header is damaged: {error}") from error
    if isinstance(file, _PieceLimitedFile):
        file.left = _MAX_PIECES
    if any(tile.codec_name in Image.DECODERS for tile in image.tile):
        raise UnsupportedImage(f"{image.format} with this compression is not supported; save it again as a PNG")
    return image


def _tiff_values(data: bytes) -> int:
    """Return the number of values in the directory of a TIFF's first image. Pillow creates an object for each value."""
    order = "<" if data.startswith(b"II") else ">"
    start, count, entry = ("8xQ", "Q", "2xHQ8x") if data[2:3] == b"+" else ("4xL", "H", "2xHL4x")
    values = 0
    with suppress(struct.error, OverflowError):  # the directory ends where the file ends
        (place,) = struct.unpack_from(order + start, data)
        (entries,) = struct.unpack_from(order + count, data, place)
        place += struct.calcsize(order + count)
        for _ in range(entries):
            kind, number = struct.unpack_from(order + entry, data, place)
            values += 0 if kind in _BYTES_AS_THEY_ARE else number
            place += struct.calcsize(order + entry)
    return values


def _square(image: Image.Image) -> Image.Image:
    if isinstance(image, JpegImageFile):  # includes MPO, the format of many phones' JPEGs with a preview
        # The JPEG is decoded at the smallest DCT scale that leaves twice the required resolution.
        image.draft(None, (JPEG_SIDE, JPEG_SIDE))
    orientation = _orientation(image)
    image = _resamplable(image)
    if image.size != (SIZE, SIZE):
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    if image.mode in ("RGBA", "LA"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # `convert` would copy an RGB image


def _orientation(image: Image.Image) -> Any:
    """Return the EXIF orientation, which may be of any type. Returns None if EXIF data are missing or too large."""
    image.load()  # the EXIF data of a PNG may follow the pixels
    if any(len(image.info.get(kind, "")) > _MAX_EXIF_BYTES for kind in ("exif", "Raw profile type exif")):
        return None
    return image.getexif().get(ExifTags.Base.Orientation)


def _resamplable(image: Image.Image) -> Image.Image:
    """Convert an image to a mode with 8 bits per channel that can be interpolated. Transparency is kept.

    Raises:
        ValueError: The image has 32 bits per channel.
    """
    if image.mode in ("PA", "La", "RGBa") or "transparency" in image.info:
        return image.convert("RGBA")
    if image.mode == "1":
        return image.convert("L")
    if image.mode.startswith("I;16"):
        levels = np.asarray(image, np.uint16).astype(np.uint32)
        levels += 128
        levels //= 257  # in place, to save memory on large images
        return Image.fromarray(levels.astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32 bits per channel are not supported")
    return image if image.mode in ("L", "LA", "RGB", "RGBA", "CMYK") else image.convert("RGB")
