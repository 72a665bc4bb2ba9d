"""Write PNG files from samples without Pillow, so that tests know the pixels of every color type and depth."""

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GRAY, RGB, PALETTE, GRAY_ALPHA, RGBA = 0, 2, 3, 4, 6
DEPTHS = {GRAY: (1, 2, 4, 8, 16), RGB: (8, 16), PALETTE: (1, 2, 4, 8), GRAY_ALPHA: (8, 16), RGBA: (8, 16)}
CHANNELS = {GRAY: 1, RGB: 3, PALETTE: 1, GRAY_ALPHA: 2, RGBA: 4}

# The seven passes of Adam7: first column, first row, distance of columns, distance of rows.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def chunk(kind: bytes, content: bytes = b"", *, damaged: bool = False) -> bytes:
    """Return a chunk. A damaged one has a wrong checksum."""
    checksum = zlib.crc32(kind + content) ^ damaged
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(
    samples: NDArray[np.integer],
    color_type: int = RGB,
    depth: int = 8,
    *,
    interlaced: bool = False,
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """Return a PNG.

    Args:
        samples: [height, width, channels], each from 0 to 2^depth - 1.
        color_type: Color type of the PNG specification.
        depth: Bits per sample.
        interlaced: Store the pixels in the passes of Adam7.
        before: Chunks between the header and the pixels.
        after: Chunks after the pixels.
    """
    height, width = samples.shape[:2]
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    parts = [samples[top::down, left::right] for left, top, right, down in passes]
    content = b"".join(b"\0" + _row(row, depth) for part in parts if part.size for row in part)
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, interlaced)
    pixels = chunk(b"IDAT", zlib.compress(content))
    return SIGNATURE + chunk(b"IHDR", header) + before + pixels + after + chunk(b"IEND")


def _row(samples: NDArray[np.integer], depth: int) -> bytes:
    flat = samples.reshape(-1)
    if depth >= 8:
        return flat.astype(f">u{depth // 8}").tobytes()
    bits = flat[:, None] >> np.arange(depth - 1, -1, -1) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()
