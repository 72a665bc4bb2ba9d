"""Reduce a PNG to the chunks that its picture needs, and read its color space and transparent color.

In: the bytes of a PNG.  Out: a `Png` with the bytes for Pillow.

Text and other chunks of no use are left out, and so are chunks with a wrong checksum that a viewer may ignore. Browsers
show such files; Pillow refuses them. Animation chunks are left out too, so Pillow decodes the default image.
"""

import struct
import zlib
from typing import NamedTuple

from app.exceptions import TooLarge, UnsupportedImage
from app.inference.images.color import MAX_PROFILE_BYTES, SRGB, Source, cicp, from_gamma
from app.machine import LOOP_STEPS, let_other_threads_run

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_CHUNKS = 10_000
_MAX_EXIF_BYTES = 256 << 10
_EXIF_TEXT = b"Raw profile type exif\0"  # ImageMagick and exiftool keep EXIF data as text of this name
_CRITICAL = frozenset((b"IHDR", b"PLTE", b"IDAT", b"IEND"))
_COLOR = frozenset((b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM"))
_TEXT = frozenset((b"tEXt", b"zTXt", b"iTXt"))


class Png(NamedTuple):
    """The parts of a PNG that its picture needs."""

    data: bytes
    """A PNG without other chunks."""
    color: Source
    """The color space of the pixels; None for sRGB."""
    chunks: int
    """Number of chunks in `data`."""


def read(data: bytes) -> Png:
    """Read the chunks of a PNG.

    Raises:
        TooLarge: The PNG has more chunks than any encoder writes.
        UnsupportedImage: The PNG has a chunk of an unknown kind that a decoder must know.
    """
    color: dict[bytes, bytes] = {}
    dropped: list[tuple[int, int]] = []
    has_pixels = has_exif = False
    count, place = 0, len(SIGNATURE)
    while place < len(data):
        count += 1
        if count > _MAX_CHUNKS:
            raise TooLarge(f"the PNG has more than {_MAX_CHUNKS:,} chunks; save it again")
        if count % LOOP_STEPS == 0:
            let_other_threads_run()
        kind, start, place = data[place + 4 : place + 8], place, place + int.from_bytes(data[place : place + 4]) + 12
        if kind in _CRITICAL:
            has_pixels |= kind == b"IDAT"
            if kind == b"IEND":
                break
        elif kind == b"tRNS" and not has_pixels and _is_intact(data, start, place):
            pass
        elif not has_exif and _is_exif(data, kind, start, place) and _is_intact(data, start, place):
            has_exif = True
        else:
            dropped.append((start, place))
            if kind in _COLOR and not has_pixels and kind not in color and _is_intact(data, start, place):
                color[kind] = data[start + 8 : place - 4]
            elif kind.isalpha() and kind[:1].isupper():
                raise UnsupportedImage(
                    f"the PNG has a chunk of the kind {kind.decode()}, which is not in the PNG standard and without "
                    "which the picture cannot be shown; export it as a standard PNG or JPEG"
                )
    if dropped:
        ends = [0, *(end for _, end in dropped)]
        starts = [*(start for start, _ in dropped), place]
        data = b"".join([data[end:start] for end, start in zip(ends, starts, strict=True)])
    return Png(data, _color_space(color) if color else None, count - len(dropped))


def _is_intact(data: bytes, place: int, end: int) -> bool:
    return zlib.crc32(memoryview(data)[place + 4 : end - 4]) == int.from_bytes(data[end - 4 : end])


def _is_exif(data: bytes, kind: bytes, place: int, end: int) -> bool:
    if end - place > _MAX_EXIF_BYTES:
        return False
    return kind == b"eXIf" or (kind in _TEXT and data.startswith(_EXIF_TEXT, place + 8))


def _color_space(chunks: dict[bytes, bytes]) -> Source:
    """Choose the color space as the PNG specification orders: cICP, iCCP, sRGB, then gAMA and cHRM."""
    if space := cicp(chunks.get(b"cICP", b"")):
        return None if space == SRGB else space
    if profile := _profile(chunks.get(b"iCCP", b"")):
        return profile
    if b"sRGB" in chunks:
        return None
    (exponent,) = _numbers(chunks, b"gAMA", 1) or (None,)
    return from_gamma(exponent, _numbers(chunks, b"cHRM", 8))


def _numbers(chunks: dict[bytes, bytes], kind: bytes, count: int) -> tuple[float, ...] | None:
    content = chunks.get(kind, b"")
    if len(content) != 4 * count:
        return None
    return tuple(value / 100_000 for value in struct.unpack(f">{count}L", content))


def _profile(content: bytes) -> bytes | None:
    """Decompress the profile of an iCCP chunk. Returns None if it is damaged or too large."""
    _, _, compressed = content.partition(b"\0")
    decompressor = zlib.decompressobj()
    try:
        profile = decompressor.decompress(compressed[1:], MAX_PROFILE_BYTES + 1)
    except zlib.error:
        return None
    return profile if compressed[:1] == b"\0" and 0 < len(profile) <= MAX_PROFILE_BYTES else None
