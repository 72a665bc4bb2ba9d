"""Test decoding untrusted bytes to pixels: every format and mode, every limit, every kind of damage."""

import io
import struct
import zlib
from typing import Any

import jpegs
import numpy as np
import pngs
import pytest
from numpy.typing import NDArray
from PIL import Image

from app import machine
from app.exceptions import DamagedImage, Problem, TooLarge, UnsupportedImage
from app.inference.images import encoded
from app.inference.images.encoded import CostlyImage, EncodedImage


def decode(data: bytes, max_bytes: int = 10 << 20, max_pixels: int = 10_000_000) -> NDArray[np.uint8]:
    return EncodedImage(data, max_bytes, max_pixels).decode()


def encode(image: Image.Image, format: str, **options: Any) -> bytes:  # noqa: A002, the name that Pillow uses
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize(
    ("format", "options"),
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})],
)
def test_a_32x32_image_passes_through_unchanged(format: str, options: dict[str, Any]) -> None:  # noqa: A002
    pixels = noise(32, 32, 3)
    decoded = decode(encode(Image.fromarray(pixels), format, **options))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded.transpose(1, 2, 0), pixels)


def test_a_32x32_jpeg_is_what_pillow_decodes() -> None:
    data = encode(Image.fromarray(noise(32, 32, 3)), "JPEG")
    np.testing.assert_array_equal(decode(data).transpose(1, 2, 0), np.asarray(Image.open(io.BytesIO(data))))


def test_grey_is_the_same_in_every_channel() -> None:
    grey = noise(32, 32)
    np.testing.assert_array_equal(decode(encode(Image.fromarray(grey), "PNG")), np.stack([grey] * 3))


def test_black_and_white_becomes_0_and_255() -> None:
    decoded = decode(encode(Image.fromarray(noise(32, 32)).convert("1"), "PNG"))
    assert set(np.unique(decoded)) == {0, 255}


def test_16_bit_grey_is_scaled_to_8_bit() -> None:
    grey = noise(32, 32)
    decoded = decode(encode(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"))
    np.testing.assert_array_equal(decoded[0], grey)


def test_palette_becomes_its_colours() -> None:
    image = Image.fromarray(noise(32, 32, 3)).quantize(16)
    np.testing.assert_array_equal(decode(encode(image, "PNG")).transpose(1, 2, 0), np.asarray(image.convert("RGB")))


def test_the_first_frame_of_a_gif_is_taken() -> None:
    red, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    decoded = decode(encode(red, "GIF", save_all=True, append_images=[blue]))
    np.testing.assert_array_equal(decoded[:, 5, 5], (255, 0, 0))


@pytest.mark.parametrize("size", [(32, 32), (100, 60)])
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_transparent_pixels_are_white(format: str, size: tuple[int, int]) -> None:  # noqa: A002
    decoded = decode(encode(Image.new("RGBA", size, (10, 20, 30, 0)), format))
    assert (decoded == 255).all()


def test_half_transparent_black_is_grey() -> None:
    decoded = decode(encode(Image.new("LA", (32, 32), (0, 128)), "PNG"))
    assert abs(decoded.astype(int) - 127).max() <= 1


def test_palette_transparency_is_white() -> None:
    image = Image.new("P", (32, 32), 0)
    image.putpalette([200, 0, 0, 0, 0, 200])
    assert (decode(encode(image, "PNG", transparency=0)) == 255).all()


def test_cmyk_jpeg_becomes_rgb() -> None:
    decoded = decode(encode(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG"))
    red, green, blue = decoded[:, 16, 16].astype(int)
    assert red > 200
    assert green < 60
    assert blue < 60


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (31, 31)), (6, (0, 31)), (8, (31, 0))])
def test_exif_orientation_is_applied(orientation: int, corner: tuple[int, int]) -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode(encode(Image.fromarray(pixels), "PNG", exif=exif))
    assert np.argwhere(decoded[0] == 255).tolist() == [list(corner)]


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (1, 400), (33, 31), (4, 4)])
def test_any_shape_becomes_32x32(size: tuple[int, int]) -> None:
    assert decode(encode(Image.new("RGB", size, "teal"), "PNG")).shape == (3, 32, 32)


def test_the_central_square_is_taken() -> None:
    image = Image.new("RGB", (96, 32), "red")
    image.paste("lime", (32, 0, 64, 32))
    np.testing.assert_array_equal(decode(encode(image, "PNG"))[:, 16, 16], (0, 255, 0))
    assert (decode(encode(image, "PNG"))[1] == 255).all()


def test_downsampling_is_antialiased() -> None:
    checks = np.kron(np.indices((256, 256)).sum(0) % 2, np.ones((1, 1))).astype(np.uint8) * 255
    decoded = decode(encode(Image.fromarray(checks), "PNG"))
    assert abs(decoded.astype(int) - 127).max() < 10


def test_a_scaled_jpeg_is_close_to_the_full_decode() -> None:
    smooth = Image.fromarray(noise(6, 8, 3)).resize((800, 600), Image.Resampling.BICUBIC)
    jpeg, png = decode(encode(smooth, "JPEG", quality=95)), decode(encode(smooth, "PNG"))
    assert abs(jpeg.astype(int) - png).mean() < 2


@pytest.mark.parametrize("data", [b"hello", bytes(1000), b"\0\0\0\x18ftyp"])
def test_what_is_not_an_image_is_unsupported(data: bytes) -> None:
    with pytest.raises(UnsupportedImage, match="supported formats are JPEG, PNG"):
        decode(data)


def test_an_image_of_another_format_is_unsupported() -> None:
    with pytest.raises(UnsupportedImage):
        decode(encode(Image.new("RGB", (32, 32)), "PPM"))


def test_nothing_is_damaged() -> None:
    with pytest.raises(DamagedImage, match="empty"):
        decode(b"")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_image_is_a_problem_and_not_a_crash(format: str) -> None:  # noqa: A002
    data = encode(Image.fromarray(noise(64, 64, 3)), format)
    for length in (len(data) // 4, len(data) // 2, len(data) - len(data) // 4):
        with pytest.raises(Problem):
            decode(data[:length])


def test_a_phones_jpeg_with_a_preview_is_decoded_as_a_jpeg() -> None:
    photo, preview = (Image.fromarray(noise(640, 480, 3)) for _ in range(2))
    buffer = io.BytesIO()
    photo.save(buffer, "MPO", save_all=True, append_images=[preview])
    np.testing.assert_array_equal(decode(buffer.getvalue()), decode(encode(photo, "JPEG")))


def test_more_bytes_than_allowed_are_too_large() -> None:
    with pytest.raises(TooLarge, match="more than 100 bytes"):
        decode(bytes(101), max_bytes=100)


def test_more_pixels_than_allowed_are_refused_before_decoding() -> None:
    bomb = encode(Image.new("1", (5000, 5000)), "PNG")
    # Only the header is passed, so decoding would raise a different error.
    with pytest.raises(TooLarge, match="5000x5000 pixels"):
        decode(bomb[:100])


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_of_endless_scans_is_refused_before_decoding(progressive: bool) -> None:
    data = encode(Image.new("RGB", (64, 64), "teal"), "JPEG", progressive=progressive)
    begin, end = data.index(b"\xff\xda"), len(data) - 2
    last = 0 if progressive else 63  # the scan holds the DC coefficients of a component, or all coefficients
    scan = b"\xff\xda" + bytes([0, 8, 1, 1, 0, 0, last, 0])
    decode(data)
    decode(data[:begin] + 400 * scan + data[begin:])
    with pytest.raises(TooLarge, match="500 scans"):
        decode(data[:begin] + 500 * scan + data[begin:end])


@pytest.mark.parametrize(
    ("format", "before", "part"),
    [
        ("JPEG", b"\xff\xdb", b"\xff\xfe\0\x02"),
        ("PNG", b"\0\0\0\0IEND", b"\0\0\0\0IDAT5\xaf\x06\x1e"),
        ("GIF", b"\x2c\0\0", b"\x21\xfe\x01c\0"),
    ],
)
def test_an_image_of_endless_parts_is_refused(format: str, before: bytes, part: bytes) -> None:  # noqa: A002
    data = encode(Image.fromarray(noise(32, 32)), format)
    place = data.index(before)
    decode(data[:place] + 100 * part + data[place:])
    with pytest.raises(TooLarge, match=r"more (parts|than)"):
        decode(data[:place] + 60_000 * part + data[place:])


@pytest.mark.parametrize(
    ("format", "before", "part"),
    [
        ("JPEG", b"\xff\xdb", b"\xff\xfe\0\x02"),
        ("JPEG", b"\xff\xd9", b"\xff\xfe\0\x02"),
        ("PNG", b"\0\0\0\0IEND", pngs.chunk(b"tEXt")),
    ],
    ids=["before the first scan", "after it", "PNG"],
)
def test_other_threads_run_while_an_image_of_many_parts_is_read(
    format: str,  # noqa: A002
    before: bytes,
    part: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("app.machine.time.sleep", pauses.append)
    image = encode(Image.fromarray(noise(100, 100)), format, **({"progressive": True} if format == "JPEG" else {}))
    decode(image)
    assert not pauses
    place = image.rindex(before)
    decode(image[:place] + 5 * machine.LOOP_STEPS * part + image[place:])
    assert len(pauses) >= 5


@pytest.mark.parametrize("big", [False, True])
def test_a_tiff_of_endless_values_is_refused_before_it_is_opened(big: bool) -> None:
    data = encode(Image.new("L", (1, 100_000)), "TIFF", big_tiff=big, tiffinfo={278: 1}, strip_size=1)
    with pytest.raises(TooLarge, match=r"more (parts|than)"):
        decode(data)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow emits it; `app.inference.images.encoded` ignores it too
@pytest.mark.parametrize("place", [0, 1, 2**32, 2**63])
def test_a_tiff_whose_directory_is_not_in_the_file_is_a_problem(place: int) -> None:
    for data in (b"II+\0\x08\0\0\0" + place.to_bytes(8, "little"), b"MM\0*" + place.to_bytes(8)[-4:]):
        with pytest.raises(Problem):
            decode(data)


def test_a_bmp_that_pillow_decodes_in_python_is_unsupported() -> None:
    palette = encode(Image.new("P", (32, 32)), "BMP")
    with pytest.raises(UnsupportedImage, match="BMP with this compression"):
        decode(palette[:30] + bytes([1, 0, 0, 0]) + palette[34:])


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_exif_data_without_end_are_not_read(format: str) -> None:  # noqa: A002
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = decode(encode(Image.fromarray(pixels), format, exif=exif))
    assert turned[0, 31].min() > 200
    exif[0x010E] = "description" * 20_000
    described = decode(encode(Image.fromarray(pixels), format, exif=exif))
    np.testing.assert_array_equal(described, turned)
    exif[0x010E] = "description" * 30_000
    assert decode(encode(Image.fromarray(pixels), format, exif=exif))[0, 0].min() > 200


PIXELS = noise(32, 32, 3)
TOLERATED_CHUNKS = {
    "text with a wrong checksum": pngs.chunk(b"tEXt", b"Comment\0hi", damaged=True),
    "gamma with a wrong checksum": pngs.chunk(b"gAMA", struct.pack(">L", 100_000), damaged=True),
    "a transparent color with a wrong checksum": pngs.chunk(
        b"tRNS", PIXELS[0, 0].astype(">u2").tobytes(), damaged=True
    ),
    "a cut-off gamma": pngs.chunk(b"gAMA", b"\0"),
    "a cut-off animation": pngs.chunk(b"acTL", b"\0") + pngs.chunk(b"fcTL", b"\0"),
    "a profile of unknown compression": pngs.chunk(b"iCCP", b"name\0\7data"),
    "a profile that is not compressed": pngs.chunk(b"iCCP", b"name\0\0data"),
    "text of unknown compression": pngs.chunk(b"zTXt", b"key\0\7data"),
    "text that unpacks to 100 MB": pngs.chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(100 << 20))),
    "much text": 100 * pngs.chunk(b"tEXt", b"key\0" + bytes(60_000)),
    "an unknown chunk": pngs.chunk(b"abCd", bytes(10)),
    "cut-off resolution": pngs.chunk(b"pHYs", b"\0"),
}


@pytest.mark.parametrize("chunk", TOLERATED_CHUNKS.values(), ids=TOLERATED_CHUNKS)
def test_a_png_is_decoded_whatever_its_other_chunks(chunk: bytes) -> None:
    for data in (pngs.png(PIXELS, before=chunk), pngs.png(PIXELS, after=chunk)):
        np.testing.assert_array_equal(decode(data).transpose(1, 2, 0), PIXELS)


@pytest.mark.parametrize("rest", [b"", b"\0\0\0\x20tEXtcut", b"\0\0", bytes(100)])
def test_a_png_is_decoded_whatever_follows_its_pixels(rest: bytes) -> None:
    data = pngs.png(PIXELS)
    end = data.index(b"IEND") - 4
    np.testing.assert_array_equal(decode(data[:end] + rest).transpose(1, 2, 0), PIXELS)
    np.testing.assert_array_equal(decode(data + rest).transpose(1, 2, 0), PIXELS)


def test_a_png_whose_header_is_damaged_is_a_damaged_png() -> None:
    data = pngs.png(PIXELS)
    with pytest.raises(DamagedImage, match=r"the PNG image's header is damaged: .*checksum in b'IHDR'"):
        decode(data[:20] + b"\1" + data[21:])


def test_a_png_with_an_unknown_critical_chunk_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedImage, match="the PNG has a chunk of the kind CgBI"):
        decode(pngs.png(PIXELS, before=pngs.chunk(b"CgBI", b"\x50\0\x20\x02")))


def test_the_orientation_in_a_text_chunk_of_a_png_is_used() -> None:
    """ImageMagick writes EXIF data as hexadecimal text."""
    exif = Image.Exif()
    exif[0x0112] = 3
    content = exif.tobytes()
    text = b"\nexif\n%8d\n" % len(content) + content.hex().encode() + b"\n"
    data = pngs.png(PIXELS, before=pngs.chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)))
    np.testing.assert_array_equal(decode(data).transpose(1, 2, 0), PIXELS[::-1, ::-1])


def open_image(data: bytes) -> EncodedImage:
    return EncodedImage(data, 10 << 20, 50_000_000)


def smooth(mode: str = "RGB", size: tuple[int, int] = (160, 320)) -> Image.Image:
    """Return a picture without large areas of middle gray."""
    return Image.fromarray(noise(20, 10, 3)).resize(size, Image.Resampling.BICUBIC).convert(mode)


JPEG_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "baseline": ("RGB", {}),
    "4:4:4": ("RGB", {"subsampling": 0}),
    "gray": ("L", {}),
    "CMYK": ("CMYK", {}),
    "restart markers": ("RGB", {"restart_marker_blocks": 4}),
    "progressive": ("RGB", {"progressive": True}),
}


@pytest.mark.parametrize("kind", JPEG_KINDS)
def test_a_jpeg_without_its_end_marker_is_decoded_with_a_warning(kind: str) -> None:
    mode, options = JPEG_KINDS[kind]
    whole = encode(smooth(mode), "JPEG", **options)
    image = open_image(whole[:-2])
    np.testing.assert_array_equal(image.decode(), decode(whole))
    lost = "details are missing" if kind == "progressive" else "the picture is whole"
    assert image.warnings == [f"the JPEG is cut off: its end is missing; {lost}"]
    intact = open_image(whole)
    intact.decode()
    assert intact.warnings == []
    assert image.cost.cpu_ms <= intact.cost.cpu_ms
    assert image.cost.memory_bytes == intact.cost.memory_bytes


@pytest.mark.parametrize("kind", [kind for kind in JPEG_KINDS if kind != "progressive"])
def test_a_jpeg_is_decoded_if_95_percent_of_it_are_there(kind: str) -> None:
    mode, options = JPEG_KINDS[kind]
    whole = encode(smooth(mode), "JPEG", quality=90, **options)
    start = whole.index(b"\xff\xda")
    image = open_image(whole[: start + (len(whole) - start) * 98 // 100])
    pixels = image.decode()
    assert len(image.warnings) == 1
    assert 0.1 < float(image.warnings[0].split("missing; ")[1].split("%")[0]) < 4
    np.testing.assert_array_equal(pixels[:, :29], decode(whole)[:, :29])
    with pytest.raises(
        DamagedImage, match=r"the JPEG is cut off: \d+% of the picture is missing, the limit is 5%; send"
    ):
        decode(whole[: start + (len(whole) - start) * 90 // 100])


def test_a_progressive_jpeg_is_decoded_from_its_first_scan_on() -> None:
    whole = encode(smooth(), "JPEG", progressive=True)
    scans = [place for place in range(len(whole)) if whole.startswith(b"\xff\xda", place)]
    image = open_image(whole[: scans[1] + 20])
    assert abs(image.decode().astype(int) - decode(whole)).mean() < 20
    assert image.warnings == ["the JPEG is cut off: its end is missing; details are missing"]
    with pytest.raises(DamagedImage, match="of the picture is missing"):
        decode(whole[: (scans[0] + scans[1]) // 2])


def test_a_jpeg_cut_off_between_the_scans_of_its_colors_is_refused() -> None:
    with pytest.raises(DamagedImage, match="100% of the picture is missing"):
        decode(jpegs.head(64, 64) + jpegs.scan([1]) + jpegs.scan([2]))


def test_a_jpeg_without_pixels_is_refused() -> None:
    whole = encode(Image.new("RGB", (64, 64), (128, 128, 128)), "JPEG")
    with pytest.raises(DamagedImage, match=r"(9\d|100)% of the picture is missing"):
        decode(whole[: whole.index(b"\xff\xda") + 14])
    with pytest.raises(DamagedImage, match="the JPEG image's header is damaged"):
        decode(whole[: whole.index(b"\xff\xc0") - 10])


def test_data_after_the_end_of_a_jpeg_are_ignored() -> None:
    whole = encode(smooth(), "JPEG")
    image = open_image(whole + b"a video follows")
    np.testing.assert_array_equal(image.decode(), decode(whole))
    assert image.warnings == []


def test_the_end_marker_of_a_preview_does_not_complete_a_jpeg() -> None:
    preview = encode(smooth(size=(16, 16)), "JPEG")
    whole = encode(smooth(), "JPEG")
    place = whole.index(b"\xff\xdb")
    segment = b"\xff\xe3" + struct.pack(">H", len(preview) + 2) + preview
    image = open_image((whole[:place] + segment + whole[place:])[:-2])
    image.decode()
    assert len(image.warnings) == 1


def test_a_cut_off_jpeg_is_left_to_a_caller_that_returns_its_warning() -> None:
    with pytest.raises(CostlyImage):
        encoded.decode(encode(smooth(), "JPEG")[:-2], 1 << 20, 1 << 20)


def with_frame(data: bytes, marker: int = 0xC0, bits: int = 8, components: int = 3) -> bytes:
    """Return the JPEG with another frame header."""
    place = data.index(b"\xff\xc0")
    header = bytearray(data[place : place + 19])
    header[1], header[4], header[9] = marker, bits, components
    return data[:place] + bytes(header) + data[place + 19 :]


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        ({"bits": 12}, "12 bits per sample"),
        ({"marker": 0xC1, "bits": 12}, "12 bits per sample"),
        ({"marker": 0xC3, "bits": 16}, "lossless coding"),
        ({"marker": 0xC5}, "hierarchical coding"),
        ({"components": 2}, "2 components"),
    ],
)
def test_a_jpeg_that_libjpeg_cannot_read_is_refused_by_name(frame: dict[str, int], reason: str) -> None:
    with pytest.raises(UnsupportedImage, match=f"a JPEG with {reason} is not supported; save it as a baseline JPEG"):
        decode(with_frame(encode(smooth(), "JPEG"), **frame))


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\xff\x0a\0\0", "JPEG XL"),
        (b"\0\0\0\x0cJXL \x0d\x0a\x87\x0a", "JPEG XL"),
        (b"\0\0\0\x0cjP  \x0d\x0a\x87\x0a", "JPEG 2000"),
        (b"\0\0\0\x18ftypisom\0\0\0\1isommp42", "MP4 or HEIF"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", r"Canon raw \(CR3\)"),
        (b"8BPS\0\1", r"Photoshop \(PSD\)"),
        (b"\0\0\1\0\1\0", r"icon \(ICO\)"),
        (b"qoif", "QOI"),
        (b"%PDF-1.7", "PDF"),
        (b"PK\3\4", "zip"),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\n<!DOCTYPE html><html>", "HTML"),
    ],
)
def test_a_file_of_another_format_is_refused_by_name(start: bytes, name: str) -> None:
    with pytest.raises(UnsupportedImage, match=f"{name} files are not supported; export the image as JPEG"):
        decode(start + bytes(100))
