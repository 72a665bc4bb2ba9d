"""Write HEIC files without an encoder: an HEVC picture whose blocks hold their samples uncompressed (I_PCM).

The syntax is that of ITU-T H.265 and ISO/IEC 23008-12. Each coding block of 16x16 pixels is coded with three binary
decisions and then holds its samples as bytes.
"""

import struct

import numpy as np
from numpy.typing import NDArray

_BLOCK = 16
# Ranges of the less probable value by the state of the one context, which rises with each block.
_LPS_RANGES = ((128, 176, 208, 240), (128, 167, 197, 227), (128, 158, 187, 216), (123, 150, 178, 205))
_VPS, _SPS, _PPS, _IDR = 32, 33, 34, 19


class _Bits:
    """Bits of a syntax structure."""

    def __init__(self) -> None:
        self._bits = ""

    def u(self, value: int, size: int = 1) -> "_Bits":
        """Append an unsigned number of a fixed size."""
        self._bits += f"{value:0{size}b}"
        return self

    def ue(self, *values: int) -> "_Bits":
        """Append numbers in the Exp-Golomb code."""
        for value in values:
            code = f"{value + 1:b}"
            self._bits += "0" * (len(code) - 1) + code
        return self

    def aligned(self, stop: bool = True) -> bytes:
        """Return the bytes, after a stop bit and zeros."""
        bits = self._bits + "1" * stop
        bits += "0" * (-len(bits) % 8)
        return bytes(int(bits[place : place + 8], 2) for place in range(0, len(bits), 8))


class _Cabac:
    """The arithmetic encoder of H.265, section 9.3.4, as far as uncompressed blocks need it."""

    def __init__(self) -> None:
        self.bits = _Bits()
        self._low, self._range, self._outstanding, self._is_first = 0, 510, 0, True

    def encode_expected(self, lps_range: int) -> None:
        """Encode the more probable value of a context."""
        self._range -= lps_range
        self._renormalize()

    def terminate(self, value: int) -> None:
        """Encode a terminating value. After a 1, the encoder is flushed."""
        self._range -= 2
        if value:
            self._low += self._range
            self._range = 2
            self._renormalize()
            self._put(self._low >> 9 & 1)
            self.bits.u(self._low >> 7 & 3 | 1, 2)
        else:
            self._renormalize()

    def _renormalize(self) -> None:
        while self._range < 256:
            if self._low < 256:
                self._put(0)
            elif self._low >= 512:
                self._low -= 512
                self._put(1)
            else:
                self._low -= 256
                self._outstanding += 1
            self._range <<= 1
            self._low <<= 1

    def _put(self, bit: int) -> None:
        if self._is_first:
            self._is_first = False
        else:
            self.bits.u(bit)
        for _ in range(self._outstanding):
            self.bits.u(1 - bit)
        self._outstanding = 0


def heic(
    luma: NDArray[np.uint8], cb: int = 128, cr: int = 128, *, turns: int = 0, size: tuple[int, int] | None = None
) -> bytes:
    """Return a HEIC of at most four blocks.

    Args:
        luma: [height, width], multiples of 16.
        cb: Blue difference of every pixel.
        cr: Red difference of every pixel.
        turns: Quarter turns against the clock that a viewer must make (the property irot).
        size: Declared width and height, those of the picture by default.
    """
    height, width = luma.shape
    parameters = {_VPS: _video_parameters(), _SPS: _sequence_parameters(width, height), _PPS: _picture_parameters()}
    picture = _nal(_IDR, _slice(luma, cb, cr))
    units = b"".join(
        struct.pack(">BHH", 0x80 | kind, 1, len(unit)) + unit
        for kind, unit in ((kind, _nal(kind, content)) for kind, content in parameters.items())
    )
    general = bytes([1, 0x03]) + struct.pack(">L", 0x70000000) + b"\x90" + bytes(5) + bytes([30])
    configuration = general + bytes([0xF0, 0, 0xFC, 0xFD, 0xF8, 0xF8, 0, 0, 0x0F, 3]) + units
    declared = size or (width, height)
    properties = [
        _box(b"hvcC", configuration),
        _box(b"ispe", bytes(4) + struct.pack(">LL", *declared)),
        _box(b"colr", b"nclx" + struct.pack(">HHHB", 1, 13, 6, 0x80)),
        _box(b"irot", bytes([turns])),
    ]
    associations = bytes([0x81, 2, 3, 0x84])
    data = struct.pack(">L", len(picture)) + picture
    meta = b""
    for _ in range(2):  # the second time with the place of the picture
        place = len(meta) + 32 if meta else 0
        meta = _box(
            b"meta",
            bytes(4)
            + _box(b"hdlr", bytes(8) + b"pict" + bytes(13))
            + _box(b"pitm", bytes(4) + struct.pack(">H", 1))
            + _box(b"iinf", bytes(4) + struct.pack(">H", 1) + _box(b"infe", b"\2\0\0\0\0\1\0\0hvc1\0"))
            + _box(
                b"iprp",
                _box(b"ipco", b"".join(properties))
                + _box(b"ipma", bytes(4) + struct.pack(">LHB", 1, 1, len(associations)) + associations),
            )
            + _box(b"iloc", bytes(4) + b"\x44\0\0\1\0\1\0\0\0\1" + struct.pack(">LL", place, len(data))),
        )
    return _box(b"ftyp", b"heic\0\0\0\0mif1heic") + meta + _box(b"mdat", data)


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">L4s", 8 + len(content), kind) + content


def _nal(kind: int, content: bytes) -> bytes:
    """Return a unit. A byte of 3 keeps its content from looking like a start code."""
    escaped, zeros = bytearray(), 0
    for byte in content:
        if zeros == 2 and byte <= 3:
            escaped.append(3)
            zeros = 0
        escaped.append(byte)
        zeros = zeros + 1 if byte == 0 else 0
    return bytes([kind << 1, 1]) + bytes(escaped)


def _profile(bits: _Bits) -> _Bits:
    """Append Main Still Picture, level 1."""
    return bits.u(0, 3).u(3, 5).u(0x70000000, 32).u(0b1001, 4).u(0, 43).u(0).u(30, 8)


def _video_parameters() -> bytes:
    bits = _profile(_Bits().u(0, 4).u(3, 2).u(0, 6).u(0, 3).u(1).u(0xFFFF, 16))
    return bits.u(1).ue(0, 0, 0).u(0, 6).ue(0).u(0).u(0).aligned()


def _sequence_parameters(width: int, height: int) -> bytes:
    bits = _profile(_Bits().u(0, 4).u(0, 3).u(1)).ue(0, 1, width, height).u(0).ue(0, 0, 0).u(1).ue(0, 0, 0)
    bits.ue(1, 0, 0, 2, 0, 0)  # blocks of 16x16, transforms of 4x4 to 16x16
    bits.u(0, 3).u(1).u(7, 4).u(7, 4).ue(1, 0).u(1)  # uncompressed blocks of 16x16 with 8 bits
    return bits.ue(0).u(0, 5).aligned()


def _picture_parameters() -> bytes:
    bits = _Bits().ue(0, 0).u(0, 7).ue(0, 0, 0).u(0, 3).ue(0, 0).u(0, 7)
    return bits.u(1).u(0b01, 2).u(0, 2).ue(0).u(0, 2).aligned()  # without deblocking


def _slice(luma: NDArray[np.uint8], cb: int, cr: int) -> bytes:
    data = _Bits().u(1).u(0).ue(0, 2, 0).aligned()
    blocks = [
        luma[top : top + _BLOCK, left : left + _BLOCK]
        for top in range(0, luma.shape[0], _BLOCK)
        for left in range(0, luma.shape[1], _BLOCK)
    ]
    chroma = bytes([cb]) * (_BLOCK // 2) ** 2 + bytes([cr]) * (_BLOCK // 2) ** 2
    for number, block in enumerate(blocks):
        cabac = _Cabac()
        if number:
            cabac.terminate(0)  # the slice does not end here
        cabac.encode_expected(_LPS_RANGES[number][_quarter(number)])  # one partition
        cabac.terminate(1)  # uncompressed
        data += cabac.bits.aligned(stop=False) + block.tobytes() + chroma
    end = _Cabac()
    end.terminate(1)
    return data + end.bits.aligned(stop=False)


def _quarter(number: int) -> int:
    """Return the quarter of the range in which the encoder is before the decision: 510, or 508 after a terminate."""
    return (508 if number else 510) >> 6 & 3
