"""Build bodies for the HTTP API, and check problem responses."""

import io
import zipfile

import httpx
from PIL import Image

from training.dataset import Dataset

BOUNDARY = "a-boundary"
MULTIPART = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
"""Headers of a form that `form` has written."""


def encode_png(dataset: Dataset, row: int) -> bytes:
    """Return an image of the test set as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(dataset.test.images[row]).save(buffer, "PNG")
    return buffer.getvalue()


def make_zip(files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip of files, given by their names."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def make_form(*parts: tuple[bytes, bytes], end: bytes = b"--", line_end: bytes = b"\r\n") -> bytes:
    """Return a multipart form with exactly these bytes.

    Args:
        parts: Header lines and content of each part.
        end: Bytes after the last boundary.
        line_end: End of every line outside the contents.
    """
    delimiter = b"--" + BOUNDARY.encode()
    lines = [line for head, content in parts for line in (delimiter, head, b"", content)]
    return line_end.join([*lines, delimiter + end, b""])


def make_file_part(content: bytes, disposition: bytes = b'name="file"; filename="a.png"') -> tuple[bytes, bytes]:
    """Return a part for `form` with the parameters of its Content-Disposition."""
    return b"Content-Disposition: form-data; " + disposition, content


def assert_problem(response: httpx.Response, status: int, words: str) -> None:
    """Assert that a response is a problem with this status, whose detail has these words."""
    assert response.status_code == status, response.text[:1000]
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == status
    assert body["title"]
    assert words in body["detail"], body["detail"]
