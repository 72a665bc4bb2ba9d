"""Test AVIF and HEIC: the pixels, orientation and transparency, their limits, and that a process decodes them."""

import io
from collections.abc import Iterator
from typing import Any

import heics
import icc_profiles
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, features

from app.exceptions import DamagedImage, TooLarge, UnsupportedImage
from app.inference.decode_process import DecodeProcess
from app.inference.images import encoded, heif
from app.inference.images.encoded import CostlyImage, EncodedImage
from app.machine import MIB

pytestmark = pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")
PICTURE = np.asarray(Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)).resize((32, 32)))


def avif(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "AVIF", quality=95, subsampling="4:4:4", speed=10, max_threads=1, **options)
    return buffer.getvalue()


def decode(data: bytes) -> NDArray[np.int16]:
    """Decode in this process, as the decoder process does."""
    return EncodedImage(data, MIB, 10_000_000).decode().transpose(1, 2, 0).astype(np.int16)


@pytest.fixture(scope="module")
def process() -> Iterator[DecodeProcess]:
    started = DecodeProcess(MIB, 10_000_000)
    yield started
    started.close()


def test_an_avif_has_the_pixels_that_it_encodes() -> None:
    assert np.abs(decode(avif(Image.fromarray(PICTURE))) - PICTURE).mean() < 3


def test_gray_and_large_avifs_are_decoded() -> None:
    gray = Image.fromarray(PICTURE).convert("L")
    assert np.abs(decode(avif(gray)) - np.asarray(gray)[..., None]).mean() < 3
    large = Image.fromarray(PICTURE).resize((300, 300), Image.Resampling.NEAREST)
    assert np.abs(decode(avif(large)) - PICTURE).mean() < 8


def test_transparent_pixels_of_an_avif_are_white() -> None:
    image = Image.fromarray(PICTURE).convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 16, 32))
    pixels = decode(avif(image))
    assert (pixels[:, :14] > 250).all()
    assert np.abs(pixels[:, 18:] - PICTURE[:, 18:]).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_avif_is_turned_upright_once(orientation: int) -> None:
    """Pillow stores the orientation as the transformations irot and imir."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = encoded._UPRIGHT.get(orientation)
    stored = Image.fromarray(PICTURE)
    expected = stored.transpose(turn) if turn is not None else stored
    assert np.abs(decode(avif(stored, exif=exif)) - np.asarray(expected, np.int16)).mean() < 3


def test_the_first_frame_of_an_avif_sequence_is_taken() -> None:
    first, second = (Image.new("RGB", (32, 32), color) for color in ("red", "blue"))
    pixels = decode(avif(first, save_all=True, append_images=[second]))
    assert np.abs(pixels - (255, 0, 0)).max() < 8


def test_the_profile_of_an_avif_is_used() -> None:
    stored = Image.fromarray(icc_profiles.from_srgb(PICTURE, "ProPhoto"))
    pixels = decode(avif(stored, icc_profile=icc_profiles.rgb_profile("ProPhoto")))
    assert np.abs(pixels - PICTURE).mean() < 5


def test_only_a_process_decodes_an_avif(process: DecodeProcess) -> None:
    data = avif(Image.fromarray(PICTURE))
    with pytest.raises(CostlyImage):
        encoded.decode(data, MIB, MIB)
    pixels, warnings = process.decode(data)
    np.testing.assert_array_equal(pixels.transpose(1, 2, 0), decode(data))
    assert warnings == []


def with_size(data: bytes, width: int, height: int) -> bytes:
    """Return the file with another declared size."""
    place = data.index(b"ispe") + 8
    return data[:place] + width.to_bytes(4) + height.to_bytes(4) + data[place + 8 :]


def test_the_declared_size_is_limited_before_the_file_is_opened() -> None:
    data = avif(Image.fromarray(PICTURE))
    assert heif.declared_size(data) == (32, 32)
    with pytest.raises(TooLarge, match="4000x4000 pixels"):
        EncodedImage(with_size(data, 4000, 4000), MIB, 10_000_000)
    with pytest.raises(TooLarge, match="of memory, the limit is 320 MiB"):
        EncodedImage(with_size(data, 6000, 6000), MIB, 50_000_000)
    assert heif.declared_size(data.replace(b"ispe", b"none")) == (0, 0)


def test_the_picture_has_the_declared_size_whatever_was_compressed() -> None:
    data = avif(Image.fromarray(PICTURE).resize((256, 256)))
    assert np.abs(decode(with_size(data, 1000, 1000)) - PICTURE).mean() < 3
    assert (decode(with_size(data, 1, 1)).std(axis=(0, 1)) == 0).all()
    with pytest.raises(DamagedImage, match="the structure of the file is damaged"):
        decode(data.replace(b"ispe", b"none"))


def test_a_larger_avif_costs_more() -> None:
    data = avif(Image.fromarray(PICTURE))
    small, large = (EncodedImage(with_size(data, side, side), MIB, 50_000_000).cost for side in (100, 3000))
    assert large.cpu_ms > 10 * small.cpu_ms
    assert large.memory_bytes > 100 * MIB


def test_a_damaged_avif_is_a_problem_and_not_a_crash(process: DecodeProcess) -> None:
    data = avif(Image.fromarray(PICTURE))
    for length in (12, 40, len(data) // 2, len(data) - 10):
        with pytest.raises(DamagedImage, match="the AVIF image cannot be decoded"):
            process.decode(data[:length])


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


def test_a_heic_is_refused_by_name_without_a_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heif, "supported_kinds", lambda: ("AVIF",))
    with pytest.raises(
        UnsupportedImage, match="HEIC images are not supported by this service; export the image as JPEG"
    ):
        decode(HEIC)


def test_the_supported_formats_are_named() -> None:
    expected = "AVIF, HEIC" if "HEIC" in heif.supported_kinds() else "AVIF"
    with pytest.raises(UnsupportedImage, match=f"supported formats are JPEG, PNG, WEBP, GIF, BMP, TIFF, {expected}$"):
        decode(b"hello")


@pytest.mark.parametrize(
    ("brands", "kind"),
    [
        (b"avif\0\0\0\0avifmif1miaf", "AVIF"),
        (b"mif1\0\0\0\0mif1avif", "AVIF"),
        (b"avis\0\0\0\0avismsf1", "AVIF"),
        (b"heic\0\0\0\0mif1heic", "HEIC"),
        (b"heix\0\0\0\0mif1heix", "HEIC"),
        (b"mif1\0\0\0\0mif1heic", "HEIC"),
        (b"msf1\0\0\0\0msf1hevc", "HEIC"),
        (b"mif1\0\0\0\0mif1", None),
        (b"isom\0\0\0\1isommp42", None),
    ],
)
def test_the_kind_is_read_from_the_brands(brands: bytes, kind: str | None) -> None:
    assert heif.kind((8 + len(brands)).to_bytes(4) + b"ftyp" + brands + bytes(20)) == kind


needs_heic = pytest.mark.skipif("HEIC" not in heif.supported_kinds(), reason="needs the extra heif")
LUMA = np.random.default_rng(1).integers(0, 256, (32, 32), np.uint8)


@needs_heic
def test_a_heic_has_the_pixels_that_it_encodes() -> None:
    np.testing.assert_array_equal(decode(heics.heic(LUMA)), np.repeat(LUMA[..., None], 3, 2))


@needs_heic
def test_a_heic_has_its_colors() -> None:
    pixels = decode(heics.heic(np.full((32, 32), 76, np.uint8), cb=85, cr=255))
    assert np.abs(pixels - (254, 0, 0)).max() <= 3


@needs_heic
@pytest.mark.parametrize("turns", range(4))
def test_a_heic_is_turned_upright_once(turns: int) -> None:
    pixels = decode(heics.heic(LUMA, turns=turns))
    np.testing.assert_array_equal(pixels[..., 0], np.rot90(LUMA, turns))


@needs_heic
def test_only_a_process_decodes_a_heic(process: DecodeProcess) -> None:
    with pytest.raises(CostlyImage):
        encoded.decode(heics.heic(LUMA), MIB, MIB)
    pixels, _ = process.decode(heics.heic(LUMA))
    np.testing.assert_array_equal(pixels[0], LUMA)


@needs_heic
def test_a_damaged_heic_is_a_problem_and_not_a_crash() -> None:
    data = heics.heic(LUMA)
    for length in (40, len(data) // 4, len(data) - 1000):
        with pytest.raises(DamagedImage, match="the HEIC image cannot be decoded"):
            decode(data[:length])


def test_the_declared_size_of_a_heic_is_limited_without_its_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heif, "supported_kinds", lambda: ("AVIF", "HEIC"))
    with pytest.raises(TooLarge, match="4000x4000 pixels"):
        EncodedImage(heics.heic(LUMA, size=(4000, 4000)), MIB, 10_000_000)
    assert heif.declared_size(heics.heic(LUMA)) == (32, 32)
