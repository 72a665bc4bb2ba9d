"""Convert the samples of a decoded image to 8 bits per channel: levels, transparent colors, uncovered pixels.

In: an image that Pillow has decoded.  Out: an image of a mode that Pillow interpolates.
"""

import io
from collections.abc import Sequence
from functools import reduce

import numpy as np
from PIL import Image, ImageChops, ImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.TiffImagePlugin import TiffImageFile

from app.inference.images import tiff

# Distance of neighboring gray levels in Pillow's image, by the raw mode of a PNG with 2 and 4 bits.
_LEVEL_STEPS = {"L;2": 0x55, "L;4": 0x11}


def to_8_bits(image: ImageFile.ImageFile, tiles: Sequence[ImageFile._Tile], data: bytes) -> Image.Image:
    """Convert an image to a mode with 8 bits per channel that can be interpolated. Transparency is kept.

    Args:
        image: Decoded image.
        tiles: The tiles that the image had before it was decoded.
        data: Bytes of its file.
    """
    if image.mode.startswith("I;16"):
        if isinstance(image, TiffImageFile):
            layout = tiff.layout(data)
            return _scale_levels(image, (1 << layout.bits) - 1, is_inverted=layout.is_inverted)
        return _scale_levels(image, 0xFFFF, transparent=image.info.get("transparency"))
    if isinstance(image, GifImageFile):
        return _to_covered(image, tiles[0].extents)
    if "transparency" in image.info:
        return _to_transparent(image, str(tiles[0].args), data)
    match image.mode:
        case "L" | "LA" | "RGB" | "RGBA" | "CMYK" | "YCbCr" | "LAB":
            return image
        case "1":
            return image.convert("L")
        case "La":
            return image.convert("LA")
        case "PA" | "RGBa":
            return image.convert("RGBA")
        case _:
            return image.convert("RGB")


def _scale_levels(
    image: Image.Image, white: int, *, is_inverted: bool = False, transparent: int | None = None
) -> Image.Image:
    """Scale the levels of a gray image from 0 to `white` down to 255. One level may be transparent."""
    levels = np.asarray(image, np.uint16)
    opaque = None if transparent is None else levels != transparent
    wide = levels.astype(np.uint32)
    if is_inverted:
        np.subtract(white, wide, out=wide)
    wide *= 255  # in place, to save memory on large images
    wide += white // 2
    wide //= white
    gray = Image.fromarray(wide.astype(np.uint8))
    if opaque is not None:
        gray.putalpha(Image.fromarray(opaque))
    return gray


def _to_transparent(image: Image.Image, raw_mode: str, data: bytes) -> Image.Image:
    """Convert an image with a transparent color to RGBA."""
    if raw_mode == "RGB;16B":
        return _with_transparent_16_bit_color(image, data)
    if step := _LEVEL_STEPS.get(raw_mode):
        image.info["transparency"] = image.info["transparency"] * step & 0xFF
    return image.convert("RGBA")


def _with_transparent_16_bit_color(image: Image.Image, data: bytes) -> Image.Image:
    """Make one color of an RGB PNG with 16 bits transparent. Pillow keeps the high byte of each sample only.

    The low bytes are decoded as if the samples had the other byte order.
    """
    color_key: tuple[int, ...] = image.info.pop("transparency")
    low_bytes = Image.open(io.BytesIO(data), formats=["PNG"])
    low_bytes.tile = [tile._replace(args="RGB;16L") for tile in low_bytes.tile]
    matches = [
        *_matches(image, [key >> 8 for key in color_key]),
        *_matches(low_bytes, [key & 0xFF for key in color_key]),
    ]
    image.putalpha(ImageChops.invert(reduce(ImageChops.darker, matches)))
    return image


def _matches(image: Image.Image, values: Sequence[int]) -> tuple[Image.Image, ...]:
    """Return for each channel an image that is 255 where the channel has the value, and 0 elsewhere."""
    return image.point([255 * (level == value) for value in values for level in range(256)]).split()


def _to_covered(image: Image.Image, covered: tuple[int, int, int, int] | None) -> Image.Image:
    """Convert the first frame of a GIF. The canvas is transparent where the frame does not cover it, as in browsers."""
    if covered == (0, 0, *image.size) or covered is None:
        return image.convert("RGBA" if "transparency" in image.info else "RGB")
    image = image.convert("RGBA")
    alpha = Image.new("L", image.size)
    alpha.paste(image.getchannel("A").crop(covered), covered[:2])
    image.putalpha(alpha)
    return image
