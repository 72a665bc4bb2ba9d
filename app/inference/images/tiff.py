"""Read the layout of a TIFF's samples, and refuse the layouts that Pillow decodes to wrong pixels.

In: the bytes of a file, or the image that Pillow has opened.  Out: a `Layout`, or `UnsupportedImage`.
"""

import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from PIL.TiffImagePlugin import COMPRESSION_INFO

from app.exceptions import UnsupportedImage

_ALPHA = 2  # kind of an extra sample
_BYTES_AS_THEY_ARE = (1, 2, 7)  # value types that Pillow keeps as one bytes object
_SHORT, _LONG = 3, 4
_MAX_ENTRIES = 1 << 16
_BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _SAMPLES = 258, 259, 262, 266, 277
_PLANAR, _EXTRA, _FORMAT, _SUBSAMPLING = 284, 338, 339, 530
_MIN_IS_WHITE, _GRAY, _RGB, _PALETTE, _CMYK, _YCBCR, _CIELAB = 0, 1, 2, 3, 5, 6, 8
_COLORS = {
    _MIN_IS_WHITE: "gray with white as zero",
    _GRAY: "gray",
    _RGB: "RGB",
    _PALETTE: "palette",
    4: "mask",
    _CMYK: "CMYK",
    _YCBCR: "YCbCr",
    _CIELAB: "CIELAB",
    9: "ICCLAB",
    10: "ITULAB",
    32803: "raw sensor",
    32844: "LogL",
    32845: "LogLuv",
    34892: "linear raw sensor",
}
_FORMATS = {2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}
_COMPRESSIONS = {
    1: "no",
    2: "CCITT",
    3: "CCITT group 3",
    4: "CCITT group 4",
    5: "LZW",
    6: "old JPEG",
    7: "JPEG",
    8: "deflate",
    32773: "PackBits",
    32946: "deflate",
    33003: "JPEG 2000",
    34712: "JPEG 2000",
    34892: "lossy JPEG",
    34925: "LZMA",
    50000: "Zstandard",
    50001: "WebP",
    50002: "JPEG XL",
}


class Layout(NamedTuple):
    """The storage of the samples of a TIFF's first image, by its tags."""

    bits: int
    sample_format: int
    photometric: int
    compression: int
    samples: int
    is_planar: bool
    is_reversed: bool
    extra: tuple[int, ...]
    subsampling: tuple[int, ...]

    def __str__(self) -> str:
        """Return a description for a person, such as "3 samples of 32 floating-point bits (RGB, LZW compression)"."""
        kind = " ".join(filter(None, [str(self.bits), _FORMATS.get(self.sample_format), "bits"]))
        samples = f"{self.samples} sample{'s' if self.samples > 1 else ''} of {kind}"
        colors = _COLORS.get(self.photometric, f"photometric interpretation {self.photometric}")
        compression = _COMPRESSIONS.get(self.compression, f"unknown ({self.compression})")
        details = [colors, *(["alpha"] if any(self.extra) else []), f"{compression} compression"]
        details += ["separate planes"] if self.is_planar else []
        details += ["reversed bits"] if self.is_reversed else []
        return f"{samples} ({', '.join(details)})"

    def unsupported(self) -> UnsupportedImage:
        """Return the error for a layout that Pillow cannot decode."""
        return UnsupportedImage(
            f"a TIFF with {self} is not supported; save it as a PNG or JPEG, or as a TIFF with 8 unsigned bits"
        )

    @property
    def is_compression_known(self) -> bool:
        """True if Pillow has a name for the compression."""
        return self.compression in COMPRESSION_INFO

    @property
    def is_inverted(self) -> bool:
        """True if Pillow leaves zero as white. It inverts samples of up to 8 bits."""
        return self.photometric == _MIN_IS_WHITE and self.bits > 8

    @property
    def is_decoded_right(self) -> bool:
        """True if Pillow decodes the layout, once it accepts it, to the right pixels.

        Signed and floating-point samples have no black and white. Pillow reads uncompressed samples in separate planes
        as if each had 8 bits. It mixes separate planes of gray and alpha, and takes the signed samples of CIELAB in
        separate planes as unsigned.
        """
        if self.sample_format not in (1, 4) or not 1 <= self.bits <= 16:
            return False
        is_raw = self.compression == 1
        if self.photometric == _YCBCR and is_raw and self.subsampling != (1, 1):
            return False
        if is_raw and self.is_reversed:
            is_inverted_byte = self.bits == 8 and self.photometric == _MIN_IS_WHITE
            if self.bits > 8 or is_inverted_byte or (self.bits < 8 and self.photometric == _PALETTE):
                return False
        if not self.is_planar:
            return True
        if self.photometric == _CIELAB or (self.photometric == _YCBCR and (is_raw or self.extra)):
            return False
        if is_raw and self.extra not in ((), (_ALPHA,)):
            return False
        if self.photometric in (_MIN_IS_WHITE, _GRAY, _PALETTE) and self.samples > 1:
            return not is_raw and not any(self.extra)
        return not is_raw or (self.bits == 8 and not self.is_reversed)


def count_values(data: bytes) -> int:
    """Return the number of values in the directory of a TIFF's first image. Pillow creates an object for each value."""
    return sum(1 if kind in _BYTES_AS_THEY_ARE else max(number, 1) for _, kind, number, _ in _entries(data))


def layout(data: bytes) -> Layout:
    """Read the layout of the first image of a TIFF. A missing tag has its default."""
    tags = dict[int, tuple[int, ...]]()
    for tag, kind, number, place in _entries(data):
        if kind in (_SHORT, _LONG) and 0 < number <= 16:
            with suppress(struct.error, OverflowError):
                tags[tag] = struct.unpack_from(f"{_order(data)}{number}{'H' if kind == _SHORT else 'L'}", data, place)
    first = {tag: values[0] for tag, values in tags.items()}
    return Layout(
        bits=max(tags.get(_BITS, (1,))),
        sample_format=max(tags.get(_FORMAT, (1,))),
        photometric=first.get(_PHOTOMETRIC, _MIN_IS_WHITE),
        compression=first.get(_COMPRESSION, 1),
        samples=first.get(_SAMPLES, 1),
        is_planar=first.get(_PLANAR, 1) == 2,
        is_reversed=first.get(_FILL_ORDER, 1) == 2,
        extra=tags.get(_EXTRA, ()),
        subsampling=tags.get(_SUBSAMPLING, (2, 2)),
    )


def _order(data: bytes) -> str:
    return "<" if data.startswith(b"II") else ">"


def _entries(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield tag, type, number of values and place of the values, for each entry of the first directory."""
    order, is_big = _order(data), data[2:3] == b"+"
    start, count, entry, offset = ("8xQ", "Q", "HHQ", "Q") if is_big else ("4xL", "H", "HHL", "L")
    with suppress(struct.error, OverflowError):  # the directory ends where the file ends
        (place,) = struct.unpack_from(order + start, data)
        (entries,) = struct.unpack_from(order + count, data, place)
        place += struct.calcsize(order + count)
        for _ in range(min(entries, _MAX_ENTRIES)):
            tag, kind, number = struct.unpack_from(order + entry, data, place)
            value = place + struct.calcsize(order + entry)
            size = {_SHORT: 2, _LONG: 4}.get(kind, 1) * number
            is_inline = size <= struct.calcsize(order + offset)
            yield tag, kind, number, value if is_inline else struct.unpack_from(order + offset, data, value)[0]
            place = value + struct.calcsize(order + offset)
