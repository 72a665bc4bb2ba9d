"""Read zips that clients send, and write zips of files that the service sends.

    zip --open_zip--> checked directory --read_chunks--> contents, in bounded pieces
    files --zip_chunks--> zip, in pieces

The number of entries is checked before `zipfile` reads the directory. Entries may not share bytes, and may only be
stored or deflated. Their sizes are those that the directory names, so a caller adds them up before it reads.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from typing_extensions import override

from app.exceptions import BadRequest, TooLarge
from app.machine import MIB
from training.text import quote

# Python decompresses data of other methods at once, with unbounded memory.
_BOUNDED_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# Exceptions that zipfile raises for damaged files. RuntimeError also stands for encrypted files.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    struct.error,
    OSError,
    RuntimeError,
    ValueError,
    IndexError,
    EOFError,
)
_ENTRY_HEADER = struct.Struct("<26x2H")  # precedes an entry's data; ends with the lengths of its name and extra fields
_HEADER_SIGNATURE = b"PK\x03\x04"
_ENTRY_SIGNATURE = b"PK\x01\x02"  # begins every entry of a zip's directory
_CHUNK = 64 << 10


@contextmanager
def open_zip(file: BinaryIO, max_entries: int) -> Iterator[zipfile.ZipFile]:
    """Open a zip and check its directory.

    Args:
        file: The zip, seekable.
        max_entries: Largest number of entries. Central directories of an uncompressed zip inside the zip count as well.

    Raises:
        BadRequest: The file is not a zip, is damaged, or has entries that share bytes.
        TooLarge: The zip has too many entries.
    """
    if _count_entries(file) > max_entries:
        raise TooLarge(f"the zip has more than {max_entries:,} entries")
    with _explain_errors():
        archive = zipfile.ZipFile(file)
    with archive:
        with _explain_errors():
            _require_apart(file, archive)
        yield archive


def read_chunks(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    """Read an entry in pieces. It has at most `entry.file_size` bytes.

    Raises:
        BadRequest: The entry is damaged, encrypted, or compressed with another method than deflate.
    """
    if entry.compress_type not in _BOUNDED_METHODS:
        raise BadRequest(f"{entry.filename} is compressed with an unsupported method; use deflate")
    with _explain_errors():
        member = archive.open(entry)
    with member:
        while True:
            with _explain_errors():
                chunk = member.read(_CHUNK)
            if not chunk:
                return
            yield chunk


def zip_chunks(files: Iterable[Path]) -> Iterator[bytes]:
    """Write a zip of files, uncompressed and without their folders, in pieces.

    Raises:
        OSError: A file cannot be read.
    """
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for path in files:
            with archive.open(zipfile.ZipInfo.from_file(path, path.name), "w") as entry, path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    entry.write(chunk)
                    yield sink.take()
    yield sink.take()


class _Sink(io.RawIOBase):
    """A stream that keeps written bytes until they are taken. It cannot seek, so sizes follow the data in a zip."""

    def __init__(self) -> None:
        self._written = bytearray()

    @override
    def writable(self) -> bool:
        return True

    @override
    def write(self, data: Any) -> int:
        self._written += data
        return len(data)

    def take(self) -> bytes:
        """Return the bytes that were written since the last call."""
        taken = bytes(self._written)
        self._written.clear()
        return taken


@contextmanager
def _explain_errors() -> Iterator[None]:
    try:
        yield
    except _ZIP_ERRORS as error:
        raise BadRequest(f"the zip cannot be read: {error}") from None


def _count_entries(file: BinaryIO) -> int:
    """Return an upper bound on the entries of a zip: the number of entry signatures in the file.

    `zipfile` reads the whole directory and allocates memory for each entry, so the bound is checked first.
    """
    count, tail = 0, b""
    while chunk := file.read(MIB):
        chunk = tail + chunk
        count += chunk.count(_ENTRY_SIGNATURE)
        tail = chunk[-len(_ENTRY_SIGNATURE) + 1 :]
    return count


def _require_apart(file: BinaryIO, archive: zipfile.ZipFile) -> None:
    """Check that no two entries share bytes. Otherwise a few kilobytes could hold one file a thousand times.

    Later releases of Python check this when an entry is opened, but accept two entries at the same offset.

    Raises:
        BadRequest: An entry does not begin with a header, or overlaps the next entry or the directory.
    """
    end, following = archive.start_dir, "the directory"
    for entry in sorted(archive.infolist(), key=lambda each: each.header_offset, reverse=True):
        name = quote(entry.filename)
        if not 0 <= entry.header_offset < end:
            raise BadRequest(f"the zip cannot be read: {name} and {following} overlap")
        file.seek(entry.header_offset)
        header = file.read(_ENTRY_HEADER.size)
        if len(header) < _ENTRY_HEADER.size or not header.startswith(_HEADER_SIGNATURE):
            raise BadRequest(f"the zip cannot be read: {name} has no header at byte {entry.header_offset:,}")
        name_length, extra_length = _ENTRY_HEADER.unpack(header)
        if entry.header_offset + len(header) + name_length + extra_length + entry.compress_size > end:
            raise BadRequest(f"the zip cannot be read: {name} and {following} overlap")
        end, following = entry.header_offset, name
