"""Test that every depth, transparency and layout of PNG, TIFF, BMP, GIF and WebP gives the pixels that it encodes.

The PNG and TIFF files come from writers of their own (tests/helpers), so the right pixels are known without Pillow.
"""

import io
import itertools
import re
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pngs
import pytest
import tiffs
from numpy.typing import NDArray
from PIL import Image

from app.exceptions import UnsupportedImage
from app.inference.images.encoded import EncodedImage

Samples = NDArray[Any]
Pixels = NDArray[np.float64]
RANDOM = np.random.default_rng(0)


def decode(data: bytes) -> Pixels:
    """Return the decoded pixels, [height, width, 3], from 0 to 255."""
    return EncodedImage(data, 1 << 24, 10_000_000).decode().transpose(1, 2, 0).astype(float)


def decode_or_refusal(data: bytes) -> Pixels | str:
    """Return the decoded pixels, or the reason why the image is not supported."""
    try:
        return decode(data)
    except UnsupportedImage as error:
        return error.detail


def over_white(color: Pixels, alpha: Pixels | float = 1.0) -> Pixels:
    """Return 8-bit RGB of gray or RGB from 0 to 1 over white."""
    pixels = 255 * (color * alpha + 1 - np.asarray(alpha))
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def assert_close(pixels: Pixels, expected: Pixels, tolerance: float = 1.01) -> None:
    assert np.abs(pixels - expected).max() <= tolerance


def png_cases() -> Iterator[Any]:
    for color_type, depths in pngs.DEPTHS.items():
        for depth, interlaced in itertools.product(depths, (False, True)):
            for transparent in (False, True) if color_type in (pngs.GRAY, pngs.RGB, pngs.PALETTE) else (False,):
                yield color_type, depth, interlaced, transparent


def png_picture(color_type: int, depth: int, transparent: bool) -> tuple[Samples, bytes, Pixels]:
    """Return samples, the chunks that they need, and their pixels."""
    white = 2**depth - 1
    samples = RANDOM.integers(0, white + 1, (32, 32, pngs.CHANNELS[color_type]))
    if color_type == pngs.PALETTE:
        palette, alpha = RANDOM.integers(0, 256, (white + 1, 3)), RANDOM.integers(0, 256, white + 1)
        chunks = pngs.chunk(b"PLTE", palette.astype(np.uint8).tobytes())
        chunks += pngs.chunk(b"tRNS", alpha.astype(np.uint8).tobytes()) if transparent else b""
        opacity = alpha[samples] / 255 if transparent else 1.0
        return samples, chunks, over_white(palette[samples[..., 0]] / 255, opacity)
    if color_type in (pngs.GRAY_ALPHA, pngs.RGBA):
        samples[..., -1] = white * RANDOM.integers(0, 2, (32, 32))
        return samples, b"", over_white(samples[..., :-1] / white, samples[..., -1:] / white)
    if not transparent:
        return samples, b"", over_white(samples / white)
    key = samples[0, 0].copy()
    samples[8:12] = key
    samples[12:16] = key ^ 1  # differs from the transparent color in the lowest bit only
    chunk = pngs.chunk(b"tRNS", key.astype(">u2").tobytes())
    return samples, chunk, over_white(samples / white, 1.0 - (samples == key).all(-1, keepdims=True))


@pytest.mark.parametrize(("color_type", "depth", "interlaced", "transparent"), list(png_cases()))
def test_every_png_has_the_pixels_that_it_encodes(
    color_type: int, depth: int, interlaced: bool, transparent: bool
) -> None:
    samples, chunks, expected = png_picture(color_type, depth, transparent)
    assert_close(decode(pngs.png(samples, color_type, depth, interlaced=interlaced, before=chunks)), expected)


def test_a_transparent_16_bit_color_is_white_in_a_large_picture() -> None:
    samples = np.full((64, 64, 3), 1000)
    samples[32:] = (1000, 1001, 1000)
    key = pngs.chunk(b"tRNS", struct.pack(">3H", 1000, 1000, 1000))
    pixels = decode(pngs.png(samples, pngs.RGB, 16, before=key))
    assert (pixels[:15] == 255).all()
    assert (pixels[17:] < 8).all()


PREDICTORS = {tiffs.UNSIGNED: 1, tiffs.SIGNED: 2, tiffs.FLOAT: 3}
TIFF_SAMPLES = [
    *((bits, tiffs.UNSIGNED) for bits in (1, 2, 4, 8, 10, 12, 14, 16, 32)),
    *((bits, tiffs.SIGNED) for bits in (8, 16, 32)),
    *((bits, tiffs.FLOAT) for bits in (16, 32, 64)),
]
CHANNELS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}
MUST_DECODE = {  # photometric interpretation, bits: every file without alpha that has neither planes nor reversed bits
    *itertools.product((tiffs.MIN_IS_WHITE, tiffs.MIN_IS_BLACK), (1, 2, 4, 8)),
    *itertools.product((tiffs.PALETTE,), (1, 2, 4, 8)),
    *itertools.product((tiffs.MIN_IS_BLACK, tiffs.RGB, tiffs.CMYK), (8, 16)),
}


def tiff_picture(photometric: int, bits: int, sample_format: int, extra: tuple[int, ...]) -> Any:
    """Return samples, further tags, and their pixels. These are None for colors that another test knows."""
    shape = (32, 32, CHANNELS[photometric] + len(extra))
    if sample_format == tiffs.FLOAT:
        return RANDOM.random(shape).astype(f"f{bits // 8}"), {}, None
    if sample_format == tiffs.SIGNED:
        return RANDOM.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).astype(f"i{bits // 8}"), {}, None
    size = 1 if bits <= 8 else 2 if bits <= 16 else 4
    samples = RANDOM.integers(0, 2**bits, shape).astype(f"u{size}")
    values, white, channels = samples / (2.0**bits - 1), 2**bits - 1, CHANNELS[photometric]
    alpha = values[..., channels : channels + 1] if extra in ((1,), (2,)) else 1.0
    tags = {}
    if photometric == tiffs.PALETTE:
        palette = RANDOM.integers(0, 256, (3, 2**bits)) * 257
        tags = {320: tuple(palette.reshape(-1).tolist())}
        color = palette.T[samples[..., 0]] / 65535
    elif photometric == tiffs.CMYK:
        color = (1 - values[..., :3]) * (1 - values[..., 3:4])
    elif photometric == tiffs.CIELAB:
        return samples, {}, None
    elif photometric == tiffs.YCBCR:
        tags = {530: (1, 1)}
        y, cb, cr = values[..., 0], values[..., 1] - 128 / 255, values[..., 2] - 128 / 255
        color = np.clip(np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], -1), 0, 1)
    else:
        color = values[..., :channels]
        color = 1 - color if photometric == tiffs.MIN_IS_WHITE else color
    if extra == (1,) and photometric in (tiffs.MIN_IS_WHITE, tiffs.MIN_IS_BLACK, tiffs.RGB):
        samples[..., :channels] = np.rint(color * alpha * white)
    return samples, tags, over_white(color, alpha)


FLAGS = ("planar", "big_endian", "tiled", "reversed_bits")
FLAG_SETS = [*itertools.combinations(FLAGS, 0), *itertools.combinations(FLAGS, 1), ("planar", "tiled")]


def tiff_variants(bits: int, sample_format: int, channels: int) -> Iterator[dict[str, Any]]:
    """Yield the layouts to test: of samples that are refused only two."""
    if sample_format != tiffs.UNSIGNED or bits in (10, 14, 32):
        yield {"compression": tiffs.RAW}
        yield {"compression": tiffs.DEFLATE, "predictor": PREDICTORS[sample_format], "big_endian": True}
        return
    for compression, flags in itertools.product((tiffs.RAW, tiffs.LZW, tiffs.DEFLATE, tiffs.PACKBITS), FLAG_SETS):
        if ("planar" in flags and channels == 1) or ("tiled" in flags and compression == tiffs.PACKBITS):
            continue
        variant = {"compression": compression, **dict.fromkeys(flags, True)}
        yield variant
        if bits in (8, 16) and compression in (tiffs.LZW, tiffs.DEFLATE) and "reversed_bits" not in flags:
            yield variant | {"predictor": 2}


@pytest.mark.parametrize("extra", [(), (0,), (1,), (2,)], ids=["plain", "unused channel", "premultiplied", "alpha"])
@pytest.mark.parametrize("photometric", list(CHANNELS))
def test_every_tiff_has_the_pixels_that_it_encodes_or_is_refused_by_name(
    photometric: int, extra: tuple[int, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    refused = set()
    for bits, sample_format in TIFF_SAMPLES:
        if photometric == tiffs.PALETTE and (bits > 8 or sample_format != tiffs.UNSIGNED):
            continue
        samples, tags, expected = tiff_picture(photometric, bits, sample_format, extra)
        # Pillow rounds premultiplied samples to 8 bits before it divides them by alpha.
        tolerance = 4.0 if extra == (1,) else 2.5
        for variant in tiff_variants(bits, sample_format, samples.shape[2]):
            data = tiffs.tiff(
                samples, photometric, bits, sample_format=sample_format, extra=extra, tags=tags, **variant
            )
            decoded = decode_or_refusal(data)
            if isinstance(decoded, str):
                kind = {tiffs.UNSIGNED: "", tiffs.SIGNED: "signed ", tiffs.FLOAT: "floating-point "}[sample_format]
                assert re.search(rf"a TIFF with {samples.shape[2]} samples? of {bits} {kind}bits", decoded)
                if not (variant.get("planar") or variant.get("reversed_bits")):
                    refused.add((photometric, bits, sample_format))
            else:
                assert sample_format == tiffs.UNSIGNED
                expected = decoded if expected is None else expected  # CIELAB: all layouts have the same pixels
                assert_close(decoded, expected, tolerance)
    if not extra:
        assert not {(kind, bits, tiffs.UNSIGNED) for kind, bits in MUST_DECODE} & refused
    capfd.readouterr()  # libtiff prints unknown tags


@pytest.mark.parametrize("compression", [tiffs.RAW, tiffs.LZW, tiffs.DEFLATE])
@pytest.mark.parametrize("photometric", [tiffs.MIN_IS_WHITE, tiffs.MIN_IS_BLACK])
def test_gray_tiffs_of_16_bits_are_decoded(photometric: int, compression: int) -> None:
    samples = RANDOM.integers(0, 1 << 16, (32, 32, 1)).astype(np.uint16)
    values = samples / 65535 if photometric else 1 - samples / 65535
    assert_close(decode(tiffs.tiff(samples, photometric, 16, compression=compression)), over_white(values))


def test_gray_tiffs_of_12_bits_are_decoded() -> None:
    samples = RANDOM.integers(0, 1 << 12, (32, 32, 1)).astype(np.uint16)
    assert_close(decode(tiffs.tiff(samples, tiffs.MIN_IS_BLACK, 12)), over_white(samples / 4095))


def test_cielab_tiffs_have_their_colors() -> None:
    # Red, green, blue and white of sRGB. The lightness has 255 levels.
    lab = np.array([[54 * 2.55, 81, 70], [88 * 2.55, -79, 81], [30 * 2.55, 68, -112], [255, 0, 0]])
    samples = np.repeat(np.repeat(np.rint(lab)[:, None], 32, axis=1), 8, axis=0).astype(np.int16).astype(np.uint8)
    pixels = decode(tiffs.tiff(samples, tiffs.CIELAB, 8))
    expected = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]])
    assert_close(pixels[4::8, 16], expected, 26.0)  # the corners of sRGB are at the edge of 8-bit CIELAB


def test_uncompressed_ycbcr_is_decoded_only_without_subsampling() -> None:
    samples = np.full((32, 32, 3), 128, np.uint8)
    samples[..., 0] = 200
    assert_close(decode(tiffs.tiff(samples, tiffs.YCBCR, 8, tags={530: (1, 1)})), np.full((32, 32, 3), 200.0))
    with pytest.raises(UnsupportedImage, match=r"YCbCr"):
        decode(tiffs.tiff(samples, tiffs.YCBCR, 8))


@pytest.mark.parametrize(
    ("compression", "name"),
    [(33003, "JPEG 2000"), (50002, "JPEG XL"), (34712, "JPEG 2000"), (65000, r"unknown \(65000\)")],
)
def test_a_tiff_of_another_compression_is_refused_by_name(compression: int, name: str) -> None:
    samples = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(UnsupportedImage, match=rf"3 samples of 8 bits \(RGB, {name} compression\)"):
        decode(tiffs.tiff(samples, tiffs.RGB, 8, compression=compression))


def bmp(
    rows: bytes, bits: int, *, compression: int = 0, palette: bytes = b"", colors: int = 0, masks: bytes = b""
) -> bytes:
    """Return a BMP of 32x32 pixels. The rows are from the bottom up."""
    offset = 14 + 40 + len(masks) + len(palette)
    header = struct.pack("<LiiHHLLiiLL", 40, 32, 32, 1, bits, compression, len(rows), 0, 0, colors, 0)
    return struct.pack("<2sLHHL", b"BM", offset + len(rows), 0, 0, offset) + header + masks + palette + rows


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("gray", [False, True])
def test_every_bmp_with_a_palette_has_its_colors(bits: int, gray: bool) -> None:
    indices = RANDOM.integers(0, 2**bits, (32, 32))
    palette = RANDOM.integers(0, 256, (2**bits, 3))
    if gray:
        palette[:] = np.rint(np.linspace(0, 255, 2**bits))[:, None]
    rows = indices[::-1, :, None] >> np.arange(bits - 1, -1, -1) & 1
    data = np.packbits(rows.reshape(32, -1).astype(np.uint8), axis=1).tobytes()
    table = np.insert(palette[:, ::-1], 3, 0, axis=1).astype(np.uint8).tobytes()
    assert_close(decode(bmp(data, bits, palette=table)), palette[indices].astype(float))


@pytest.mark.parametrize(
    ("bits", "palette"),
    [(8, [0, 255]), (4, [17 * 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]), (4, [0, 255])],
    ids=["8 bits, black and white", "4 bits, the darkest grays", "4 bits, black and white"],
)
def test_a_bmp_whose_gray_palette_pillow_misreads_is_refused_by_name(bits: int, palette: list[int]) -> None:
    table = b"".join(bytes([level] * 3 + [0]) for level in palette)
    with pytest.raises(UnsupportedImage, match=f"a BMP with {bits} bits and a gray palette"):
        decode(bmp(bytes(32 * 32 * bits // 8), bits, palette=table, colors=len(palette)))


@pytest.mark.parametrize(
    ("bits", "masks"),
    [
        (16, ()),
        (16, (0x7C00, 0x3E0, 0x1F)),
        (16, (0xF800, 0x7E0, 0x1F)),
        (24, ()),
        (32, ()),
        (32, (0xFF0000, 0xFF00, 0xFF)),
    ],
)
def test_every_bmp_of_true_color_has_its_colors(bits: int, masks: tuple[int, ...]) -> None:
    channels = masks or {16: (0x7C00, 0x3E0, 0x1F)}.get(bits, (0xFF0000, 0xFF00, 0xFF))
    words, expected = np.zeros((32, 32), np.int64), np.zeros((32, 32, 3))
    for number, mask in enumerate(channels):
        step = mask & -mask
        values = RANDOM.integers(0, mask // step + 1, (32, 32))
        words |= values * step
        expected[..., number] = 255 * values / (mask // step)
    rows = words[::-1].astype("<u4").view(np.uint8).reshape(32, 32, 4)[..., : bits // 8].tobytes()
    packed = struct.pack(f"<{len(masks)}L", *masks)
    tolerance = 1.01 if bits > 16 else 4.2  # Pillow shifts 5 bits to 8 without repeating the upper ones
    assert_close(decode(bmp(rows, bits, compression=3 if masks else 0, masks=packed)), expected, tolerance)


def test_a_gif_is_white_where_its_first_frame_does_not_cover_the_canvas() -> None:
    for colors in (b"\xff\0\0\0\0\xff", b"\0\0\0\xff\xff\xff"):
        frame = Image.new("P", (16, 8), 1)
        frame.putpalette(colors)
        buffer = io.BytesIO()
        frame.save(buffer, "GIF")
        data = bytearray(buffer.getvalue())
        data[6:10] = struct.pack("<HH", 32, 32)  # the size of the canvas
        place = data.index(b"\x2c")
        data[place + 1 : place + 5] = struct.pack("<HH", 4, 10)
        pixels = decode(bytes(data))
        expected = np.full((32, 32, 3), 255.0)
        expected[10:18, 4:20] = list(colors[3:])
        assert_close(pixels, expected)


@pytest.mark.parametrize("disposal", [0, 1, 2, 3])
def test_a_gif_shows_its_first_frame_whatever_its_disposal(disposal: int) -> None:
    first, second = (Image.new("RGB", (32, 32), color) for color in ("red", "blue"))
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=[second], disposal=disposal)
    assert_close(decode(buffer.getvalue()), np.tile([255.0, 0, 0], (32, 32, 1)))


@pytest.mark.parametrize("size", [(32, 32), (20, 24)])
def test_a_transparent_color_of_a_gif_is_white(size: tuple[int, int]) -> None:
    frame = Image.new("P", size, 0)
    frame.putpalette([9, 9, 9, 200, 0, 0])
    frame.paste(1, (0, 0, size[0] // 2, size[1]))
    buffer = io.BytesIO()
    frame.save(buffer, "GIF", transparency=1)
    pixels = decode(buffer.getvalue())
    assert (pixels[:, :12] == 255).all()
    assert (pixels[:, 20:] < 20).all()


def test_an_animated_png_shows_its_default_image() -> None:
    first, second = (Image.new("RGBA", (32, 32), color) for color in ("red", "blue"))
    for default in (False, True):
        buffer = io.BytesIO()
        first.save(buffer, "PNG", save_all=True, append_images=[second, first], default_image=default)
        assert_close(decode(buffer.getvalue()), np.tile([255.0, 0, 0], (32, 32, 1)))


def test_an_animated_png_with_frames_out_of_order_shows_its_default_image() -> None:
    frame = pngs.chunk(b"fcTL", struct.pack(">LLLLLHHBB", 7, 32, 32, 0, 0, 1, 1, 0, 0))
    animation = pngs.chunk(b"acTL", struct.pack(">LL", 2, 0)) + frame
    samples = RANDOM.integers(0, 256, (32, 32, 3))
    assert_close(decode(pngs.png(samples, before=animation)), samples.astype(float))


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_an_animated_webp_shows_its_first_frame(mode: str) -> None:
    first, second = (Image.new(mode, (32, 32), color) for color in ("red", "blue"))
    buffer = io.BytesIO()
    first.save(buffer, "WEBP", save_all=True, append_images=[second], lossless=True)
    assert_close(decode(buffer.getvalue()), np.tile([255.0, 0, 0], (32, 32, 1)))


def test_the_levels_of_a_lossless_webp_are_exact() -> None:
    samples = RANDOM.integers(0, 256, (32, 32, 4)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(samples).save(buffer, "WEBP", lossless=True, exact=True)
    assert_close(decode(buffer.getvalue()), over_white(samples[..., :3] / 255, samples[..., 3:] / 255))


@pytest.mark.parametrize("tag", [258, 277, 339])
def test_a_tag_of_a_tiff_without_values_has_its_default(tag: int) -> None:
    data = tiffs.tiff(np.full((32, 32, 1), 255, np.uint8), tiffs.MIN_IS_BLACK, 8)
    place = data.index(struct.pack("<HHL", tag, 3, 1))
    assert (decode(data[: place + 4] + bytes(8) + data[place + 12 :]) == 255).all()
