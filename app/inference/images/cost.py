"""Estimate the CPU time and memory of decoding an image from its header and file structure, before it is decoded.

In: an image that Pillow has opened but not decoded, and the bytes of its file.  Out: a `DecodeCost`.

The constants are rounded up. In `tests/stress/results/decode_cost.md`, decoding took less CPU time than estimated for
93 of 95 files. A wrong estimate reduces fairness, not safety: the kernel kills a process of
`app.inference.decode_process` that exceeds its CPU time.
"""

from typing import NamedTuple

from PIL import ImageFile, JpegImagePlugin, TiffImagePlugin

from app.inference.images import jpeg
from app.machine import MIB

JPEG_SIDE = 64
"""Minimum length in pixels of the shorter side of a JPEG after it is scaled down in the decoder."""

# Nanoseconds of CPU time per pixel: for decoding the format, and for converting and scaling the decoded mode.
_FORMAT_NS = {"PNG": 5.0, "WEBP": 22.0, "GIF": 5.0, "BMP": 2.0, "TIFF": 5.0}
_MODE_NS = {"1": 4.0, "L": 2.0, "P": 6.0, "RGB": 5.0}
_OTHER_MODE_NS = 10.0

_LAB_NS = 8e6  # making the transform from CIELAB
_FILE_NS = 300_000.0  # fixed time per image, for its header and for scaling the result

# Nanoseconds per byte of the file, and per part that Pillow handles in Python (a PNG chunk or a TIFF strip).
_BYTE_NS = {"PNG": 20.0, "WEBP": 30.0, "GIF": 15.0, "BMP": 1.0, "TIFF": 10.0}
_UNCOMPRESSED_BYTE_NS = 1.0
_PART_NS = 20_000.0

# Bytes of memory per pixel, including Pillow's copies. The WebP decoder holds four canvases of 4 bytes per pixel.
_TRANSPARENT_16_BITS = "16 bits with a transparent color"
_MODE_BYTES = {_TRANSPARENT_16_BITS: 16, "1": 2, "L": 1, "P": 5, "RGB": 4, "CMYK": 4, "I;16": 8, "I;16B": 8}
_OTHER_MODE_BYTES = 8
_WEBP_BYTES = 16

# Nanoseconds per 8x8 block of JPEG coefficients. Each scan of a multi-scan file is decoded block by block into a buffer
# of all coefficients. Refining the AC coefficients of a progressive file reads the whole block.
_BLOCK_NS = 20.0
_SCAN_BLOCK_NS = 16.0
_REFINED_BLOCK_NS = 50.0
_BUFFERED_BLOCK_NS = 130.0
_BUFFERED_BLOCK_BYTES = 64 * 2
_OUTPUT_PIXEL_NS, _OUTPUT_PIXEL_BYTES = 12.0, 4
_SEQUENTIAL_BYTE_NS, _PROGRESSIVE_BYTE_NS = 10.0, 40.0
_ARITHMETIC_FACTOR = 10.0


class DecodeCost(NamedTuple):
    """An estimated CPU time in milliseconds and memory in bytes. The memory excludes the file itself."""

    cpu_ms: float
    memory_bytes: int

    def exceeds(self, limit: "DecodeCost") -> bool:
        """Return True if the CPU time or the memory is above that of the limit."""
        return self.cpu_ms > limit.cpu_ms or self.memory_bytes > limit.memory_bytes


def estimate(image: ImageFile.ImageFile, data: bytes, parts: int, color_ns: float) -> DecodeCost:
    """Estimate the cost of decoding an opened image.

    Args:
        image: Image that Pillow has opened but not decoded.
        data: Bytes of the whole file.
        parts: Number of parts that Pillow handles in Python: the chunks of a PNG, or the strips or tiles of a TIFF.
        color_ns: CPU time of preparing its color space, in nanoseconds.

    Raises:
        TooLarge: A JPEG has more scans or segments than any encoder writes.
    """
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        return _estimate_jpeg(image, data, color_ns)
    kind = image.format or ""
    pixels = _count_decoded_pixels(image)
    is_compressed = any(tile.codec_name != "raw" for tile in image.tile)
    mode = _converted_mode(image)
    nanoseconds = pixels * (_FORMAT_NS[kind] + _MODE_NS.get(mode, _OTHER_MODE_NS))
    nanoseconds += len(data) * (_BYTE_NS[kind] if is_compressed or kind == "WEBP" else _UNCOMPRESSED_BYTE_NS)
    nanoseconds += _PART_NS * parts
    if mode == _TRANSPARENT_16_BITS:
        nanoseconds *= 2  # the low bytes are decoded separately
    nanoseconds += _FILE_NS + color_ns + (_LAB_NS if mode == "LAB" else 0)
    return DecodeCost(
        nanoseconds / 1e6, pixels * (_WEBP_BYTES if kind == "WEBP" else _MODE_BYTES.get(mode, _OTHER_MODE_BYTES))
    )


def _converted_mode(image: ImageFile.ImageFile) -> str:
    """Return the mode in which the image is scaled down, or `_TRANSPARENT_16_BITS`."""
    if "transparency" in image.info:
        return _TRANSPARENT_16_BITS if image.tile[0].args in ("RGB;16B", "I;16B") else "RGBA"
    if image.format == "GIF" and image.tile[0].extents != (0, 0, *image.size):
        return "RGBA"
    return image.mode


def _count_decoded_pixels(image: ImageFile.ImageFile) -> int:
    """Return the number of pixels that the decoder computes. The tiles of a TIFF may extend beyond the image."""
    width, height = image.size
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tile_width, tile_height = (_require_positive(image.tag_v2.get(tag)) for tag in (322, 323))
        if tile_width and tile_height:
            width, height = -(-width // tile_width) * tile_width, -(-height // tile_height) * tile_height
    return width * height


def _require_positive(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _estimate_jpeg(image: JpegImagePlugin.JpegImageFile, data: bytes, color_ns: float) -> DecodeCost:
    layers: list[tuple[int, int, int, int]] = image.layer  # id, horizontal and vertical sampling, quantization table
    blocks = [_blocks(image.size, layer, layers) for layer in layers]
    scans, is_arithmetic = jpeg.scans(data, len(layers), "progressive" in image.info)
    output_pixels = image.width * image.height // jpeg_scale(image.size) ** 2
    nanoseconds = _FILE_NS + output_pixels * _OUTPUT_PIXEL_NS
    memory = output_pixels * _OUTPUT_PIXEL_BYTES + MIB
    if scans is None:
        nanoseconds += sum(blocks) * _BLOCK_NS + len(data) * _SEQUENTIAL_BYTE_NS
    else:
        memory += sum(blocks) * _BUFFERED_BLOCK_BYTES
        nanoseconds += sum(blocks) * _BUFFERED_BLOCK_NS + len(data) * _PROGRESSIVE_BYTE_NS
        by_id = {layer[0]: count for layer, count in zip(layers, blocks, strict=True)}
        for scan in scans:
            visited = sum(by_id.get(component, max(blocks)) for component in scan.components)
            nanoseconds += visited * (_REFINED_BLOCK_NS if scan.first and scan.is_refinement else _SCAN_BLOCK_NS)
    return DecodeCost((nanoseconds * (_ARITHMETIC_FACTOR if is_arithmetic else 1.0) + color_ns) / 1e6, memory)


def jpeg_scale(size: tuple[int, int]) -> int:
    """Return the divisor (1, 2, 4 or 8) by which the decoder scales a JPEG down.

    The shorter side keeps at least twice the resolution of the network's input, unless the image is smaller.

    Args:
        size: Width and height in pixels.
    """
    return next((scale for scale in (8, 4, 2) if min(size) // JPEG_SIDE >= scale), 1)


def _blocks(size: tuple[int, int], layer: tuple[int, int, int, int], layers: list[tuple[int, int, int, int]]) -> int:
    """Return the number of 8x8 coefficient blocks of one component."""
    horizontal, vertical = max(each[1] for each in layers), max(each[2] for each in layers)
    return -(-size[0] * layer[1] // (8 * horizontal)) * -(-size[1] * layer[2] // (8 * vertical))
