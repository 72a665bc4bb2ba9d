"""Test decoding untrusted bytes to pixels: every format and mode, every limit, every kind of damage."""

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from app.exceptions import DamagedImage, Problem, TooLarge, UnsupportedImage
from app.inference.images import EncodedImage


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


@pytest.mark.parametrize("data", [b"hello", b"%PDF-1.7", b"<svg xmlns='http://www.w3.org/2000/svg'/>", bytes(1000)])
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
    for length in (len(data) // 4, len(data) // 2, len(data) - len(data) // 8):
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


@pytest.mark.parametrize("big", [False, True])
def test_a_tiff_of_endless_values_is_refused_before_it_is_opened(big: bool) -> None:
    data = encode(Image.new("L", (1, 100_000)), "TIFF", big_tiff=big, tiffinfo={278: 1}, strip_size=1)
    with pytest.raises(TooLarge, match=r"more (parts|than)"):
        decode(data)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow emits it; `app.inference.images` ignores it too
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
