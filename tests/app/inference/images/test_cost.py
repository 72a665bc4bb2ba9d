"""Test the estimated decoding cost: hostile images raise it, photos of common encoders stay far below the limit."""

import io
import random
import struct
from contextlib import suppress
from typing import Any

import jpegs
import numpy as np
import pytest
from PIL import Image

from app.exceptions import DamagedImage, Problem, TooLarge
from app.inference.images.cost import DecodeCost
from app.inference.images.encoded import MAX_COST, EncodedImage
from app.machine import MIB

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8))


def cost(data: bytes) -> DecodeCost:
    return EncodedImage(data, 10 * MIB, 50_000_000).cost


def encode(image: Image.Image, format: str, **options: Any) -> bytes:  # noqa: A002, the name that Pillow uses
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo(width: int, height: int) -> Image.Image:
    return PHOTO.resize((width, height), Image.Resampling.BICUBIC)


def test_each_scan_of_a_jpeg_costs_its_blocks() -> None:
    few, many = cost(jpegs.with_scans(3, 1000)), cost(jpegs.with_scans(303, 1000))
    blocks = 125 * 125
    assert many.cpu_ms - few.cpu_ms == pytest.approx(300 * blocks * 16e-6, rel=0.1)
    assert many.memory_bytes == few.memory_bytes


def test_a_scan_that_refines_costs_more_than_another() -> None:
    assert cost(jpegs.with_refinements(100, 1000)).cpu_ms > 2 * cost(jpegs.with_scans(102, 1000)).cpu_ms


def test_a_jpeg_of_several_scans_needs_memory_for_all_coefficients() -> None:
    assert cost(jpegs.with_scans(3, 4000)).memory_bytes >= 4000 * 4000 * 3 * 2
    one_scan = jpegs.head(4000, 4000) + jpegs.scan([1, 2, 3]) + jpegs.END
    assert cost(one_scan).memory_bytes < 8 * MIB


def test_arithmetic_coding_costs_more_than_huffman_coding() -> None:
    scans = jpegs.scan([1, 2, 3]) + jpegs.END
    arithmetic = jpegs.head(1000, 1000, jpegs.ARITHMETIC) + scans
    assert cost(arithmetic).cpu_ms > 2 * cost(jpegs.head(1000, 1000) + scans).cpu_ms


@pytest.mark.parametrize("between", [b"", b"\xff\xff\xff", b"\xff\x01", b"abc", b"\xff\xfe\0\x06\xff\xd9ab", b"\xff\0"])
def test_scans_are_counted_as_libjpeg_finds_them(between: bytes) -> None:
    """Fill bytes, garbage and an end marker within a comment do not hide the scans that follow them."""
    hidden = jpegs.head(1000, 1000) + jpegs.scan([1]) + between + 200 * jpegs.scan([2]) + jpegs.END
    assert cost(hidden).cpu_ms > cost(jpegs.with_scans(200, 1000)).cpu_ms * 0.9


def test_what_follows_the_end_of_a_jpeg_costs_nothing() -> None:
    """Phones append videos, which contain scan markers by chance."""
    image = encode(photo(1000, 750), "JPEG", progressive=True)
    attached = image + 400 * jpegs.scan([1])
    assert cost(attached).cpu_ms == pytest.approx(cost(image).cpu_ms, rel=0.2)


@pytest.mark.parametrize(
    "data",
    [jpegs.with_scans(498, 7071), jpegs.with_refinements(480, 3160), jpegs.with_scans(501, 32)],
    ids=["scans of 50 megapixels", "refinements of 10 megapixels", "scans of a small image"],
)
def test_a_jpeg_that_takes_seconds_is_refused_before_it_is_decoded(data: bytes) -> None:
    with pytest.raises(TooLarge, match=r"CPU time|scans"):
        cost(data)


def test_an_image_that_needs_too_much_memory_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(TooLarge, match="762 MiB of memory, the limit is 320 MiB"):
        cost(encode(Image.new("RGB", (7071, 7071)), "WEBP", lossless=True))


# Scan scripts of progressive encoders. Each scan: components, spectral selection start and end, successive
# approximation high and low.
LIBJPEG = [
    ([1, 2, 3], 0, 0, 0, 1), ([1], 1, 5, 0, 2), ([3], 1, 63, 0, 1), ([2], 1, 63, 0, 1), ([1], 6, 63, 0, 2),
    ([1], 1, 63, 2, 1), ([1, 2, 3], 0, 0, 1, 0), ([3], 1, 63, 1, 0), ([2], 1, 63, 1, 0), ([1], 1, 63, 1, 0),
]  # fmt: skip
MOZJPEG = [
    ([1, 2, 3], 0, 0, 0, 0), ([1], 1, 8, 0, 2), ([2], 1, 8, 0, 0), ([3], 1, 8, 0, 0), ([1], 9, 63, 0, 2),
    ([1], 1, 63, 2, 1), ([1], 1, 63, 1, 0), ([2], 9, 63, 0, 0), ([3], 9, 63, 0, 0),
]  # fmt: skip
PHOTOSHOP = [([1, 2, 3], 0, 0, 0, 0)] + [([n], a, b, 0, 0) for a, b in ((1, 2), (3, 9), (10, 63)) for n in (1, 2, 3)]


@pytest.mark.parametrize("script", [LIBJPEG, MOZJPEG, PHOTOSHOP], ids=["libjpeg", "mozjpeg", "photoshop"])
@pytest.mark.parametrize("size", [(4032, 3024), (8064, 6048)])
def test_progressive_photos_of_common_encoders_are_accepted(script: list[Any], size: tuple[int, int]) -> None:
    data = bytes(10 * MIB // len(script) - 1000)  # fills the byte limit
    scans = b"".join(jpegs.scan(*each) + data for each in script)
    estimate = cost(jpegs.head(*size, jpegs.PROGRESSIVE) + scans + jpegs.END)
    assert not estimate.exceeds(MAX_COST)


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True, "subsampling": 0}),
        ("PNG", {"compress_level": 1}),
        ("WEBP", {"method": 0}),
        ("TIFF", {}),
        ("BMP", {}),
    ],
)
def test_real_photos_are_far_from_the_limit(format: str, options: dict[str, Any]) -> None:  # noqa: A002
    assert cost(encode(photo(2000, 1500), format, **options)).cpu_ms < MAX_COST.cpu_ms / 5


def test_a_photo_of_a_web_page_is_cheap() -> None:
    assert cost(encode(photo(500, 375), "JPEG", quality=90)).cpu_ms < 3


def test_tiles_that_extend_beyond_a_tiff_cost_their_pixels() -> None:
    tiff = encode(Image.new("L", (64, 64)), "TIFF")
    tiled = with_tags(tiff, {322: 6400, 323: 6400, 324: 8, 325: 8})
    assert cost(tiled).cpu_ms > cost(encode(Image.new("L", (6400, 6400)), "PNG")).cpu_ms / 2


def with_tags(tiff: bytes, tags: dict[int, int]) -> bytes:
    """Return a little-endian TIFF whose directory has these additional tags and no strips."""
    start = struct.unpack_from("<L", tiff, 4)[0]
    count = struct.unpack_from("<H", tiff, start)[0]
    entries = [tiff[start + 2 + 12 * n : start + 14 + 12 * n] for n in range(count)]
    kept = [entry for entry in entries if struct.unpack_from("<H", entry)[0] not in (273, 278, 279)]
    kept += [struct.pack("<HHLL", tag, 4, 1, value) for tag, value in tags.items()]
    kept.sort(key=lambda entry: struct.unpack_from("<H", entry)[0])
    return tiff[:4] + struct.pack("<L", len(tiff)) + tiff[8:] + struct.pack("<H", len(kept)) + b"".join(kept) + bytes(4)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow emits it; `app.inference.images.encoded` ignores it too
def test_damaged_headers_raise_only_problems() -> None:
    chance = random.Random(0)  # noqa: S311
    originals = [jpegs.with_scans(5, 100), encode(photo(64, 48), "PNG"), encode(photo(64, 48), "TIFF")]
    for number in range(600):
        data = bytearray(originals[number % 3])
        for _ in range(4):
            data[chance.randrange(len(data))] = chance.randrange(256)
        with suppress(Problem):
            assert cost(bytes(data[: chance.randrange(1, len(data) + 1)])).cpu_ms >= 0


def test_a_jpeg_whose_components_have_no_samples_is_damaged() -> None:
    data = jpegs.head(64, 64) + jpegs.scan([1, 2, 3]) + jpegs.END
    with pytest.raises(DamagedImage, match="header is damaged"):
        cost(data.replace(b"\1\x11\0\2\x11\1\3\x11\1", b"\1\0\0\2\0\1\3\0\1"))
