"""Make valid images of every format and variant that the service accepts, and damaged files from them.

A seed and a number determine the bytes of a damaged file, so these two identify a failing input.
"""

import io
import re
import struct
import zlib
from collections.abc import Callable
from typing import Any, Literal

import heics
import icc_profiles
import numpy as np
import pngs
import tiffs
from PIL import Image, features

from app.inference.images import heif

_ORIENTATION = 0x0112  # EXIF
_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
_HEADER = 96  # leading bytes that hold the sizes and offsets in most formats
# Matches the start of PNG and WebP chunks, HEIF boxes, JPEG segments and GIF blocks. It also matches some other data.
_PARTS = re.compile(
    rb"(?s)(?=....(?:IHDR|PLTE|IDAT|IEND|[tzi][TE]Xt|iCCP|cICP|gAMA|cHRM|tRNS|eXIf|acTL|fcTL|fdAT))"
    rb"|(?=....(?:meta|iloc|iinf|iprp|ispe|av1C|colr|irot|mdat))"
    rb"|(?=VP8[ LX]|ANIM|ANMF|ALPH|EXIF|ICCP)|(?=\xff[\xc0-\xfe])|(?=[\x21\x2c][\xf9\xfe\xff\x00])"
)

Random = np.random.Generator
Mutation = Callable[[bytes, bytes, Random], bytes]


def samples() -> dict[str, bytes]:
    """Return valid files by format and variant."""
    small, exact, large = _picture(48, 40), _picture(32, 32), _picture(320, 200)
    turned = Image.Exif()
    turned[_ORIENTATION] = 6
    see_through = small.convert("RGBA")
    see_through.putalpha(Image.linear_gradient("L").resize(small.size))
    palette = small.quantize(16)
    wide = Image.fromarray(np.asarray(small.convert("L"), np.uint16) * 257)
    icc = {"icc_profile": icc_profiles.rgb_profile("Display P3")}
    files: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "jpeg baseline": (large, {"quality": 60}),
        "jpeg progressive": (large, {"progressive": True, "quality": 60}),
        "jpeg 32x32": (exact, {"subsampling": 0}),
        "jpeg cmyk": (small.convert("CMYK"), {}),
        "jpeg cmyk, icc": (small.convert("CMYK"), {"icc_profile": icc_profiles.cmyk_profile(3)}),
        "jpeg grey, icc": (small.convert("L"), {"icc_profile": icc_profiles.gray_profile(1.8)}),
        "jpeg grey": (small.convert("L"), {}),
        "jpeg turned, icc": (small, {"exif": turned, **icc}),
        "mpo": (_picture(48, 40), _frames()),
        "png rgb 32x32": (exact, {}),
        "png grey": (small.convert("L"), {}),
        "png 1-bit": (small.convert("1"), {}),
        "png palette": (palette, {}),
        "png palette transparent": (palette, {"transparency": b"\x00\x80\xff"}),
        "png alpha, turned, icc": (see_through, {"exif": turned, **icc}),
        "png grey alpha": (see_through.convert("LA"), {}),
        "png 16-bit": (wide, {}),
        "png animated": (_picture(48, 40), _frames()),
        "webp lossy": (large, {"quality": 50}),
        "webp lossless": (small, {"lossless": True}),
        "webp alpha, turned": (see_through, {"exif": turned}),
        "webp animated": (_picture(48, 40), _frames()),
        "gif": (palette, {}),
        "gif animated": (_picture(48, 40), _frames()),
        "gif transparent": (palette, {"transparency": 3, "interlace": 0}),
        "bmp": (small, {}),
        "bmp grey": (small.convert("L"), {}),
        "bmp 1-bit": (small.convert("1"), {}),
        "bmp palette": (palette, {}),
        "bmp 32-bit": (see_through, {}),
        "tiff": (small, {}),
        "tiff alpha, turned": (see_through, {"exif": turned}),
        "tiff 16-bit": (wide, {}),
        "tiff multi-page": (_picture(48, 40), _frames()),
        "tiff big": (small, {"big_tiff": True}),
        "tiff float": (small.convert("F"), {}),
    }
    files |= {
        f"tiff {compression}": (small, {"compression": compression})
        for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
    }
    if features.check("avif"):
        files["avif"] = (small, {"quality": 60, "max_threads": 1})
        files["avif alpha, turned, icc"] = (see_through, {"exif": turned, "max_threads": 1, **icc})
        files["avif animated"] = (_picture(48, 40), {**_frames(), "max_threads": 1})
    files["tiff group4"] = (small.convert("1"), {"compression": "group4"})
    made = {name: _encoded(image, name.split()[0], options) for name, (image, options) in files.items()}
    text = zlib.compress(b"word " * 1000)
    comments = pngs.chunk(b"tEXt", b"Comment\0said") + pngs.chunk(b"zTXt", b"Long\0\0" + text)
    header = len(pngs.SIGNATURE) + len(pngs.chunk(b"IHDR", bytes(13)))
    made["png text"] = made["png grey"][:header] + comments + made["png grey"][header:]
    samples = np.asarray(small, np.uint16) * 257
    key = pngs.chunk(b"tRNS", samples[0, 0].astype(">u2").tobytes())
    made["png 16-bit transparent"] = pngs.png(samples, pngs.RGB, 16, before=key)
    made["png gamma"] = pngs.png(samples // 257, before=pngs.chunk(b"gAMA", struct.pack(">I", 100_000)))
    made["png cicp"] = pngs.png(samples // 257, before=pngs.chunk(b"cICP", bytes([12, 13, 0, 1])))
    made["tiff 12-bit"] = tiffs.tiff(samples[..., :1] >> 4, tiffs.MIN_IS_BLACK, 12)
    made["tiff white is zero"] = tiffs.tiff(samples[..., :1], tiffs.MIN_IS_WHITE, 16, compression=tiffs.DEFLATE)
    made["tiff lab"] = tiffs.tiff((samples // 257).astype(np.uint8), tiffs.CIELAB, 8)
    if "HEIC" in heif.supported_kinds():
        made["heic"] = heics.heic(np.asarray(exact.convert("L")), turns=1)
    made["png interlaced"] = pngs.png(np.asarray(small), interlaced=True)
    return made


def damaged(files: dict[str, bytes], seed: int, number: int) -> tuple[str, bytes]:
    """Return the description and the bytes of input `number` of a seed."""
    random = np.random.default_rng((seed, number))
    names = sorted(files)
    name, other = names[random.integers(len(names))], names[random.integers(len(names))]
    data = damaged_bytes(files[name], files[other], random)
    if random.random() < 0.5:  # decoders refuse most other inputs at the first checksum
        data = _checksums_corrected(data)
    return f"{name} with {other}", data


def damaged_bytes(data: bytes, other: bytes, random: Random) -> bytes:
    """Return the data after one or a few mutations, which may borrow pieces from `other`."""
    for _ in range(random.geometric(0.5)):
        data = _MUTATIONS[random.integers(len(_MUTATIONS))](data, other, random)
    return data


def flip_bits(data: bytes, _: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for position in _positions(data, random):
        changed[position] ^= 1 << random.integers(8)
    return bytes(changed)


def set_bytes(data: bytes, _: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for position in _positions(data, random):
        changed[position] = random.integers(256)
    return bytes(changed)


def set_field(data: bytes, _: bytes, random: Random) -> bytes:
    """Set a number in the header, or anywhere in the file, to an extreme value."""
    size = int(random.choice((1, 2, 4)))
    order = _byte_order(random)
    within = len(data) if random.random() < 0.3 else min(len(data), _HEADER)
    start = int(random.integers(within + 1))
    extreme = int(random.choice(_EXTREMES)) % (1 << 8 * size)
    return data[:start] + extreme.to_bytes(size, order) + data[start + size :]


def add_to_field(data: bytes, _: bytes, random: Random) -> bytes:
    """Change a 16-bit number in the header by a small amount, or multiply it."""
    start = int(random.integers(min(len(data), _HEADER) + 1))
    order = _byte_order(random)
    value = int.from_bytes(data[start : start + 2], order)
    value = value + int(random.integers(-4, 5)) if random.random() < 0.7 else value * int(random.integers(2, 200))
    return data[:start] + (value % (1 << 16)).to_bytes(2, order) + data[start + 2 :]


def truncate(data: bytes, _: bytes, random: Random) -> bytes:
    return data[: random.integers(len(data) + 1)]


def delete_range(data: bytes, _: bytes, random: Random) -> bytes:
    start, stop = _range(data, random)
    return data[:start] + data[stop:]


def duplicate_range(data: bytes, _: bytes, random: Random) -> bytes:
    start, stop = _range(data, random)
    return data[:stop] + data[start:stop] * int(random.integers(1, 4)) + data[stop:]


def fill_range(data: bytes, _: bytes, random: Random) -> bytes:
    start, stop = _range(data, random)
    return data[:start] + bytes([random.integers(256)]) * (stop - start) + data[stop:]


def insert_noise(data: bytes, _: bytes, random: Random) -> bytes:
    start, stop = _range(data, random)
    return data[:start] + random.bytes(stop - start) + data[start:]


def splice(data: bytes, other: bytes, random: Random) -> bytes:
    """Join the beginning of one file and the end of another."""
    return data[: random.integers(len(data) + 1)] + other[random.integers(len(other) + 1) :]


def delete_part(data: bytes, _: bytes, random: Random) -> bytes:
    parts = _PARTS.split(data)
    del parts[random.integers(len(parts))]
    return b"".join(parts)


def duplicate_part(data: bytes, _: bytes, random: Random) -> bytes:
    parts = _PARTS.split(data)
    return b"".join([*parts, parts[random.integers(len(parts))]])


def swap_parts(data: bytes, _: bytes, random: Random) -> bytes:
    parts = _PARTS.split(data)
    one, two = random.integers(len(parts), size=2)
    parts[one], parts[two] = parts[two], parts[one]
    return b"".join(parts)


def borrow_part(data: bytes, other: bytes, random: Random) -> bytes:
    """Insert a piece of another file."""
    parts, others = _PARTS.split(data), _PARTS.split(other)
    parts.insert(int(random.integers(len(parts) + 1)), others[random.integers(len(others))])
    return b"".join(parts)


_MUTATIONS: tuple[Mutation, ...] = (
    flip_bits,
    set_bytes,
    set_field,
    set_field,
    add_to_field,
    truncate,
    delete_range,
    duplicate_range,
    fill_range,
    insert_noise,
    splice,
    delete_part,
    duplicate_part,
    swap_parts,
    borrow_part,
)


def _byte_order(random: Random) -> Literal["big", "little"]:
    return "big" if random.random() < 0.5 else "little"


def _positions(data: bytes, random: Random) -> list[int]:
    """Return up to eight positions, often in the header."""
    if not data:
        return []
    within = min(len(data), _HEADER) if random.random() < 0.5 else len(data)
    return [int(place) for place in random.integers(within, size=random.integers(1, 9))]


def _range(data: bytes, random: Random) -> tuple[int, int]:
    """Return a range of up to 64 bytes, or sometimes of any length."""
    start = int(random.integers(len(data) + 1))
    longest = 64 if random.random() < 0.8 else len(data)
    return start, min(len(data), start + int(random.integers(longest + 1)))


def _checksums_corrected(data: bytes) -> bytes:
    """Correct the CRC of every PNG chunk, or the file size in a RIFF header."""
    if data.startswith(b"RIFF"):
        return data[:4] + struct.pack("<I", max(0, len(data) - 8)) + data[8:]
    if not data.startswith(pngs.SIGNATURE):
        return data
    corrected, start = bytearray(data), len(pngs.SIGNATURE)
    while start + 12 <= len(data):
        stop = start + 8 + int.from_bytes(data[start : start + 4], "big")
        if stop + 4 > len(data):
            break
        corrected[stop : stop + 4] = struct.pack(">I", zlib.crc32(data[start + 4 : stop]))
        start = stop + 4
    return bytes(corrected)


def _picture(width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def _frames() -> dict[str, Any]:
    """Return options that make an animation.

    The dict is new each time, because saving an image as JPEG leaves options in it.
    """
    return {"save_all": True, "append_images": [_picture(48, 40).rotate(angle) for angle in (90, 180)]}


def _encoded(image: Image.Image, kind: str, options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    image.copy().save(buffer, kind, **options)
    return buffer.getvalue()
