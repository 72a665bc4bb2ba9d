"""Write TIFF files from samples without Pillow, so that tests know the pixels of every layout."""

import lzma
import struct
import zlib
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Order = Literal["<", ">"]

MIN_IS_WHITE, MIN_IS_BLACK, RGB, PALETTE, MASK, CMYK, YCBCR, CIELAB = 0, 1, 2, 3, 4, 5, 6, 8
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
RAW, LZW, DEFLATE, PACKBITS, LZMA = 1, 5, 8, 32773, 34925


def tiff(
    samples: NDArray[Any],
    photometric: int,
    bits: int,
    *,
    sample_format: int = UNSIGNED,
    compression: int = RAW,
    predictor: int = 1,
    planar: bool = False,
    big_endian: bool = False,
    tiled: bool = False,
    reversed_bits: bool = False,
    extra: tuple[int, ...] = (),
    tags: dict[int, tuple[int, ...]] | None = None,
) -> bytes:
    """Return a TIFF.

    Args:
        samples: [height, width, channels], height and width multiples of 16 if tiled.
        photometric: Photometric interpretation.
        bits: Bits per sample: 1 to 16, 32 or 64.
        sample_format: Unsigned or signed integers, or floating point.
        compression: Code of the compression.
        predictor: 1 none, 2 horizontal differences, 3 floating point.
        planar: Store each channel separately.
        big_endian: Byte order.
        tiled: Store tiles of 16x16 pixels instead of strips of 8 rows.
        reversed_bits: Store the least significant bit of each byte first.
        extra: Meaning of the channels beyond those of the photometric interpretation: 0 none, 1 premultiplied alpha,
            2 alpha.
        tags: Further tags of type SHORT.
    """
    height, width, channels = samples.shape
    order: Order = ">" if big_endian else "<"
    planes = [samples[:, :, n : n + 1] for n in range(channels)] if planar else [samples]
    rows, columns = (16, 16) if tiled else (8, width)
    parts = [
        plane[top : top + rows, left : left + columns]
        for plane in planes
        for top in range(0, height, rows)
        for left in range(0, width, columns)
    ]
    blocks = [_compress(_encode(part, bits, order, predictor), compression) for part in parts]
    if reversed_bits:
        blocks = [block.translate(_REVERSED) for block in blocks]
    entries: dict[int, tuple[str, tuple[int, ...]]] = {
        256: ("L", (width,)),
        257: ("L", (height,)),
        258: ("H", (bits,) * channels),
        259: ("H", (compression,)),
        262: ("H", (photometric,)),
        266: ("H", (2 if reversed_bits else 1,)),
        277: ("H", (channels,)),
        284: ("H", (2 if planar else 1,)),
        317: ("H", (predictor,)),
        339: ("H", (sample_format,) * channels),
        **{tag: ("H", values) for tag, values in (tags or {}).items()},
    }
    if extra:
        entries[338] = ("H", extra)
    offsets = list(np.cumsum([8] + [len(block) + len(block) % 2 for block in blocks]))
    counts = tuple(len(block) for block in blocks)
    where = tuple(int(offset) for offset in offsets[:-1])
    entries |= (
        {322: ("L", (16,)), 323: ("L", (16,)), 324: ("L", where), 325: ("L", counts)}
        if tiled
        else {273: ("L", where), 278: ("L", (rows,)), 279: ("L", counts)}
    )
    body = b"".join(block + bytes(len(block) % 2) for block in blocks)
    return _assemble(body, entries, order)


def _assemble(body: bytes, entries: dict[int, tuple[str, tuple[int, ...]]], order: str) -> bytes:
    start = 8 + len(body)
    place = start + 2 + 12 * len(entries) + 4
    directory, values = struct.pack(order + "H", len(entries)), b""
    for tag, (kind, numbers) in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        directory += struct.pack(order + "HHL", tag, {"H": 3, "L": 4}[kind], len(numbers))
        if len(packed) <= 4:
            directory += packed.ljust(4, b"\0")
        else:
            directory += struct.pack(order + "L", place + len(values))
            values += packed + bytes(len(packed) % 2)
    head = (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(order + "L", start)
    return head + body + directory + bytes(4) + values


def _encode(samples: NDArray[Any], bits: int, order: Order, predictor: int) -> bytes:
    if predictor == 2:
        before = np.zeros_like(samples)
        before[:, 1:] = samples[:, :-1]
        samples = samples - before
    rows = samples.reshape(len(samples), -1)
    if predictor == 3:
        size = bits // 8
        big = rows.astype(rows.dtype.newbyteorder(">")).view(np.uint8).reshape(len(rows), -1, size)
        shuffled = big.transpose(0, 2, 1).reshape(len(rows), -1).astype(np.int16)
        step = samples.shape[2]
        shuffled[:, step:] -= shuffled[:, :-step].copy()
        return (shuffled % 256).astype(np.uint8).tobytes()
    if bits in (8, 16, 32, 64):
        return rows.astype(rows.dtype.newbyteorder(order)).tobytes()
    spread = rows[:, :, None].astype(np.uint32) >> np.arange(bits - 1, -1, -1, dtype=np.uint32) & 1
    return np.packbits(spread.astype(np.uint8).reshape(len(rows), -1), axis=1).tobytes()


def _compress(data: bytes, compression: int) -> bytes:
    if compression == DEFLATE:
        return zlib.compress(data)
    if compression == LZMA:
        return lzma.compress(data)
    if compression == PACKBITS:
        return b"".join(bytes([len(data[n : n + 128]) - 1]) + data[n : n + 128] for n in range(0, len(data), 128))
    if compression == LZW:  # a clear code before each 250 bytes keeps every code at nine bits
        codes = [code for n in range(0, len(data), 250) for code in (256, *data[n : n + 250])] + [257]
        bits = np.array(codes)[:, None] >> np.arange(8, -1, -1) & 1
        return np.packbits(bits.astype(np.uint8)).tobytes()
    return data
