"""Untrusted bytes to the pixels a model takes.

    bytes -> (size limit) -> header -> (format, pixel limit) -> decoded -> centre square, 32x32 -> upright -> RGB

In: an encoded image.  Out: uint8 [3, 32, 32], or `UnsupportedImage`, `DamagedImage`, `TooLarge`.
An image of exactly 32x32 is not resampled. What would cost far more time or memory than its bytes and pixels explain is
refused: endless scans or parts, and what Pillow decodes in Python.
"""

import io
import re
import struct
import threading
import warnings
import zlib
from contextlib import nullcontext, suppress
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from app.errors import DamagedImage, TooLarge, UnsupportedImage

SIZE = 32
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# Decoding takes up to 16 bytes per pixel, so large images are decoded one at a time.
_LARGE_PIXELS = 10_000_000
_one_large = threading.Lock()

# A JPEG decoder goes through all blocks of pixels once for each scan, of which an empty one takes ten bytes. Encoders
# write a few dozen; in ten million bytes of anything else, such as an attached video, 150 seem to be by chance.
_SCAN = re.compile(rb"\xff\xda")
_MAX_SCANS = 500

# Pillow takes files to pieces in Python: so many in 0.2 s at most, and all of a smaller file in 0.03 s.
_MAX_PIECES = 50_000
_SMALL_BYTES = 64 << 10
_TOO_MANY = f"the image consists of more than {_MAX_PIECES:,} parts; save it anew"
_BYTES_AS_THEY_ARE = (1, 2, 7)  # types of TIFF's values that stay in one piece

# Orientations of the EXIF standard, and what turns the image upright. A JPEG's segment holds 64 KiB; as many numbers as
# four of them hold, where one is expected, take 0.1 s.
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

# What is wrong with a file is for the client to hear, not for the log.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# What Pillow's decoders raise for damaged files. ValueError includes the struct-like errors of its plugins.
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


class Large(Exception):
    """An image whose decoding takes much memory."""


class _Pieces(io.BytesIO):
    """A file that is read in a limited number of pieces."""

    left = _MAX_PIECES

    def read(self, size: int | None = -1) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise TooLarge(_TOO_MANY)
        return super().read(size)


def decode(data: bytes, max_bytes: int, max_pixels: int, large: bool = True) -> NDArray[np.uint8]:
    """The central square of an image, upright, over white, as 32x32 RGB.

    Args:
        data: a JPEG, PNG, WebP, GIF (first frame), BMP or TIFF file.
        max_bytes: of the file.
        max_pixels: width times height; checked before anything is decoded.
        large: whether to wait for other images that take much memory, or to raise `Large`, if this one does.

    Returns:
        uint8 [3, 32, 32].

    Raises:
        UnsupportedImage: the bytes are not an image of these formats, or a BMP that is run-length encoded.
        DamagedImage: empty, truncated or otherwise undecodable.
        TooLarge: over one of the limits, or of more parts than any encoder writes.
        Large: it is not to be decoded here.
    """
    if not data:
        raise DamagedImage("the image is empty; send the bytes of a file")
    if len(data) > max_bytes:
        raise TooLarge(f"the image has more than {max_bytes:,} bytes; send a smaller one")
    image = _opened(data)
    (width, height), kind = image.size, image.format
    if width * height > max_pixels:
        raise TooLarge(f"the image has {width}x{height} pixels, the limit is {max_pixels:,}; send a smaller one")
    # A JPEG that is not progressive is decoded at a fraction of its size.
    small = width * height <= _LARGE_PIXELS or (isinstance(image, JpegImageFile) and "progressive" not in image.info)
    if not (small or large):
        raise Large
    try:
        with nullcontext() if small else _one_large:
            pixels = np.asarray(_square(image), np.uint8)
            del image  # frees its memory before the next one takes as much
            return pixels.transpose(2, 0, 1).copy()
    except _DECODE_ERRORS as error:
        raise DamagedImage(f"the {kind} image cannot be decoded: {error}") from error


def _opened(data: bytes) -> Image.Image:
    """An image of which only the header has been read, and which can be decoded in reasonable time."""
    file = io.BytesIO(data) if len(data) <= _SMALL_BYTES else _Pieces(data)
    if data.startswith((b"II", b"MM")) and _tiff_values(data) > _MAX_PIECES:
        raise TooLarge(_TOO_MANY)
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise UnsupportedImage(f"the bytes are not an image known here; supported are {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLarge(str(error)) from None
    except _DECODE_ERRORS as error:
        raise DamagedImage(f"the image's header is damaged: {error}") from error
    if isinstance(image, JpegImageFile) and next(islice(_SCAN.finditer(data), _MAX_SCANS, None), None):
        raise TooLarge(f"the JPEG has more than {_MAX_SCANS} scans; save it anew, not progressive")
    if any(tile.codec_name in Image.DECODERS for tile in image.tile):
        raise UnsupportedImage(f"{image.format} with this compression is not supported; save it anew, as a PNG")
    return image


def _tiff_values(data: bytes) -> int:
    """How many values the first image's directory in a TIFF holds; read as Pillow does, which makes objects of them."""
    order = "<" if data.startswith(b"II") else ">"
    start, count, entry = ("8xQ", "Q", "2xHQ8x") if data[2:3] == b"+" else ("4xL", "H", "2xHL4x")
    values = 0
    with suppress(struct.error, OverflowError):  # where the file ends, so does its directory
        (place,) = struct.unpack_from(order + start, data)
        (entries,) = struct.unpack_from(order + count, data, place)
        place += struct.calcsize(order + count)
        for _ in range(entries):
            kind, number = struct.unpack_from(order + entry, data, place)
            values += 0 if kind in _BYTES_AS_THEY_ARE else number
            place += struct.calcsize(order + entry)
    return values


def _square(image: Image.Image) -> Image.Image:
    if isinstance(image, JpegImageFile):  # MPO as well, which is what many phones call their JPEGs with a preview
        # Decodes at the smallest DCT scale that still leaves twice the resolution needed.
        image.draft(None, (2 * SIZE, 2 * SIZE))
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
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _orientation(image: Image.Image) -> Any:
    """What the EXIF data say, which may be anything; None if there are none, or too many."""
    image.load()  # in a PNG they may come after the pixels
    if any(len(image.info.get(kind, "")) > _MAX_EXIF_BYTES for kind in ("exif", "Raw profile type exif")):
        return None
    return image.getexif().get(ExifTags.Base.Orientation)


def _resamplable(image: Image.Image) -> Image.Image:
    """The image in a mode of 8 bits per channel that can be interpolated, with its transparency if it has any."""
    if image.mode in ("PA", "La", "RGBa") or "transparency" in image.info:
        return image.convert("RGBA")
    if image.mode == "1":
        return image.convert("L")
    if image.mode.startswith("I;16"):
        levels = np.asarray(image, np.uint16)
        return Image.fromarray(((levels.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32 bits per channel are not supported")
    return image if image.mode in ("L", "LA", "RGB", "RGBA", "CMYK") else image.convert("RGB")
