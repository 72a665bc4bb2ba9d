"""Headers: the media type that a request names, and what is for security on every answer.

Pages set their own content security policy, everything else may load nothing.
"""

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADERS = (
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)


def media_type(request: Request) -> str:
    """Of a request's body, without parameters, in lower case; empty if it names none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


class SecurityHeaders:
    """ASGI middleware: adds what a route has not set itself."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(header for header in _HEADERS if header[0] not in given)]
            await send(message)

        await self.app(scope, receive, secured)
