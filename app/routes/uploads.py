"""Read the media type and the multipart form of a request, as browsers and `curl -F` send it."""

import logging

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartParser
from starlette.requests import Request

from app.exceptions import BadRequest, Unavailable

log = logging.getLogger(__name__)


def media_type(request: Request) -> str:
    """Return the media type of a request in lower case, without parameters. Empty if there is no Content-Type."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


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
        raise BadRequest("the form cannot be decoded with the charset that its Content-Type names") from None
    except OSError as error:
        log.warning("a form was refused, because the temporary folder cannot store a file: %s", error)
        raise Unavailable(
            f"the service cannot store the form's files in its temporary folder ({error.strerror}); try again later, "
            f"or send files of up to {MultiPartParser.spool_max_size:,} bytes, which it keeps in memory"
        ) from error
    for part in form.getlist("file"):
        if isinstance(part, UploadFile) and part.filename:  # some charsets decode to text that UTF-8 cannot encode
            part.filename = part.filename.encode("utf-8", "replace").decode()
    return form
