"""Forms: what a browser or `curl -F` sends."""

import logging

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartParser
from starlette.requests import Request

from app.exceptions import BadRequest, Unavailable

log = logging.getLogger(__name__)


async def read_form(request: Request, max_files: int, max_fields: int) -> FormData:
    """The parts of a multipart form, to be closed by the caller; larger files are on disk.

    Raises:
        BadRequest: it cannot be decoded by the charset that it names.
        Unavailable: the temporary folder cannot take a larger file.
        starlette.exceptions.HTTPException: it is damaged, or has more parts than that.
    """
    try:
        form = await request.form(max_files=max_files, max_fields=max_fields)
    except UnicodeError:
        raise BadRequest("the form cannot be decoded by the charset that its Content-Type names") from None
    except OSError as error:
        log.warning("a form was refused, as the temporary folder cannot take a file: %s", error)
        raise Unavailable(
            f"the service cannot keep the form's files in its temporary folder ({error.strerror}); try again later, or "
            f"send files of up to {MultiPartParser.spool_max_size:,} bytes, which are not kept there"
        ) from error
    for part in form.getlist("file"):
        if isinstance(part, UploadFile) and part.filename:  # some charsets can give what no UTF-8 has
            part.filename = part.filename.encode("utf-8", "replace").decode()
    return form
