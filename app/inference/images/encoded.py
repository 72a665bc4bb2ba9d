"""Decode untrusted bytes to the pixels that a model takes.

    bytes -> (size limit) -> header -> (format, pixel limit, cost limit) -> decoded -> 8 bits per channel
          -> center square, 32x32 -> upright -> sRGB -> over white

In: an encoded image.  Out: uint8 [3, 32, 32], or `UnsupportedImage`, `DamagedImage`, `TooLarge`, `CostlyImage`.
An image of exactly 32x32 is not resampled. An image is refused before it is decoded if decoding would take far more
time or memory than a photo takes. This applies to images with too many scans or parts, or with a compression that
Pillow decodes in Python.
"""

import io
import struct
import warnings
import zlib
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from app.exceptions import DamagedImage, Problem, TooLarge, UnsupportedImage
from app.inference.images import color, formats, heif, jpeg, png, samples, tiff
from app.inference.images.cost import JPEG_SIDE, DecodeCost, estimate
from app.machine import LOOP_STEPS, MIB, let_other_threads_run

SIZE = 32
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

MAX_COST = DecodeCost(2_000, 320 * MIB)
"""Largest estimated cost of an image, 2 s of CPU time and 320 MiB. Images above it are refused."""

# Pillow reads a file piece by piece in Python, and the directory of a TIFF value by value. These limits keep each of
# the two below about 50 ms. Files of up to _SMALL_BYTES cannot take longer than 3 ms.
_MAX_HEADER_PIECES = 5_000
_MAX_PIECES = 50_000
_MAX_TIFF_VALUES = 20_000
_SMALL_BYTES = 4 << 10

_MAX_MISSING = 0.05
"""Largest part of a JPEG that may be missing at its end, as browsers show such a file."""

# Bits per index of a gray BMP, by the mode that Pillow gives it.
_BMP_GRAY_BITS = {"1": 1, "L": 8}

# EXIF orientations and the transposition that turns the image upright. A JPEG segment holds 64 KiB. A crafted field may
# hold many numbers instead of one. Pillow takes 0.1 s for the numbers that four segments hold.
_MAX_EXIF_BYTES = 256 << 10
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# The client gets the error of a damaged file. Pillow's warnings about it would only fill the log.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# Exceptions that Pillow's decoders raise for damaged files. ValueError includes the struct-like errors of its plugins.
# RuntimeError is that of the AVIF decoder.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
)


class CostlyImage(Exception):
    """Error for an image that `decode` leaves to others: it costs more than the caller allows, but no more than
    `MAX_COST`, needs a process that can be killed, or may give a warning.

    Args:
        cost: Estimated cost.
    """

    def __init__(self, cost: DecodeCost):
        super().__init__(cost)
        self.cost = cost


class _PieceLimitedFile(io.BytesIO):
    """An in-memory file with a limited number of calls to `read`."""

    limit, count = _MAX_HEADER_PIECES, 0

    def read(self, size: int | None = -1) -> bytes:
        self.count += 1
        if self.count > self.limit:
            raise _too_many_parts()
        if self.count % LOOP_STEPS == 0:
            let_other_threads_run()
        return super().read(size)


def _too_many_parts() -> TooLarge:
    return TooLarge("the image consists of more parts than any encoder writes; save it again as a PNG or JPEG")


class EncodedImage:
    """An image whose header has been read and that is within all limits, but is not decoded yet.

    Args:
        data: The bytes of a JPEG, PNG, WebP, GIF (first frame), BMP, TIFF, AVIF or HEIC file.
        max_bytes: Largest size of the file.
        max_pixels: Largest product of width and height.

    Raises:
        UnsupportedImage: The bytes are not an image in one of these formats, or in a variant that is not supported.
        DamagedImage: The file is empty, or its header is damaged.
        TooLarge: The image exceeds one of the limits or `MAX_COST`, or has more parts than any encoder writes.
    """

    cost: DecodeCost
    """Estimated cost of decoding."""

    needs_process: bool
    """True for AVIF and HEIC, whose decoders take untrusted sizes from the compressed data. They must run in a
    killable process. Their header has been read only in part."""

    is_cut_off: bool
    """True for a JPEG without its end."""

    warnings: list[str]
    """Sentences about missing parts of the decoded image."""

    def __init__(self, data: bytes, max_bytes: int, max_pixels: int):
        if not data:
            raise DamagedImage("the image is empty; send the bytes of a file")
        if len(data) > max_bytes:
            raise TooLarge(f"the image has more than {max_bytes:,} bytes; send a smaller one")
        self.is_cut_off = False
        self.warnings = []
        self._max_pixels = max_pixels
        self._image: ImageFile.ImageFile | None = None
        self._kind: str
        self._color: color.Source
        kind = heif.kind(data)
        self.needs_process = kind is not None
        if kind:
            heif.require_support(kind)
            self._kind, self._data = kind, data
            size = heif.declared_size(data)
            self._require_pixels(size)
            self.cost = heif.estimate(kind, size, len(data))
        else:
            self._open(data)
        _require_affordable(self.cost)

    def _open(self, data: bytes) -> None:
        """Read the header of an image that Pillow decodes, and estimate the cost of decoding."""
        self.is_cut_off = data.startswith(b"\xff\xd8") and not jpeg.is_complete(data)
        if self.is_cut_off:
            data += jpeg.END  # libjpeg waits for it, and then leaves the rest gray
        chunks = 0
        if data.startswith(png.SIGNATURE):
            data, self._color, chunks = png.read(data)
        self._data = data
        self._image = image = _open(data)
        self._kind = image.format or ""
        if not chunks:
            self._color = image.info.get("icc_profile")
        self._require_pixels(image.size)
        try:
            self.cost = estimate(image, data, chunks or len(image.tile), color.profile_ns(self._color))
        except _DECODE_ERRORS as error:
            raise DamagedImage(f"the {image.format} image's header is damaged: {error}") from error

    def _require_pixels(self, size: tuple[int, int]) -> None:
        width, height = size
        if width * height > self._max_pixels:
            raise TooLarge(
                f"the image has {width}x{height} pixels, the limit is {self._max_pixels:,}; send a smaller one"
            )

    def decode(self) -> NDArray[np.uint8]:
        """Decode the center square to 32x32 sRGB, upright and over a white background. This can be called once.

        Returns:
            uint8 [3, 32, 32].

        Raises:
            DamagedImage: The file is truncated or cannot be decoded.
        """
        try:
            if self.needs_process:
                self._image = heif.open_image(self._data)
                self._require_pixels(self._image.size)
                self._color = self._image.info.get("icc_profile")
            return np.asarray(self._square(), np.uint8).transpose(2, 0, 1).copy()
        except _DECODE_ERRORS as error:
            if self._kind == "JPEG" and (reason := jpeg.describe_unreadable(self._data)):
                raise UnsupportedImage(f"a JPEG with {reason} is not supported; save it as a baseline JPEG") from error
            raise DamagedImage(f"the {self._kind} image cannot be decoded: {error}") from error

    def _square(self) -> Image.Image:
        assert self._image  # noqa: S101  decoded once
        file, self._image = self._image, None
        if isinstance(file, JpegImageFile):  # includes MPO, the format of many phones' JPEGs with a preview
            # The JPEG is decoded at the smallest DCT scale that leaves twice the required resolution.
            file.draft(None, (JPEG_SIDE, JPEG_SIDE))
        tiles = file.tile  # Pillow forgets them when it has decoded them
        orientation = _orientation(file)
        if self.is_cut_off:
            self._require_most(cast(JpegImageFile, file))
        image = samples.to_8_bits(file, tiles, self._data)
        del file  # frees its memory before the next image needs as much
        if image.size != (SIZE, SIZE):
            side = min(image.size)
            left, top = (image.width - side) / 2, (image.height - side) / 2
            box = (left, top, left + side, top + side)
            image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box)
        if orientation in _UPRIGHT:
            image = image.transpose(_UPRIGHT[orientation])
        image = color.to_srgb(image, self._color)
        if image.mode == "RGBA":
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image

    def _require_most(self, image: JpegImageFile) -> None:
        """Warn of the missing end of a JPEG.

        Raises:
            DamagedImage: More than `_MAX_MISSING` of the picture is missing.
        """
        layers = [layer[0] for layer in image.layer]
        found, _ = jpeg.scans(self._data, len(layers), "progressive" in image.info)
        missing = jpeg.missing_part(image, found, bytes(layers))
        if missing > _MAX_MISSING:
            raise DamagedImage(
                f"the JPEG is cut off: {missing:.0%} of the picture is missing, the limit is {_MAX_MISSING:.0%}; send "
                "the whole file"
            )
        if missing:
            lost = f"{missing:.1%} of the picture is gray"
        else:
            lost = "the picture is whole" if found is None else "details are missing"
        self.warnings.append(f"the JPEG is cut off: its end is missing; {lost}")


def decode(data: bytes, max_bytes: int, max_pixels: int, max_cost: DecodeCost = MAX_COST) -> NDArray[np.uint8]:
    """Decode an image that needs no process of its own and gives no warning.

    Args:
        data: The bytes of an image file, see `EncodedImage`.
        max_bytes: Largest size of the file.
        max_pixels: Largest product of width and height.
        max_cost: Largest estimated cost.

    Returns:
        uint8 [3, 32, 32].

    Raises:
        Problem: An error of `EncodedImage` or `EncodedImage.decode`.
        CostlyImage: The estimated cost exceeds `max_cost`, the image needs a process, or it may give a warning.
    """
    image = EncodedImage(data, max_bytes, max_pixels)
    if image.needs_process or image.is_cut_off or image.cost.exceeds(max_cost):
        raise CostlyImage(image.cost)
    return image.decode()


def _require_affordable(cost: DecodeCost) -> None:
    if cost.cpu_ms > MAX_COST.cpu_ms:
        raise TooLarge(
            f"decoding the image would take about {cost.cpu_ms / 1000:.1f} s of CPU time, the limit is "
            f"{MAX_COST.cpu_ms / 1000:.0f} s; send a smaller image, or a JPEG that is not progressive"
        )
    if cost.memory_bytes > MAX_COST.memory_bytes:
        raise TooLarge(
            f"decoding the image would take about {cost.memory_bytes // MIB:,} MiB of memory, the limit is "
            f"{MAX_COST.memory_bytes // MIB:,} MiB; send a smaller image, or a JPEG that is not progressive"
        )


def _open(data: bytes) -> ImageFile.ImageFile:
    """Open an image and read only its header.

    Raises:
        UnsupportedImage: The format or its variant is not supported.
        DamagedImage: The header is damaged.
        TooLarge: The image has more parts than any encoder writes, or more pixels than Pillow allows.
    """
    file = io.BytesIO(data) if len(data) <= _SMALL_BYTES else _PieceLimitedFile(data)
    if data.startswith((b"II", b"MM")) and tiff.count_values(data) > _MAX_TIFF_VALUES:
        raise _too_many_parts()
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise _explain_unidentified(data) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLarge(str(error)) from None
    except _DECODE_ERRORS as error:
        raise DamagedImage(f"the {formats.recognize(data)} image's header is damaged: {error}") from error
    if isinstance(file, _PieceLimitedFile):
        file.limit = _MAX_PIECES
    if any(tile.codec_name in Image.DECODERS for tile in image.tile):
        raise UnsupportedImage(f"{image.format} with this compression is not supported; save it again as a PNG")
    if isinstance(image, TiffImageFile) and not (layout := tiff.layout(data)).is_decoded_right:
        raise layout.unsupported()
    if image.format == "BMP":
        _require_readable_palette(image, data)
    return image


def _require_readable_palette(image: ImageFile.ImageFile, data: bytes) -> None:
    """Refuse a BMP whose gray palette is shorter than Pillow takes it to be: it reads the indices as gray levels."""
    bits = int.from_bytes(data[24:26] if data[14] == 12 else data[28:30], "little")
    if bits <= 8 and bits != _BMP_GRAY_BITS.get(image.mode, bits):
        raise UnsupportedImage(
            f"a BMP with {bits} bits and a gray palette of its size is not supported; save it as a PNG"
        )


def _explain_unidentified(data: bytes) -> Problem:
    """Return the error for a file that Pillow does not open. It names the format of the file."""
    kind = formats.recognize(data)
    supported = ", ".join((*FORMATS, *heif.supported_kinds()))
    if kind is None:
        return UnsupportedImage(f"the bytes are not a supported image; supported formats are {supported}")
    if kind not in FORMATS:
        return UnsupportedImage(
            f"{kind} files are not supported; export the image as JPEG (supported formats are {supported})"
        )
    if kind == "JPEG" and (reason := jpeg.describe_unreadable(data)):
        return UnsupportedImage(f"a JPEG with {reason} is not supported; save it as a baseline JPEG")
    try:
        Image.OPEN[kind][0](_PieceLimitedFile(data), "")
        reason = "it cannot be read"
    except _DECODE_ERRORS as error:
        reason = str(error)
    if kind == "TIFF":
        layout = tiff.layout(data)
        if reason == "unknown pixel mode" or not (layout.is_compression_known and layout.is_decoded_right):
            return layout.unsupported()
    return DamagedImage(f"the {kind} image's header is damaged: {reason}")


def _orientation(image: Image.Image) -> Any:
    """Return the EXIF orientation, which may be of any type. Returns None if EXIF data are missing or too large."""
    image.load()  # the EXIF data of a PNG may follow the pixels
    if any(len(image.info.get(kind) or "") > _MAX_EXIF_BYTES for kind in ("exif", "Raw profile type exif")):
        return None
    return image.getexif().get(ExifTags.Base.Orientation)
