"""Defines the errors that a client sees, each with its HTTP status. `app.errors` turns them into responses.

This module imports only the standard library, so that the process that decodes costly images starts quickly.

body    --uploads-->          files    MalformedBody 400, UnsupportedMediaType 415
image   --images.encoded-->   pixels   UnsupportedImage 415, DamagedImage 422, TooLarge 413
request --decoding, batching--> logits Unavailable 503
name    --pool, store-->      model    NotFound 404, Conflict 409, Unavailable 503
recipe  --training.recipes--> job      BadRequest 422, Unavailable 503
caller  --access-->           route    TooManyRequests 429, Unauthorized 401, Forbidden 403
"""

from http import HTTPStatus
from typing import ClassVar, Literal


class Problem(Exception):
    """An error that the client sees.

    Args:
        detail: Text for the client: the error, the value that caused it, and a remedy.
    """

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    default_headers: ClassVar[dict[str, str]] = {}

    def __init__(self, detail: str):
        super().__init__(detail)
        self.detail = detail
        self.headers = dict(self.default_headers)


class MalformedBody(Problem):
    """The body does not have the form that its Content-Type or Content-Encoding names."""

    status = HTTPStatus.BAD_REQUEST


class UnsupportedMediaType(Problem):
    """The Content-Type of the request is not supported."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE


class UnsupportedImage(UnsupportedMediaType):
    """The bytes are not an image of a supported format."""


class DamagedImage(Problem):
    """The bytes begin as a supported image but cannot be decoded."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY


class TooLarge(Problem):
    """The request has more bytes, pixels or files than the limits allow."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


IMAGE_ERRORS: tuple[type[Problem], ...] = (UnsupportedImage, DamagedImage, TooLarge)
"""Errors of one image, which say nothing about the other images of its request."""


class BadRequest(Problem):
    """The request is readable, but its content cannot be processed."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY


class NotFound(Problem):
    """The model, version, job or evaluation does not exist."""

    status = HTTPStatus.NOT_FOUND


class Conflict(Problem):
    """The version cannot be deleted in its present state."""

    status = HTTPStatus.CONFLICT


class RangeNotSatisfiable(Problem):
    """The requested range is outside of the file.

    Args:
        detail: Text for the client.
        size: Size of the file in bytes.
    """

    status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE

    def __init__(self, detail: str, size: int):
        super().__init__(detail)
        self.headers["Content-Range"] = f"bytes */{size}"


class Unauthorized(Problem):
    """The API key is missing or wrong."""

    status = HTTPStatus.UNAUTHORIZED
    default_headers: ClassVar[dict[str, str]] = {"WWW-Authenticate": "Bearer"}


class Forbidden(Problem):
    """The configuration does not allow this call from this client."""

    status = HTTPStatus.FORBIDDEN


class TooManyRequests(Problem):
    """The client is over the rate limit.

    Args:
        detail: Text for the client.
        retry_after_s: Seconds until a further request is accepted.
    """

    status = HTTPStatus.TOO_MANY_REQUESTS

    def __init__(self, detail: str, retry_after_s: int):
        super().__init__(detail)
        self.headers["Retry-After"] = str(retry_after_s)


class StorageFull(Problem):
    """The service stores as much as a setting allows, until an operator makes room."""

    status = HTTPStatus.INSUFFICIENT_STORAGE


UnavailableReason = Literal["queue_full", "decoders_full", "deadline", "no_model", "jobs_full", "unavailable"]


class Unavailable(Problem):
    """The service is overloaded, not ready, or past the deadline of the request. The client can try again.

    Args:
        detail: Text for the client.
        reason: Label of the metric that counts refusals.
    """

    status = HTTPStatus.SERVICE_UNAVAILABLE
    default_headers: ClassVar[dict[str, str]] = {"Retry-After": "1"}

    def __init__(self, detail: str, reason: UnavailableReason = "unavailable"):
        super().__init__(detail)
        self.reason = reason
