"""Untrusted bytes to the pixels a model takes.

    bytes -> (size limit) -> header -> (format, pixel limit) -> decoded -> centre square, 32x32 -> RGB -> upright

In: an encoded image.  Out: uint8 [3, 32, 32], or `UnsupportedImage`, `DamagedImage`, `TooLarge`.
An image of exactly 32x32 is not resampled.
"""

import io
import struct
import threading
import warnings
import zlib
from contextlib import nullcontext

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from app.errors import DamagedImage, TooLarge, UnsupportedImage

SIZE = 32
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# Decoding takes up to 16 bytes per pixel, so large images are decoded one at a time.
_LARGE_PIXELS = 10_000_000
_one_large = threading.Lock()

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
        UnsupportedImage: the bytes are not an image of these formats.
        DamagedImage: empty, truncated or otherwise undecodable.
        TooLarge: over one of the limits.
        Large: it is not to be decoded here.
    """
    if not data:
        raise DamagedImage("the image is empty; send the bytes of a file")
    if len(data) > max_bytes:
        raise TooLarge(f"the image has more than {max_bytes:,} bytes; send a smaller one")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise UnsupportedImage(f"the bytes are not an image known here; supported are {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLarge(str(error)) from None
    except _DECODE_ERRORS as error:
        raise DamagedImage(f"the image's header is damaged: {error}") from error

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


def _square(image: Image.Image) -> Image.Image:
    if isinstance(image, JpegImageFile):  # MPO as well, which is what many phones call their JPEGs with a preview
        # Decodes at the smallest DCT scale that still leaves twice the resolution needed.
        image.draft(None, (2 * SIZE, 2 * SIZE))
    ImageOps.exif_transpose(image, in_place=True)
    image = _resamplable(image)
    if image.size != (SIZE, SIZE):
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box)
    if image.mode in ("RGBA", "LA"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


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
