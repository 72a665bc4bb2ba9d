"""Assemble JPEG files from segments, so that tests and benchmarks control the frame, the scans and their data."""

import io
import struct
from collections.abc import Sequence

from PIL import Image

BASELINE, PROGRESSIVE, ARITHMETIC = 0xC0, 0xC2, 0xC9
END = b"\xff\xd9"

# An AC table with a single one-bit code: a run of 2^14 or more blocks without further coefficients.
LONG_RUNS = b"\xff\xc4" + struct.pack(">HB", 20, 0x10) + bytes([1] + [0] * 15) + b"\xe0"


def head(width: int, height: int, frame: int = BASELINE, components: int = 3) -> bytes:
    """Return all bytes before the first scan: standard tables and a frame header without chroma subsampling."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    donor, place, tables = buffer.getvalue(), 2, b""
    while donor[place + 1] != 0xDA:
        end = place + 2 + int.from_bytes(donor[place + 2 : place + 4])
        if donor[place + 1] in (0xDB, 0xC4):  # quantization and Huffman tables
            tables += donor[place:end]
        place = end
    layers = b"".join(bytes([number + 1, 0x11, int(number > 0)]) for number in range(components))
    size = struct.pack(">HBHHB", 8 + len(layers), 8, height, width, components)
    return b"\xff\xd8" + tables + bytes([0xFF, frame]) + size + layers


def scan(components: Sequence[int], start: int = 0, end: int = 63, high: int = 0, low: int = 0) -> bytes:
    """Return the header of a scan. Decoders take coefficients without data as zero."""
    selectors = b"".join(bytes([number, 0x11 if number > 1 else 0x00]) for number in components)
    length = struct.pack(">HB", 6 + len(selectors), len(components))
    return b"\xff\xda" + length + selectors + bytes([start, end, high << 4 | low])


def with_scans(count: int, side: int) -> bytes:
    """Return a small baseline JPEG with `count` scans of one component each."""
    return head(side, side) + b"".join(scan([number % 3 + 1]) for number in range(count)) + END


def with_refinements(count: int, side: int) -> bytes:
    """Return a progressive JPEG with `count` scans that read every block to refine coefficients that are all zero."""
    first = head(side, side, PROGRESSIVE) + scan([1, 2, 3], 0, 0) + LONG_RUNS + scan([1], 1, 63, 0, 1)
    return first + (scan([1], 1, 63, 1, 0) + bytes(60)) * count + END
