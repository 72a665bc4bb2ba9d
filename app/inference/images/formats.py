"""Name the format of a file by its first bytes, so that a refusal can name it.

In: the bytes of a file.  Out: a name, such as "JPEG XL", or None.
"""

_HEIF_BRANDS = {
    b"avif": "AVIF",
    b"avis": "AVIF",
    b"heic": "HEIC",
    b"heix": "HEIC",
    b"heim": "HEIC",
    b"heis": "HEIC",
    b"hevc": "HEIC",
    b"hevx": "HEIC",
    b"crx ": "Canon raw (CR3)",
}
_MAX_BRANDS = 64

# Offset and bytes of a signature, and the name of its format.
_SIGNATURES = (
    (0, b"\xff\xd8", "JPEG"),
    (0, b"\x89PNG", "PNG"),
    (8, b"WEBP", "WEBP"),
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),
    (0, b"MM\0+", "TIFF"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"8BPS", "Photoshop (PSD)"),
    (0, b"\0\0\1\0", "icon (ICO)"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance (HDR)"),
    (0, b"qoif", "QOI"),
    (0, b"%PDF", "PDF"),
    (0, b"PK\3\4", "zip"),
    (4, b"ftyp", "MP4 or HEIF"),
)


def recognize(data: bytes) -> str | None:
    """Return the name of the format whose signature the file has, or None if no known format has it."""
    if data[4:8] == b"ftyp":
        brands = [data[8:12], *(data[place : place + 4] for place in range(16, _brands_end(data), 4))]
        for brand in brands:
            if name := _HEIF_BRANDS.get(brand):
                return name
    for offset, signature, name in _SIGNATURES:
        if data.startswith(signature, offset):
            return name
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<svg", b"<?xml")) and b"<svg" in data[:4096].lower():
        return "SVG"
    return "HTML" if start.startswith((b"<!doctype html", b"<html")) else None


def _brands_end(data: bytes) -> int:
    return min(int.from_bytes(data[:4]), len(data), 16 + 4 * _MAX_BRANDS)
