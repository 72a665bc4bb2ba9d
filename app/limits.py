"""Bounds every request body while it streams in, so that nothing larger is ever held."""

from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import TooLarge, problem
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
            response = problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, _detail(limit), {"Connection": "close"})
            await response(scope, receive, send)
            return

        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise TooLarge(_detail(limit))
            return message

        await self.app(scope, counted, send)


def _detail(limit: int) -> str:
    return f"the request body is larger than {limit:,} bytes"
