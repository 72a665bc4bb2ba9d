"""Failures that a client is told about, each with its HTTP status. `app.errors` makes responses of them.

This module imports only the standard library, so that the process that decodes costly images starts quickly.

image   --images.decode-->    pixels   UnsupportedImage 415, DamagedImage 422, TooLarge 413
request --decoding, batching--> logits Unavailable 503
name    --pool, store-->      model    NotFound 404, Unavailable 503
recipe  --training.recipes--> job      BadRequest 422, Unavailable 503
caller  --access-->           route    TooManyRequests 429, Unauthorized 401, Forbidden 403
"""

from http import HTTPStatus
from typing import ClassVar


class Problem(Exception):
    """A failure the client is told about.

    Args:
        detail: what happened, with the value, and what to do.
    """

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    default_headers: ClassVar[dict[str, str]] = {}

    def __init__(self, detail: str):
        super().__init__(detail)
        self.detail = detail
        self.headers = dict(self.default_headers)


class UnsupportedImage(Problem):
    """Neither an image of a supported format nor, for /evaluate, a form with a zip."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE


class DamagedImage(Problem):
    """The bytes begin as a supported image but cannot be decoded."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY


class TooLarge(Problem):
    """More bytes, pixels or files than the limits allow."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class BadRequest(Problem):
    """The request can be read but not fulfilled as it stands."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY


class NotFound(Problem):
    """No such model, version, job or evaluation."""

    status = HTTPStatus.NOT_FOUND


class Unauthorized(Problem):
    """No API key, or a wrong one."""

    status = HTTPStatus.UNAUTHORIZED
    default_headers: ClassVar[dict[str, str]] = {"WWW-Authenticate": "Bearer"}


class Forbidden(Problem):
    """Not from there, as the service is set up."""

    status = HTTPStatus.FORBIDDEN


class TooManyRequests(Problem):
    """Over the rate limit.

    Args:
        detail: as for every problem.
        retry_after_s: when a further request is let through.
    """

    status = HTTPStatus.TOO_MANY_REQUESTS

    def __init__(self, detail: str, retry_after_s: int):
        super().__init__(detail)
        self.headers["Retry-After"] = str(retry_after_s)


class Unavailable(Problem):
    """Not now: overloaded, not ready, or past the deadline. Worth another try."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    default_headers: ClassVar[dict[str, str]] = {"Retry-After": "1"}
