"""Read the media type and the multipart form of a request, as browsers and other HTTP clients send it."""

import logging
from contextlib import aclosing, suppress
from dataclasses import dataclass
from email.message import Message
from email.utils import collapse_rfc2231_value
from io import BytesIO
from typing import Any

from pydantic import BaseModel
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import DEFAULT_MAX_HEADER_COUNT, DEFAULT_MAX_HEADER_SIZE, parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from typing_extensions import override

from app.exceptions import BadRequest, MalformedBody, Unavailable, UnsupportedMediaType
from app.routes import plain_form
from training.text import quote

log = logging.getLogger(__name__)

MULTIPART = "multipart/form-data"
URLENCODED = "application/x-www-form-urlencoded"
"""Type of the bodies of several clients, such as `curl --data-binary` and `wget --post-file`, whatever they contain."""

_FILE = "file"
_MAX_FIELDS = 8
_MAX_TEXT = 64  # first bytes of a file part without a file name that are looked at
_ENCODING_HEADERS = (b"content-transfer-encoding", b"content-encoding")
_PLAIN_ENCODINGS = (b"", b"7bit", b"8bit", b"binary", b"identity")

# Parts of messages of the parsers, and the faults of the form that they stand for.
_PARSER_FAULTS = {
    "Missing boundary": "its Content-Type has no boundary; let the HTTP client set this header",
    "Boundary length": "its boundary is longer than 256 bytes",
    "Maximum header size": f"a header of a part is longer than {DEFAULT_MAX_HEADER_SIZE:,} bytes or lacks its CRLF",
    "Maximum header count": f"a part has more than {DEFAULT_MAX_HEADER_COUNT} headers",
    '"name" must be provided': "the Content-Disposition of a part has no name",
    " header": "a header of a part is not a line 'Name: value' that ends with CRLF",
    "boundary": "it does not begin with the boundary {boundary} as a line that ends with CRLF",
}


@dataclass(frozen=True, slots=True)
class Form:
    """A multipart form: the uploads of its fields `file`, and the names and values of its text fields."""

    files: list[UploadFile]
    fields: list[tuple[str, str]]

    async def close(self) -> None:
        """Close the files."""
        for upload in self.files:
            if not isinstance(upload.file, BytesIO):  # Starlette would close it in a thread
                await upload.close()


def media_type(request: Request) -> str:
    """Return the media type of a request in lower case, without parameters. Empty if there is no Content-Type."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def has_body(request: Request) -> bool:
    """Return whether the body has at least one byte. The rest of the body is not read."""
    async with aclosing(request.stream()) as stream:
        async for chunk in stream:
            if chunk:
                return True
    return False


def form_schema(file: dict[str, Any], parameters: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI schema of a form.

    Args:
        file: Schema of the field `file`.
        parameters: Parameters of the route, which may be text fields of the form.
    """
    properties = {_FILE: file, **parameters.model_json_schema()["properties"]}
    return {"type": "object", "required": [_FILE], "properties": properties, "additionalProperties": False}


async def read_form(request: Request, max_files: int, example: str) -> Form:
    """Parse a multipart form. The caller closes it.

    Files above Starlette's spool size are in the temporary folder.

    Args:
        request: The request.
        max_files: Largest number of files.
        example: A command that sends a right form, for error messages.

    Raises:
        MalformedBody: The form is malformed, incomplete, or has more than `max_files` files or 8 text fields.
        BadRequest: The form cannot be decoded with its charset, has no file, or has text or another field in its place.
        UnsupportedMediaType: A file is encoded, such as with base64.
        Unavailable: The temporary folder cannot store a file.
    """
    if plain := await _read_plain(request, max_files):
        return plain
    form = await _parse(request, max_files)
    try:
        return _split(form, example)
    except BaseException:
        await form.close()
        raise


async def _read_plain(request: Request, max_files: int) -> Form | None:
    """Read a form of the ordinary shape and at most 1 MiB.

    Returns:
        None if the form is not ordinary or has a fault. Its body can still be read.
    """
    length = request.headers.get("content-length", "")
    if not length.isdecimal() or int(length) > MultiPartParser.spool_max_size or "content-encoding" in request.headers:
        return None
    parts = plain_form.split(request.headers["content-type"], await request.body()) or []
    files = [UploadFile(BytesIO(part.content), filename=part.filename) for part in parts if part.filename is not None]
    texts = [part for part in parts if part.filename is None]
    if not 0 < len(files) <= max_files or len(texts) > _MAX_FIELDS:
        return None
    if any((part.name == _FILE) is (part.filename is None) for part in parts):
        return None
    if not all(part.content.isascii() for part in texts):
        return None
    return Form(files, [(part.name, part.content.decode()) for part in texts])


async def _parse(request: Request, max_files: int) -> FormData:
    try:
        async with aclosing(request.stream()) as stream:
            return await _FormParser(request.headers, stream, max_files=max_files, max_fields=_MAX_FIELDS).parse()
    except UnicodeError:
        raise BadRequest("the form cannot be decoded with the charset that its Content-Type names") from None
    except OSError as error:
        log.warning("a form was refused, because the temporary folder cannot store a file: %s", error)
        raise Unavailable(
            f"the service cannot store the form's files in its temporary folder ({error.strerror}); try again later, "
            f"or send files of up to {MultiPartParser.spool_max_size:,} bytes, which it keeps in memory"
        ) from error


def _split(form: FormData, example: str) -> Form:
    """Split a form into uploads and text fields."""
    files, fields, others = [], [], []
    for name, value in form.multi_items():
        if isinstance(value, str):
            fields.append((name, value))
        elif name == _FILE:
            _check_file(value, example)
            files.append(value)
        else:
            others.append(name)
    if not files:
        found = f", but a file in the field {quote(others[0])}" if others else ""
        raise BadRequest(f"the form has no field 'file'{found}; send every file in the field 'file': {example}")
    if others:
        raise BadRequest(f"the form has a file in the field {quote(others[0])}; send every file in the field 'file'")
    return Form(files, fields)


def _check_file(upload: UploadFile, example: str) -> None:
    """Refuse a file that the client has not sent as its bytes."""
    if upload.filename:  # some charsets decode to text that UTF-8 cannot encode
        upload.filename = upload.filename.encode("utf-8", "replace").decode()
    elif upload.filename is None:
        text = upload.file.read(_MAX_TEXT).decode("latin-1").strip()
        upload.file.seek(0)
        if text.isascii() and text.isprintable() and text:
            raise BadRequest(
                f"the form has the text {quote(text)} in the field 'file'; send the file itself: {example}"
            )
    for header, value in upload.headers.raw:
        if header in _ENCODING_HEADERS and (encoding := value.strip().lower()) not in _PLAIN_ENCODINGS:
            name, coding = header.title().decode(), quote(encoding.decode("latin-1"))
            raise UnsupportedMediaType(
                f"the {name} {coding} of a file in a form is not supported; send its bytes unchanged"
            )


class _FormParser(MultiPartParser):
    """Starlette's parser with three additions.

    A part with `filename*` (RFC 5987) is a file, and so is every part named `file`. A form that ends before its closing
    boundary is refused. The errors name the fault of the form.
    """

    _is_complete = False

    @override
    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        if data.find(b"\n", start, end) >= 0:
            raise MultiPartException("the lines of a part end with LF; they must end with CRLF")
        super().on_header_value(data, start, end)

    @override
    def on_headers_finished(self) -> None:
        part = self._current_part
        disposition = part.content_disposition or b""
        lower = disposition.lower()
        is_extended = b"filename*" in lower
        is_nameless = b"filename" not in lower and parse_options_header(disposition)[1].get(b"name") == _FILE.encode()
        if is_extended or is_nameless:  # give Starlette a file name; a later one in the header replaces it
            part.content_disposition = disposition.replace(b";", b'; filename="";', 1)
        super().on_headers_finished()
        if part.file and is_extended:
            part.file.filename = _extended_filename(disposition) or part.file.filename
        elif part.file and is_nameless:
            part.file.filename = None

    @override
    def on_end(self) -> None:
        self._is_complete = True

    @override
    async def parse(self) -> FormData:
        try:
            form = await super().parse()
        except MultiPartException as error:
            raise MalformedBody(f"the form cannot be read: {self._describe(error)}") from error
        if not self._is_complete:
            for file in self._files_to_close_on_error:  # the form lacks the file of a part that has not ended
                file.close()
            raise MalformedBody(
                f"the form ends before its closing boundary {self._quoted_boundary('--')}; send it again"
            )
        return form

    def _describe(self, error: MultiPartException) -> str:
        reason = str(error.__cause__) if isinstance(error.__cause__, FormParserError) else error.message
        fault = next((fault for words, fault in _PARSER_FAULTS.items() if words in reason), reason)
        return fault.replace("{boundary}", self._quoted_boundary())

    def _quoted_boundary(self, end: str = "") -> str:
        boundary = parse_options_header(self.headers["content-type"])[1].get(b"boundary", b"").decode("latin-1")
        return quote(f"--{boundary}{end}")


def _extended_filename(disposition: bytes) -> str | None:
    """Return the decoded parameter `filename*` of a Content-Disposition header, or None if it cannot be decoded."""
    message = Message()
    message["Content-Disposition"] = disposition.decode("latin-1")
    for name, value in message.get_params([], "content-disposition"):
        if name == "filename" and isinstance(value, tuple):
            with suppress(UnicodeError):
                return collapse_rfc2231_value(value)
    return None
