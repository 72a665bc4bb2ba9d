"""Test the conversion to sRGB: profiles, the color chunks of PNG and their order, and hostile profiles."""

import io
import struct
import zlib
from typing import Any

import icc_profiles
import numpy as np
import pngs
import pytest
import tiffs
from numpy.typing import NDArray
from PIL import Image

from app.inference.images import color
from app.inference.images.encoded import EncodedImage

SPACES = [name for name in icc_profiles.RGB_SPACES if name != "sRGB"]
# 8 bits of another encoding are a few levels of sRGB in the dark.
TOLERANCES = {"Display P3": 6, "Adobe RGB": 10, "ProPhoto": 16, "linear sRGB": 7}
SRGB = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)


def decode(data: bytes) -> NDArray[np.uint8]:
    return EncodedImage(data, 1 << 24, 10_000_000).decode().transpose(1, 2, 0)


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:  # noqa: A002, the name that Pillow uses
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def difference(pixels: NDArray[np.uint8], expected: NDArray[np.uint8]) -> int:
    return int(np.abs(pixels.astype(int) - expected).max())


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize(
    ("format", "options"),
    [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 100, "subsampling": 0})],
)
def test_the_same_picture_in_another_color_space_gives_the_same_pixels(
    name: str,
    format: str,  # noqa: A002
    options: dict[str, Any],
) -> None:
    picture = SRGB if format != "JPEG" else np.asarray(Image.fromarray(SRGB[::8, ::8]).resize((32, 32)))
    converted = Image.fromarray(icc_profiles.from_srgb(picture, name))
    data = encode(converted, format, icc_profile=icc_profiles.rgb_profile(name), **options)
    pixels = decode(data)
    assert format == "JPEG" or difference(pixels, picture) <= TOLERANCES[name]
    untagged = decode(encode(converted, format, **options))
    assert np.abs(pixels.astype(int) - picture).mean() < np.abs(untagged.astype(int) - picture).mean() / 2


def test_a_profile_of_srgb_changes_nothing() -> None:
    data = encode(Image.fromarray(SRGB), icc_profile=icc_profiles.rgb_profile("sRGB"))
    np.testing.assert_array_equal(decode(data), SRGB)
    assert color._transforms.find(icc_profiles.rgb_profile("sRGB")) == ("RGB", None)


def test_colors_of_a_large_picture_are_converted_at_the_size_of_the_result() -> None:
    flat = np.full((300, 400, 3), (200, 60, 90), np.uint8)
    converted = Image.fromarray(icc_profiles.from_srgb(flat, "ProPhoto"))
    pixels = decode(encode(converted, icc_profile=icc_profiles.rgb_profile("ProPhoto")))
    assert difference(pixels, flat[:32, :32]) <= 3


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_transparent_pixels_of_a_profile_are_white(mode: str) -> None:
    image = Image.fromarray(icc_profiles.from_srgb(SRGB, "Adobe RGB")).convert("RGBA")
    image.putalpha(0)
    image = image.quantize(16) if mode == "P" else image.convert(mode) if mode == "RGB" else image
    pixels = decode(encode(image, icc_profile=icc_profiles.rgb_profile("Adobe RGB")))
    assert mode == "RGB" or (pixels == 255).all()


@pytest.mark.parametrize("mode", ["L", "LA"])
@pytest.mark.parametrize("is_gray_profile", [True, False])
def test_gray_is_converted_by_gray_and_rgb_profiles(mode: str, is_gray_profile: bool) -> None:
    light = np.tile(np.linspace(0.2, 1, 32), (32, 1))
    gray = np.rint(255 * light ** (1 / 1.8)).astype(np.uint8)
    profile = icc_profiles.gray_profile(1.8) if is_gray_profile else icc_profiles.rgb_profile("ProPhoto")
    pixels = decode(encode(Image.fromarray(gray).convert(mode), icc_profile=profile))
    expected = np.rint(255 * icc_profiles.encoded(light, icc_profiles.SRGB_CURVE)).astype(np.uint8)
    assert difference(pixels, np.repeat(expected[..., None], 3, 2)) <= 2


CMYK_COLORS = {
    "paper": ((0, 0, 0, 0), (255, 255, 255)),
    "cyan": ((255, 0, 0, 0), (0, 255, 255)),
    "red": ((0, 255, 255, 0), (255, 0, 0)),
    "black": ((0, 0, 0, 255), (0, 0, 0)),
    "half magenta": ((0, 128, 0, 0), (255, 188, 255)),
}


@pytest.mark.parametrize("name", CMYK_COLORS)
@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_is_converted_by_its_profile(name: str, format: str) -> None:  # noqa: A002
    inks, expected = CMYK_COLORS[name]
    image = Image.new("CMYK", (32, 32), inks)
    pixels = decode(encode(image, format, icc_profile=icc_profiles.cmyk_profile()))
    assert difference(pixels, np.full((32, 32, 3), expected, np.uint8)) <= 6


@pytest.mark.parametrize("transform", [0, 2], ids=["CMYK", "YCCK"])
def test_cmyk_jpegs_without_a_profile_have_their_colors(transform: int) -> None:
    """Photoshop stores the inks inverted. YCCK stores cyan, magenta and yellow as YCbCr."""
    data = encode(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG", quality=100, subsampling=0)
    place = data.index(b"Adobe")
    assert data[place + 11] in (0, 2)
    if data[place + 11] != transform:
        stored = Image.new("RGB", (32, 32), (0, 255, 255)).convert("YCbCr")  # libjpeg converts the inks as if RGB
        black = Image.new("L", (32, 32), 255)
        inks = Image.merge("CMYK", [Image.eval(each, lambda value: 255 - value) for each in (*stored.split(), black)])
        data = encode(inks, "JPEG", quality=100, subsampling=0)
        place = data.index(b"Adobe")
        data = data[: place + 11] + bytes([transform]) + data[place + 12 :]
    pixels = decode(data)
    assert difference(pixels, np.full((32, 32, 3), (255, 0, 0), np.uint8)) <= 4


def test_a_profile_of_another_kind_of_image_is_ignored() -> None:
    for profile in (icc_profiles.cmyk_profile(), icc_profiles.gray_profile(1.0)):
        np.testing.assert_array_equal(decode(encode(Image.fromarray(SRGB), icc_profile=profile)), SRGB)
    red = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    plain = decode(encode(red, "TIFF"))
    np.testing.assert_array_equal(decode(encode(red, "TIFF", icc_profile=icc_profiles.rgb_profile("ProPhoto"))), plain)


P3 = icc_profiles.rgb_profile("Display P3")
DAMAGED = {
    "empty": b"",
    "noise": bytes(range(256)) * 4,
    "cut off": P3[:200],
    "without its tags": P3[:128] + bytes(4),
    "of endless tags": P3[:128] + struct.pack(">L", 0xFFFFFFFF) + P3[132:],
    "whose colors lie elsewhere": P3.replace(b"rXYZ\0\0", b"rXYZ\x7f\xff"),
    "of another signature": P3[:36] + b"none" + P3[40:],
    "of version 5": P3[:8] + b"\5" + P3[9:],
    "of unbounded elements": icc_profiles.assemble("RGB ", {"D2B0": bytes(100)}),
    "of an abstract class": icc_profiles.assemble("RGB ", {}, device="abst"),
    "larger than the limit": icc_profiles.cmyk_profile(2, size=color.MAX_PROFILE_BYTES),
}


@pytest.mark.parametrize("profile", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_a_damaged_or_enormous_profile_is_ignored(profile: bytes, format: str) -> None:  # noqa: A002
    options = {"lossless": True} if format == "WEBP" else {}
    np.testing.assert_array_equal(decode(encode(Image.fromarray(SRGB), format, icc_profile=profile, **options)), SRGB)


def test_a_compressed_profile_is_not_unpacked_beyond_the_limit() -> None:
    bomb = pngs.chunk(b"iCCP", b"bomb\0\0" + zlib.compress(bytes(100 << 20)))
    np.testing.assert_array_equal(decode(pngs.png(SRGB, before=bomb)), SRGB)


def test_the_transforms_of_many_profiles_are_not_kept() -> None:
    transforms = color._Transforms()
    for number in range(100):
        transforms.find(icc_profiles.gray_profile(1.0 + number / 100))
    assert len(transforms._kept) == color._MAX_TRANSFORMS
    assert transforms.find(icc_profiles.gray_profile(1.99)) is transforms.find(icc_profiles.gray_profile(1.99))


def test_only_a_new_profile_adds_to_the_estimated_cost() -> None:
    profile = icc_profiles.gray_profile(1.2345)
    data = encode(Image.new("L", (32, 32)), icc_profile=profile)
    first = EncodedImage(data, 1 << 20, 1 << 20)
    first.decode()
    second = EncodedImage(data, 1 << 20, 1 << 20)
    assert first.cost.cpu_ms > second.cost.cpu_ms + 2
    large = encode(Image.new("CMYK", (32, 32)), "TIFF", icc_profile=icc_profiles.cmyk_profile(27))
    assert EncodedImage(large, 1 << 23, 1 << 20).cost.cpu_ms > 10


def gama(gamma: float) -> bytes:
    return pngs.chunk(b"gAMA", struct.pack(">L", round(gamma * 100_000)))


def chrm(name: str) -> bytes:
    primaries, white, _ = icc_profiles.RGB_SPACES[name]
    return pngs.chunk(b"cHRM", struct.pack(">8L", *(round(v * 100_000) for v in (*white, *sum(primaries, ())))))


def cicp(primaries: int, transfer: int, matrix: int = 0, full_range: int = 1) -> bytes:
    return pngs.chunk(b"cICP", bytes([primaries, transfer, matrix, full_range]))


def iccp(name: str) -> bytes:
    return pngs.chunk(b"iCCP", b"name\0\0" + zlib.compress(icc_profiles.rgb_profile(name)))


SRGB_CHUNK = pngs.chunk(b"sRGB", b"\0")
PNG_CHUNKS = {
    "linear gAMA": ("linear sRGB", gama(1.0)),
    "gAMA and cHRM of Adobe RGB": ("Adobe RGB", gama(256 / 563) + chrm("Adobe RGB")),
    "gAMA and cHRM of ProPhoto": ("ProPhoto", gama(1 / 1.8) + chrm("ProPhoto")),
    "cHRM of Display P3": ("Display P3", chrm("Display P3")),
    "cHRM of Adobe RGB and its rounded gAMA": ("Adobe RGB", gama(0.45455) + chrm("Adobe RGB")),
    "gAMA and cHRM of sRGB": ("sRGB", gama(0.45455) + chrm("sRGB")),
    "gAMA of sRGB": ("sRGB", gama(0.45455)),
    "impossible gAMA": ("sRGB", gama(0)),
    "impossible cHRM": ("sRGB", pngs.chunk(b"cHRM", bytes(32))),
    "cICP of Display P3": ("Display P3", cicp(12, 13)),
    "cICP of sRGB": ("sRGB", cicp(1, 13)),
    "linear cICP": ("linear sRGB", cicp(1, 8)),
    "iCCP": ("Display P3", iccp("Display P3")),
    "cICP before iCCP": ("Display P3", iccp("ProPhoto") + cicp(12, 13)),
    "cICP of sRGB before iCCP": ("sRGB", iccp("ProPhoto") + cicp(1, 13)),
    "cICP of high dynamic range is passed over": ("Display P3", cicp(9, 16) + iccp("Display P3")),
    "cICP of YCbCr is passed over": ("Display P3", cicp(9, 13, 1, 0) + iccp("Display P3")),
    "iCCP before sRGB": ("Adobe RGB", SRGB_CHUNK + iccp("Adobe RGB")),
    "iCCP before gAMA": ("Adobe RGB", gama(1.0) + iccp("Adobe RGB")),
    "sRGB before gAMA and cHRM": ("sRGB", SRGB_CHUNK + gama(1.0) + chrm("ProPhoto")),
    "damaged iCCP, then gAMA": ("linear sRGB", pngs.chunk(b"iCCP", b"name\0\0damaged") + gama(1.0)),
    "wrong checksum": ("sRGB", pngs.chunk(b"gAMA", struct.pack(">L", 100_000), damaged=True)),
    "cut-off gAMA": ("sRGB", pngs.chunk(b"gAMA", b"\0\0")),
}


@pytest.mark.parametrize(("name", "chunks"), PNG_CHUNKS.values(), ids=PNG_CHUNKS)
def test_the_color_chunks_of_a_png_are_used_in_the_order_of_its_specification(name: str, chunks: bytes) -> None:
    stored = SRGB if name == "sRGB" else icc_profiles.from_srgb(SRGB, name)
    pixels = decode(pngs.png(stored, before=chunks))
    assert difference(pixels, SRGB) <= (0 if name == "sRGB" else TOLERANCES[name])


@pytest.mark.parametrize("transfer", [1, 6, 14, 15])
def test_the_curve_of_bt_709_is_decoded(transfer: int) -> None:
    light = np.tile(np.linspace(0, 1, 32), (32, 1))
    stored = np.where(light < 0.018, 4.5 * light, 1.099 * np.maximum(light, 1e-9) ** 0.45 - 0.099)
    samples = np.repeat(np.rint(255 * stored)[..., None], 3, 2).astype(np.uint8)
    expected = np.rint(255 * icc_profiles.encoded(light, icc_profiles.SRGB_CURVE)).astype(np.uint8)
    assert difference(decode(pngs.png(samples, before=cicp(1, transfer))), np.repeat(expected[..., None], 3, 2)) <= 2


def test_gray_with_gama_stays_gray() -> None:
    samples = np.arange(1024).reshape(32, 32, 1) // 4
    pixels = decode(pngs.png(samples, pngs.GRAY, before=gama(1.0)))
    light = samples[..., 0] / 255
    expected = np.rint(255 * icc_profiles.encoded(light, icc_profiles.SRGB_CURVE)).astype(np.uint8)
    assert difference(pixels, np.repeat(expected[..., None], 3, 2)) <= 1


def test_cielab_with_a_profile_is_converted_as_cielab() -> None:
    samples = np.full((32, 32, 3), (255, 0, 0), np.uint8)
    assert (decode(tiffs.tiff(samples, tiffs.CIELAB, 8)) > 250).all()
