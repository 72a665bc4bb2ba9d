"""Test that multipart forms of all clients are read, and that the errors of malformed forms name the fault."""

import asyncio
from contextlib import suppress
from random import Random
from tempfile import SpooledTemporaryFile
from typing import Any

import pytest
from api import BOUNDARY, MULTIPART, make_file_part, make_form
from starlette.requests import Request

from app.exceptions import BadRequest, MalformedBody, Problem, UnsupportedMediaType
from app.routes import plain_form
from app.routes.uploads import read_form

CONTENT = b"\x89PNG\r\n\x1a\n--a-boundar\r\n\x00\xff"  # almost contains the boundary


def read(
    body: bytes, content_type: str = MULTIPART["Content-Type"], size: int = 1 << 20, is_chunked: bool = True
) -> list[Any]:
    """Read a form that arrives in parts of `size` bytes. Return its files as (name, content), then its text fields."""
    headers = [(b"content-type", content_type.encode())]
    if not is_chunked:
        headers.append((b"content-length", str(len(body)).encode()))
    messages = iter(
        [{"type": "http.request", "body": body[at : at + size], "more_body": True} for at in range(0, len(body), size)]
        + [{"type": "http.request"}]
    )

    async def receive() -> Any:
        return next(messages)

    async def parse() -> list[Any]:
        request = Request({"type": "http", "headers": headers}, receive)
        form = await read_form(request, 3, "curl -F file=@a.png")
        try:
            return [*((upload.filename, upload.file.read()) for upload in form.files), *form.fields]
        finally:
            await form.close()

    return asyncio.run(parse())


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        (b'name="file"; filename="a.png"', "a.png"),
        (b"name=file; filename=a.png", "a.png"),
        (b'filename="a.png"; name="file"', "a.png"),
        (b'Name="file"; FileName="a.png"', "a.png"),
        (b'name="file"; filename=""', ""),
        (b'name="file"; filename="\xc3\xa4.png"', "ä.png"),
        (b"name=\"file\"; filename*=UTF-8''a.png", "a.png"),
        (b"name=\"file\"; filename*=utf-8''%C3%A4%20b.png", "ä b.png"),
        (b"name=\"file\"; filename*=utf-8'de'%C3%A4.png", "ä.png"),
        (b"name=\"file\"; filename*=ISO-8859-1''%E4.png", "ä.png"),
        (b"filename*=UTF-8''a.png; name=\"file\"", "a.png"),
        (b"name=\"file\"; FILENAME*=UTF-8''a.png", "a.png"),
        (b"name=file; filename=_.png; filename*=utf-8''%C3%A4.png", "ä.png"),  # sent by .NET and PowerShell
        (b"name=\"file\"; filename*=no-such-charset''a.png", "a.png"),
        (b"name=\"file\"; filename*=undefined''a.png", ""),
        (b"name=\"file\"; filename*0*=UTF-8''%C3%A4; filename*1=b.png", "äb.png"),  # RFC 2231
        (b'name="file"; filename*=nonsense', "nonsense"),
        (b'name="file"', None),
        (b"name=file", None),
    ],
)
def test_part_of_the_field_file_is_a_file(disposition: bytes, name: str | None) -> None:
    assert read(make_form(make_file_part(CONTENT, disposition))) == [(name, CONTENT)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64])
def test_form_may_arrive_in_parts_of_any_size(size: int) -> None:
    parts = (
        make_file_part(CONTENT),
        make_file_part(b"b" * 300, b"name=file; filename*=utf-8''b.png"),
        make_file_part(b"3", b"name=k"),
    )
    assert read(make_form(*parts), size=size) == [("a.png", CONTENT), ("b.png", b"b" * 300), ("k", "3")]


def test_form_that_is_cut_off_anywhere_says_so() -> None:
    body = make_form(make_file_part(CONTENT), make_file_part(b"3", b'name="top_k"'))
    whole = read(body)
    for length in range(len(body) - len(b"\r\n")):
        with pytest.raises(MalformedBody, match=f"the form ends before its closing boundary '--{BOUNDARY}--'"):
            read(body[:length])
    for length in range(len(body) - len(b"\r\n"), len(body)):
        assert read(body[:length]) == whole
    assert read(body + b"an epilogue") == whole


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            make_form(make_file_part(CONTENT), line_end=b"\n"),
            "does not begin with the boundary '--a-boundary' as a line",
        ),
        (make_form(make_file_part(CONTENT)).replace(b'png"\r\n', b'png"\n'), "with LF; they must end with CRLF"),
        (b"--other\r\n" + make_form(make_file_part(CONTENT)), "does not begin with the boundary"),
        (b"a preamble\r\n" + make_form(make_file_part(CONTENT)), "does not begin with the boundary"),
        (CONTENT, "does not begin with the boundary"),
        (make_form((b"X: " + b"a" * 5000, b"")), "a header of a part is longer than 4,224 bytes"),
        (make_form((b"X" * 5000 + b": a", b"")), "a header of a part is longer than 4,224 bytes"),
        (make_form((b"\r\n".join(b"X%d: a" % number for number in range(9)), b"")), "more than 8 headers"),
        (make_form((b"no colon", b"")), "is not a line 'Name: value'"),
        (make_form((b": no name", b"")), "is not a line 'Name: value'"),
        (make_form((b"Content-Type: image/png", CONTENT)), "the Content-Disposition of a part has no name"),
        (make_form(*[make_file_part(CONTENT)] * 4), "Too many files. Maximum number of files is 3."),
        (make_form(*[make_file_part(b"1", b"name=k")] * 9), "Too many fields. Maximum number of fields is 8."),
        (make_form(make_file_part(bytes(2 << 20), b"name=k")), "maximum size of 1024KB"),
    ],
)
def test_malformed_form_is_named(body: bytes, words: str) -> None:
    with pytest.raises(MalformedBody) as raised:
        read(body)
    assert words in raised.value.detail
    assert raised.value.detail.startswith("the form cannot be read: ")


@pytest.mark.parametrize(
    ("content_type", "words"),
    [
        ("multipart/form-data", "its Content-Type has no boundary"),
        ("multipart/form-data; boundary=", "does not begin with the boundary '--'"),
        ("multipart/form-data; boundary=other", "does not begin with the boundary '--other'"),
        (f"multipart/form-data; boundary={'x' * 257}", "its boundary is longer than 256 bytes"),
    ],
)
def test_wrong_boundary_is_named(content_type: str, words: str) -> None:
    with pytest.raises(MalformedBody) as raised:
        read(make_form(make_file_part(CONTENT)), content_type)
    assert words in raised.value.detail


def test_quoted_boundary_and_upper_case_are_read() -> None:
    for content_type in (f'multipart/form-data; boundary="{BOUNDARY}"', f"Multipart/Form-Data;Boundary={BOUNDARY}"):
        assert read(make_form(make_file_part(CONTENT)), content_type) == [("a.png", CONTENT)]


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        (make_form(), BadRequest, "the form has no field 'file'; send every file"),
        (make_form(make_file_part(b"1", b"name=top_k")), BadRequest, "the form has no field 'file'; send every file"),
        (make_form(make_file_part(CONTENT, b"name=image; filename=a")), BadRequest, "but a file in the field 'image'"),
        (
            make_form(make_file_part(CONTENT), make_file_part(b"", b"name=mask; filename=a")),
            BadRequest,
            "a file in the field 'mask'",
        ),
        (make_form(make_file_part(b"photo.jpg", b"name=file")), BadRequest, "the text 'photo.jpg' in the field 'file'"),
        (
            make_form(make_file_part(b"data:image/png;base64,iVBORw0", b"name=file")),
            BadRequest,
            "the text 'data:image/png",
        ),
    ],
)
def test_form_without_a_file_is_named(body: bytes, kind: type[Problem], words: str) -> None:
    with pytest.raises(kind) as raised:
        read(body)
    assert words in raised.value.detail


@pytest.mark.parametrize("header", [b"Content-Transfer-Encoding", b"Content-Encoding"])
def test_encoded_part_is_named(header: bytes) -> None:
    head, content = make_file_part(CONTENT)
    for encoding in (b"base64", b"gzip", b"quoted-printable"):
        with pytest.raises(UnsupportedMediaType, match=f"{header.decode()} '{encoding.decode()}' of a file in a form"):
            read(make_form((head + b"\r\n" + header + b": " + encoding, content)))
    for encoding in (b"binary", b"8bit", b"identity", b""):
        assert read(make_form((head + b"\r\n" + header + b": " + encoding, content))) == [("a.png", CONTENT)]


def test_the_files_of_a_refused_form_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    files = list[SpooledTemporaryFile[bytes]]()

    def note(max_size: int) -> SpooledTemporaryFile[bytes]:
        file = SpooledTemporaryFile[bytes](max_size)
        files.append(file)
        return file

    monkeypatch.setattr("starlette.formparsers.SpooledTemporaryFile", note)
    whole, text = make_form(make_file_part(CONTENT)), make_form(make_file_part(b"text", b"name=file"))
    for body in (whole, whole[:-10], make_form(make_file_part(CONTENT), (b"no colon", b"")), text):
        with suppress(Problem):
            read(body)
    assert len(files) == 4
    assert all(file.closed for file in files)


ORDINARY = (
    make_form(make_file_part(CONTENT)),
    make_form(make_file_part(CONTENT), make_file_part(b""), (b'Content-Disposition: form-data; name="top_k"', b"3")),
    make_form(
        (b'Content-Disposition: form-data; name="file"; filename="a b.jpg"\r\nContent-Type: image/jpeg', CONTENT)
    ),
)


@pytest.mark.parametrize("body", ORDINARY)
def test_an_ordinary_form_is_split_in_memory(body: bytes) -> None:
    parts = plain_form.split(MULTIPART["Content-Type"], body)
    assert parts
    assert read(body, is_chunked=False) == read(body)


@pytest.mark.parametrize("quoted", [False, True])
def test_a_form_split_in_memory_equals_the_streamed_form(quoted: bool) -> None:
    """Change ordinary forms at random. The forms and errors of both parsers must be equal."""
    random = Random(1)  # noqa: S311
    content_type = f'multipart/form-data; boundary="{BOUNDARY}"' if quoted else MULTIPART["Content-Type"]
    pieces = (
        b"\r\n",
        b"\n",
        b"--",
        b'"',
        b"\\",
        b"%22",
        b"\xc3\xa4",
        b"file",
        b"; filename=",
        f"--{BOUNDARY}".encode(),
        b"",
    )
    split = 0
    for _ in range(1000):
        body = bytearray(random.choice(ORDINARY))
        for _ in range(random.randint(0, 2)):
            at = random.randrange(len(body))
            body[at : at + random.randint(0, 3)] = random.choice(pieces)
        split += plain_form.split(content_type, bytes(body)) is not None
        outcomes = []
        for is_chunked in (True, False):
            try:
                outcomes.append(read(bytes(body), content_type, is_chunked=is_chunked))
            except Problem as error:
                outcomes.append([type(error), error.detail])
        assert outcomes[0] == outcomes[1], bytes(body)
    assert split > 150
