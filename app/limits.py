"""Bounds every request body while it streams in, so that nothing larger is ever held."""

from http import HTTPStatus

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import problem
from app.settings import MIB, Settings

_OTHER_BYTES = MIB
_MULTIPART_OVERHEAD = 64 << 10


class BodyLimit:
    """ASGI middleware: a body over its route's limit is answered with 413.

    A declared Content-Length is refused before the body is read, a streamed one as soon as it exceeds the limit.
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app = app
        self.limits = {
            "/predict": settings.max_images * settings.max_image_bytes + _MULTIPART_OVERHEAD,
            "/evaluate": settings.max_archive_bytes + _MULTIPART_OVERHEAD,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.limits.get(scope["path"], _OTHER_BYTES)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            await _refusal(limit)(scope, receive, send)
            return

        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise ClientDisconnect  # what a route already expects of a body that ends early
            return message

        async def unless_refused(message: Message) -> None:
            if received <= limit:
                await send(message)

        try:
            await self.app(scope, counted, unless_refused)
        except ClientDisconnect:
            if received <= limit:
                raise
        if received > limit:
            await _refusal(limit)(scope, receive, send)


def _refusal(limit: int) -> Response:
    return problem(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"the request body is larger than {limit:,} bytes",
        {"Connection": "close"},
    )
