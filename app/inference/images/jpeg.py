"""Read the structure of a JPEG: its frame, its scans, and how much of the picture a file without its end has.

In: the bytes of a file, or the image that Pillow has decoded from it.  Out: numbers.

libjpeg finds markers in the same way as `segments`, so it cannot decode more scans than `scans` returns.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.exceptions import TooLarge
from app.machine import LOOP_STEPS, let_other_threads_run

MAX_SCANS = 500
"""Largest number of scans of a JPEG. Encoders write at most a few dozen."""

END = b"\xff\xd9"
"""The marker at the end of every JPEG."""

_MAX_SEGMENTS = 5_000

# A JPEG marker, except those that occur within entropy-coded data: stuffed zeros, fill bytes and restart markers.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_SOS, _EOI, _SOI, _TEM = 0xDA, 0xD9, 0xD8, 0x01
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ARITHMETIC_FRAMES = frozenset((0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF))
_UNREADABLE_FRAMES = {
    **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF), "hierarchical"),
    0xC3: "lossless",
    0xCB: "lossless",
}
_GRAY = 128, 127  # a block without data; 127 where CMYK is inverted


class Scan(NamedTuple):
    """The header of one scan."""

    components: bytes
    """Ids of the components in the scan, one byte each."""
    first: int
    """First coefficient of the scan: 0 if it has the mean of each block."""
    is_refinement: bool


def scans(data: bytes, components: int, is_progressive: bool) -> tuple[list[Scan] | None, bool]:
    """Parse the scans of a JPEG up to its end marker.

    Returns:
        The scans, and True if a frame header announces arithmetic coding. The scans are None if the first scan
        completes the image, because libjpeg then decodes no further scan.

    Raises:
        TooLarge: The JPEG has more scans or segments than any encoder writes.
    """
    found: list[Scan] = []
    is_arithmetic = False
    for number, (kind, place) in enumerate(_segments(data)):
        is_arithmetic |= kind in _ARITHMETIC_FRAMES
        if kind == _SOS:
            scan = _parse_scan(data, place)
            if not (found or is_progressive) and len(scan.components) >= components:
                return None, is_arithmetic
            found.append(scan)
        if len(found) > MAX_SCANS or number > _MAX_SEGMENTS:
            limits = f"{MAX_SCANS} scans or {_MAX_SEGMENTS:,} segments"
            raise TooLarge(f"the JPEG has more than {limits}; save it again as a baseline JPEG")
    return found, is_arithmetic


def is_complete(data: bytes) -> bool:
    """Return True if the file has an end marker after the start of its first scan."""
    if data.endswith(END):
        return True
    for number, (kind, place) in enumerate(_segments(data)):
        if kind == _SOS:
            return data.find(END, place) >= 0
        if number > _MAX_SEGMENTS:
            break
    return True  # a file without a scan is no picture, cut off or not


def count_markers(data: bytes) -> int:
    """Return the number of markers of a JPEG, without restart markers. Segments may contain markers by chance."""
    return len(_MARKER.findall(data))


def missing_part(image: Image.Image, found: list[Scan] | None, components: bytes) -> float:
    """Return the part of a decoded picture for which a file without its end has no data, from 0 to 1.

    libjpeg leaves blocks without data gray. In a file of several scans, the picture is whole, if less detailed, when
    each component has a complete first scan.

    Args:
        image: Decoded image.
        found: Scans, as from `scans`.
        components: Ids of all components, one byte each.
    """
    if found:
        complete = {component for scan in found[:-1] if scan.first == 0 for component in scan.components}
        if complete.issuperset(components):
            return 0.0
        if not set(found[-1].components).issuperset(components):
            return 1.0
    pixels: NDArray[np.uint8] = np.asarray(image).reshape(image.height, image.width, -1)
    is_gray: NDArray[np.bool_] = np.all(np.isin(pixels, _GRAY), axis=2)
    gray_ends = np.logical_and.accumulate(is_gray[:, ::-1], axis=1).sum(axis=1)[::-1]  # at the end of each row, upward
    rows = len(gray_ends) if gray_ends.all() else int(np.argmin(gray_ends > 0))
    return float(gray_ends[:rows].sum() / is_gray.size)


def describe_unreadable(data: bytes) -> str | None:
    """Return the reason why libjpeg cannot read a JPEG, such as "12 bits per sample", or None."""
    for number, (kind, place) in enumerate(_segments(data)):
        if kind in _FRAMES:
            bits, components = data[place + 2 : place + 3], data[place + 7 : place + 8]
            if kind in _UNREADABLE_FRAMES:
                return f"{_UNREADABLE_FRAMES[kind]} coding"
            if bits and bits[0] != 8:
                return f"{bits[0]} bits per sample"
            if components and components[0] not in (1, 3, 4):
                return f"{components[0]} components"
            return None
        if number > _MAX_SEGMENTS:
            break
    return None


def _parse_scan(data: bytes, place: int) -> Scan:
    """Read a scan header, which begins with two bytes of length and one with the number of components."""
    start = place + 3
    end = start + 2 * (data[place + 2] if place + 2 < len(data) else 0)
    first, _, approximation = data[end : end + 3].ljust(3, b"\0")
    return Scan(data[start:end:2], first, is_refinement=approximation >> 4 > 0)


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the marker code of each segment of a JPEG and the offset of its length field."""
    place, count = 2, 0
    while (found := _MARKER.search(data, place)) and (kind := data[found.end() - 1]) != _EOI:
        place = found.end()
        if kind not in (_SOI, _TEM):
            count += 1
            if count % LOOP_STEPS == 0:
                let_other_threads_run()
            yield kind, place
            place += max(2, int.from_bytes(data[place : place + 2]))
