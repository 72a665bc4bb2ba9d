"""Apply the forwarding headers of trusted proxies: client address, scheme, and the path prefix of the service.

A proxy may remove the prefix from the path or pass it on. Afterwards the path of the ASGI scope begins with the prefix,
which is its `root_path`, as the ASGI specification asks.
"""

from http import HTTPStatus
from typing import Any, cast

from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from app.errors import problem_response
from app.path_prefix import parse_path_prefix
from app.settings import Settings


class ProxyMiddleware:
    """ASGI middleware that sets the client, the scheme and the root path of requests behind a proxy.

    X-Forwarded-Prefix of a trusted proxy replaces the prefix of the settings. Proxies in a row may send one prefix
    each, the outermost first. Without a prefix the path does not change.

    Args:
        app: Next ASGI application.
        settings: Trusted proxies and root path.
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        self._next = ProxyHeadersMiddleware(cast(Any, app), settings.trusted_proxies)
        self._root_path = settings.root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, redirect it from the bare prefix to the page, or refuse an invalid prefix with 400."""
        if scope["type"] == "http":
            try:
                root_path = self._find_root_path(scope)
            except ValueError as error:
                invalid = problem_response(HTTPStatus.BAD_REQUEST, f"X-Forwarded-Prefix: {error}")
                await invalid(scope, receive, send)
                return
            path = scope["path"]
            if root_path and path == root_path:  # relative URLs of the page need the final slash
                query = scope["query_string"].decode("latin-1")
                url = f"{root_path}/?{query}" if query else f"{root_path}/"
                await RedirectResponse(url, HTTPStatus.PERMANENT_REDIRECT)(scope, receive, send)
                return
            scope["root_path"] = root_path
            scope["path"] = path if path.startswith(f"{root_path}/") else root_path + path
        await self._next(cast(Any, scope), cast(Any, receive), cast(Any, send))

    def _find_root_path(self, scope: Scope) -> str:
        """Return the path prefix of a request.

        Raises:
            ValueError: A trusted proxy sent an invalid prefix.
        """
        client = scope.get("client")
        if client and client[0] in self._next.trusted_hosts:
            given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-forwarded-prefix"]
            if given:
                return parse_path_prefix("".join(map(parse_path_prefix, given)))
        return self._root_path


def route_path(scope: Scope) -> str:
    """Return the path of a request without the prefix of the service."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
