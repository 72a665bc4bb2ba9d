"""Write small ICC profiles: RGB by primaries and a tone curve, gray by a tone curve, CMYK by a table."""

import struct

import numpy as np
from numpy.typing import NDArray

Curve = float | tuple[float, float, float, float, float]
"""An exponent, or the parameters g, a, b, c, d of the curve of sRGB: (a x + b)^g from d on, c x below."""

SRGB_CURVE: Curve = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
D65 = (0.3127, 0.3290)
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
DISPLAY_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
PROPHOTO = ((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001))
D50 = (0.3457, 0.3585)
_WHITE = np.array([0.9642, 1.0, 0.8249])  # D50, the white of the connection space
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
RGB_SPACES: dict[str, tuple[tuple[tuple[float, float], ...], tuple[float, float], Curve]] = {
    "sRGB": (SRGB, D65, SRGB_CURVE),
    "Display P3": (DISPLAY_P3, D65, SRGB_CURVE),
    "Adobe RGB": (ADOBE_RGB, D65, 563 / 256),
    "ProPhoto": (PROPHOTO, D50, 1.8),
    "linear sRGB": (SRGB, D65, 1.0),
}
"""Primaries, white point and tone curve of common color spaces."""


def rgb_to_d50(primaries: tuple[tuple[float, float], ...], white: tuple[float, float]) -> NDArray[np.float64]:
    """Return the matrix from linear RGB to XYZ with D50 as white."""
    columns = np.array([_xyz(*primary) for primary in primaries]).T
    target = _xyz(*white)
    matrix = columns * np.linalg.solve(columns, target)
    scale = np.diag((_BRADFORD @ _WHITE) / (_BRADFORD @ target))
    adapted: NDArray[np.float64] = np.linalg.inv(_BRADFORD) @ scale @ _BRADFORD @ matrix
    return adapted


def from_srgb(pixels: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    """Convert 8-bit sRGB [..., 3] to the numbers that have the same color in a space of `RGB_SPACES`."""
    primaries, white, curve = RGB_SPACES[name]
    xyz = linear(pixels / 255, SRGB_CURVE) @ rgb_to_d50(SRGB, D65).T
    values = np.clip(xyz @ np.linalg.inv(rgb_to_d50(primaries, white)).T, 0, 1)
    return np.rint(encoded(values, curve) * 255).astype(np.uint8)


def linear(values: NDArray[np.float64], curve: Curve) -> NDArray[np.float64]:
    """Decode values from 0 to 1 to linear light."""
    if isinstance(curve, tuple):
        g, a, b, c, d = curve
        return np.where(values < d, c * values, (a * values + b) ** g)
    return np.asarray(values**curve)


def encoded(values: NDArray[np.float64], curve: Curve) -> NDArray[np.float64]:
    """Encode linear light from 0 to 1, the inverse of `linear`."""
    if isinstance(curve, tuple):
        g, a, b, c, d = curve
        return np.where(values < c * d, values / c, (np.maximum(values, 0) ** (1 / g) - b) / a)
    return np.asarray(values ** (1 / curve))


def rgb_profile(name: str) -> bytes:
    """Return a profile of a space of `RGB_SPACES`."""
    primaries, white, curve = RGB_SPACES[name]
    tags = {f"{letter}TRC": _curve(curve) for letter in "rgb"}
    matrix = rgb_to_d50(primaries, white)
    tags |= {f"{letter}XYZ": _xyz_tag(matrix[:, number]) for number, letter in enumerate("rgb")}
    return assemble("RGB ", tags)


def gray_profile(gamma: float) -> bytes:
    """Return a gray profile with an exponent as its tone curve."""
    return assemble("GRAY", {"kTRC": _curve(gamma)})


def cmyk_profile(points: int = 9, size: int = 0) -> bytes:
    """Return a CMYK profile of ideal inks: each ink takes one of red, green and blue of linear sRGB, black takes all.

    Args:
        points: Points of the table on each axis.
        size: Size in bytes to which the profile is padded with an unknown tag.
    """
    axis = np.linspace(1, 0, points)
    grid = np.stack(np.meshgrid(axis, axis, axis, axis, indexing="ij"), -1)
    xyz = grid[..., :3] * grid[..., 3:] @ rgb_to_d50(SRGB, D65).T
    table = np.rint(np.clip(_lab(xyz), 0, 1) * 65280).astype(">u2")
    identity = np.array([0, 65535], ">u2").tobytes()
    header = struct.pack(">4s4xBBBx9iHH", b"mft2", 4, 3, points, *(65536, 0, 0, 0, 65536, 0, 0, 0, 65536), 2, 2)
    tags = {"A2B0": header + 4 * identity + table.tobytes() + 3 * identity}
    if size:
        tags["zzzz"] = bytes(size)
    return assemble("CMYK", tags, pcs="Lab ", device="prtr")


def assemble(space: str, tags: dict[str, bytes], pcs: str = "XYZ ", device: str = "mntr") -> bytes:
    """Return a profile of version 2.4 with these tags, a description, a copyright and D50 as white."""
    text = b"desc" + struct.pack(">4xL", 5) + b"test\0" + bytes(78)
    tags = {"desc": text, "cprt": b"text" + bytes(4) + b"none\0", "wtpt": _xyz_tag(_WHITE), **tags}
    place = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">L", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sLL", name.encode(), place + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(
        ">L4sL4s4s4s12s4s4sL4sLLQL12s4s",
        place + len(body), b"", 0x02400000, device.encode(), space.encode(), pcs.encode(), bytes(12), b"acsp",
        b"", 0, b"", 0, 0, 0, 0, _s15(_WHITE), b"",
    )  # fmt: skip
    return head.ljust(128, b"\0") + table + body


def _xyz(x: float, y: float) -> NDArray[np.float64]:
    return np.array([x / y, 1.0, (1 - x - y) / y])


def _lab(xyz: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return L, a, b from 0 to 1, in the encoding of the profile's table."""
    ratio = xyz / _WHITE
    root = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([(116 * y - 16) / 100, (500 * (x - y) + 128) / 255, (200 * (y - z) + 128) / 255], -1)


def _s15(values: NDArray[np.float64]) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def _xyz_tag(values: NDArray[np.float64]) -> bytes:
    return b"XYZ " + bytes(4) + _s15(values)


def _curve(curve: Curve) -> bytes:
    if isinstance(curve, tuple):
        return struct.pack(">4s4xHxx", b"para", 3) + _s15(np.array(curve))
    return struct.pack(">4s4xHxx", b"para", 0) + _s15(np.array([curve]))
