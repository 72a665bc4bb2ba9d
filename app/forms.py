"""Parses the multipart forms that browsers and `curl -F` send."""

import logging

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartParser
from starlette.requests import Request

from app.exceptions import BadRequest, Unavailable

log = logging.getLogger(__name__)


async def read_form(request: Request, max_files: int, max_fields: int) -> FormData:
    """Parse a multipart form. The caller closes it.

    Files above Starlette's spool size are in the temporary folder.

    Raises:
        BadRequest: The form cannot be decoded with the charset of its Content-Type.
        Unavailable: The temporary folder cannot store a file.
        starlette.exceptions.HTTPException: The form is malformed, or has more than `max_files` files or `max_fields`
            fields.
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
        if isinstance(part, UploadFile) and part.filename:  # some charsets decode to text that UTF-8 cannot encode
            part.filename = part.filename.encode("utf-8", "replace").decode()
    return form
