"""Test that no image costs much more time or memory to decode than its bytes and pixels explain.

The program makes files as costly as their formats allow, under the service's own limits: endless scans of a JPEG, a
million chunks, many numbers in a tag that should hold one. It decodes each file in a separate process, once with the
service's decoder and once with Pillow alone.

    python tests/stress/image_bombs.py

Result: 26 costly files, each refused at once or decoded within the limits of 2 s and 320 MiB (Intel Xeon, 2 cores,
2026-11-28).
Table: results/image_bombs.md.
"""

import io
import math
import multiprocessing
import os
import struct
import sys
import time
import zlib
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

import icc_profiles
import jpegs
import numpy as np
import PIL
import pngs
from fuzz_images import decoded, silence
from PIL import Image, ImageOps
from processes import memory_mib
from results import Check, conclude

from app.inference.images.encoded import MAX_COST
from app.machine import MIB
from app.settings import Settings

MAX_S = MAX_COST.cpu_ms / 1000  # seconds of CPU time
MAX_MIB = MAX_COST.memory_bytes / MIB

SETTINGS = Settings()
SIZE = SETTINGS.max_image_bytes
LONG_TEXT = zlib.compress(bytes(1_000_000), 9)
ORIENTATION, X_RESOLUTION = 0x0112, 0x011A  # TIFF and EXIF tags
SHORT, LONG, RATIONAL = 3, 4, 5  # TIFF and EXIF types


def bombs() -> dict[str, bytes]:
    """Return files by the feature that makes them costly."""
    first, last = b"\xff\xdb", b"\xff\xda"  # JPEG markers of tables and scans
    means, all_values = (last + bytes((0, 8, 1, 1, 0, 0, end, 0)) for end in (0, 63))
    numbers = _tiff(ORIENTATION, RATIONAL, SIZE - 10_000)
    return {
        "JPEG, 3000x3000, 20,000 scans": _filled("JPEG", all_values, 200_000, last, side=3000),
        "JPEG, 3000x3000, progressive, 20,000 scans": _filled(
            "JPEG", means, 200_000, last, side=3000, progressive=True
        ),
        "JPEG, 7071x7071, 3 scans": jpegs.with_scans(3, 7071),
        "JPEG, 7071x7071, 498 scans": jpegs.with_scans(498, 7071),
        "JPEG, 3160x3160, progressive, 480 refinements": jpegs.with_refinements(480, 3160),
        "JPEG of empty segments": _filled("JPEG", b"\xff\xe0\0\x02", SIZE, first),
        "JPEG of empty comments": _filled("JPEG", b"\xff\xfe\0\x02", SIZE, first),
        "JPEG of filling bytes": _filled("JPEG", b"\xff", SIZE, first),
        "JPEG whose EXIF data are numbers": _filled("JPEG", _segments(b"Exif\0\0", numbers), SIZE, first),
        "PNG of empty chunks": _filled("PNG", pngs.chunk(b"abCd"), SIZE, pngs.chunk(b"IEND")),
        "PNG of texts": _filled("PNG", pngs.chunk(b"tEXt", b"k\0v"), SIZE, pngs.chunk(b"IEND")),
        "PNG of compressed texts": _filled("PNG", pngs.chunk(b"zTXt", b"k\0\0" + LONG_TEXT), SIZE, pngs.chunk(b"IEND")),
        "PNG of compressed color profiles": _filled(
            "PNG", pngs.chunk(b"iCCP", b"k\0\0" + LONG_TEXT), SIZE, pngs.chunk(b"IEND")
        ),
        "PNG of one bit, 7071x7071": _one_color("1", "PNG"),
        "PNG of 16 bits, 7071x7071": _one_color("I;16", "PNG"),
        "WebP, lossless, 3160x3160": _encoded("WEBP", 3160, lossless=True),
        "WebP, lossless, 7071x7071": _encoded("WEBP", 7071, lossless=True),
        "PNG whose EXIF data are numbers": _filled("PNG", pngs.chunk(b"eXIf", numbers), SIZE, pngs.chunk(b"IEND")),
        "WebP whose EXIF data are numbers": _encoded("WEBP", exif=numbers),
        "GIF of comments": _filled("GIF", b"\x21\xfe\x01c\0", SIZE, b"\x2c\0\0"),
        "GIF with one comment": _filled(
            "GIF", b"\x21\xfe" + (b"\xff" + bytes(255)) * 40_000 + b"\0", SIZE, b"\x2c\0\0"
        ),
        "BMP, run-length encoded, 49,000,000x1": _bmp(49_000_000, 1, b"\1\1\0\0\0\1"),
        "BMP, run-length encoded, 3000x3000": _bmp(3000, 3000, b"\0\0" * 5_000_000),
        "PNG of 16 bits with a transparent color, 4400x4400": _transparent_16_bits(4400),
        "PNG of a color profile of 1 GB": _filled(
            "PNG", pngs.chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(10**9))), SIZE, pngs.chunk(b"IEND")
        ),
        "TIFF of CMYK with a color profile of 4 MB": _encoded(
            "TIFF", mode="CMYK", icc_profile=icc_profiles.cmyk_profile(28)
        ),
        "TIFF of RGB with curves of 4 MB": _encoded("TIFF", icc_profile=_large_curves()),
        "TIFF with a table of 88x88x88 colors": _encoded("TIFF", icc_profile=_long_table()),
        "JPEG without its end, 8000x6000": jpegs.head(8000, 6000) + jpegs.scan([1, 2, 3]),
        "JPEG without its end, full of marker bytes": jpegs.head(64, 64)
        + jpegs.scan([1, 2, 3])
        + b"\xff" * (SIZE - 1_000),
        "AVIF, 5000x5000": _encoded("AVIF", 5000, speed=10),
        "TIFF of 2,000,000 strips": _tiff_strips(2_000_000),
        "TIFF with numbers for its resolution": _tiff(X_RESOLUTION, RATIONAL, SIZE - 2000),
        "TIFF with numbers for its orientation": _tiff(ORIENTATION, SHORT, SIZE - 2000),
    }


def main() -> int:
    checks = []
    for name, data in bombs().items():
        result, seconds, mib = _measured(_as_the_service, data)
        _, others_seconds, others_mib = _measured(_with_pillow_alone, data)
        checks.append(
            Check(
                f"{name}, {len(data):,} bytes",
                f"{result}: {seconds:.2f} s, {mib:.0f} MiB; {others_seconds:.2f} s, {others_mib:.0f} MiB",
                f"< {MAX_S:.0f} s, < {MAX_MIB:.0f} MiB",
                seconds < MAX_S and mib < MAX_MIB,
            )
        )
    ran = (
        f"{len(checks)} files that cost as much as their formats allow; CPU time and memory, and those of Pillow alone"
    )
    return conclude(__file__, f"{ran} ({PIL.__version__}).", checks)


def _measured(decoding: Callable[[bytes], str], data: bytes) -> tuple[str, float, float]:
    """Decode a file in a separate process. Returns the result, seconds of CPU time and MiB of memory."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(theirs, decoding, data))
    process.start()
    theirs.close()
    try:
        measured: tuple[str, float, float] = ours.recv()
    except EOFError:
        measured = "the process ended", math.inf, math.inf
    process.join()
    return measured


def _measure(results: Connection, decoding: Callable[[bytes], str], data: bytes) -> None:
    silence()
    process = os.getpid()
    before, started = memory_mib(process, "VmHWM"), time.process_time()
    result = decoding(data)
    seconds = time.process_time() - started
    results.send((result, seconds, memory_mib(process, "VmHWM") - before))


def _as_the_service(data: bytes) -> str:
    result, wrong = decoded(data, SETTINGS)
    if wrong:
        raise RuntimeError(result)
    return result


def _with_pillow_alone(data: bytes) -> str:
    try:
        image = Image.open(io.BytesIO(data))
        image.draft(None, (64, 64))
        ImageOps.exif_transpose(image).convert("RGB").resize((32, 32))
    except (OSError, ValueError) as error:
        return type(error).__name__
    return "decoded"


def _encoded(kind: str, side: int = 32, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("P" if kind == "GIF" else mode, (side, side)).save(file, kind, **options)
    return file.getvalue()


def _transparent_16_bits(side: int) -> bytes:
    key = pngs.chunk(b"tRNS", struct.pack(">3H", 7, 7, 7))
    return pngs.png(np.full((side, side, 3), 7, np.uint16), pngs.RGB, 16, before=key)


def _large_curves() -> bytes:
    """Return an RGB profile whose tone curves are as long as the format allows."""
    curve = b"curv" + struct.pack(">4xL", 65535) + np.linspace(0, 65535, 65535).astype(">u2").tobytes()
    colors = {f"{letter}XYZ": b"XYZ " + struct.pack(">4x3l", 20_000, 20_000, 20_000) for letter in "rgb"}
    tags = {f"{letter}TRC": curve for letter in "rgb"} | colors
    return icc_profiles.assemble("RGB ", tags | {"zzzz": bytes(3_500_000)})


def _long_table() -> bytes:
    """Return an RGB profile of a table with 88 points on each axis and input curves of 4,096 points."""
    grid = np.random.default_rng(0).integers(0, 1 << 16, (88, 88, 88, 3)).astype(">u2").tobytes()
    curve = np.linspace(0, 65535, 4096).astype(">u2").tobytes()
    header = struct.pack(">4s4xBBBx9iHH", b"mft2", 3, 3, 88, *(65536, 0, 0, 0, 65536, 0, 0, 0, 65536), 4096, 4096)
    return icc_profiles.assemble("RGB ", {"A2B0": header + 3 * curve + grid + 3 * curve}, pcs="Lab ")


def _one_color(mode: str, kind: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (7071, 7071)).save(file, kind)
    return file.getvalue()


def _filled(kind: str, part: bytes, size: int, before: bytes, side: int = 32, **options: Any) -> bytes:
    """Insert as many copies of `part` as the size allows before the first occurrence of `before`."""
    data = _encoded(kind, side, **options)
    place = data.index(before)
    return data[:place] + part * ((size - len(data)) // len(part)) + data[place:]


def _segments(kind: bytes, data: bytes) -> bytes:
    """Split data into JPEG segments, because one segment holds at most 64 KiB."""
    parts = (kind + data[start : start + 65_000] for start in range(0, len(data), 65_000))
    return b"".join(b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part for part in parts)


def _bmp(width: int, height: int, encoded: bytes) -> bytes:
    palette = bytes(1024)
    start = 14 + 40 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(encoded), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", start + len(encoded), 0, 0, start) + header + palette + encoded


def _tiff(tag: int, kind: int, size: int) -> bytes:
    """Return a gray image of 32x32 with as many numbers in one tag as the size allows. EXIF data have the same form."""
    numbers = struct.pack("<II", 1, 3) * (size // 8)
    count = len(numbers) // (8 if kind == RATIONAL else 2)
    return _tiff_file({tag: (kind, count, numbers), 273: (LONG, 1, bytes(1024))}, 32, 32, 32)


def _tiff_strips(rows: int) -> bytes:
    """Return a gray image one pixel wide with a separate strip for each row."""
    places = struct.pack("<I", 8) * rows
    return _tiff_file({273: (LONG, rows, places)}, 1, rows, 1)


def _tiff_file(large: dict[int, tuple[int, int, bytes]], width: int, height: int, rows: int) -> bytes:
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 277: 1, 278: rows, 279: width * rows}
    entries, place, end = {}, 8 + 2 + 12 * (len(tags) + len(large)) + 4, b""
    for tag, (kind, count, content) in large.items():
        entries[tag] = struct.pack("<HHII", tag, kind, count, place + len(end))
        end += content
    entries |= {tag: struct.pack("<HHII", tag, LONG, 1, value) for tag, value in tags.items()}
    directory = b"".join(entries[tag] for tag in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4) + end


if __name__ == "__main__":
    sys.exit(main())
