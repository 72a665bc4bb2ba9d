"""Serve the web pages: / to try the service, and /docs with the OpenAPI document."""

import base64
import hashlib
import re
from functools import lru_cache
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.types import Scope
from typing_extensions import override

router = APIRouter(include_in_schema=False)

STATIC = Path(__file__).parents[1] / "static"
_NOTHING_ELSE = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; connect-src 'self'; "
_INDEX_POLICY = _NOTHING_ELSE + "script-src 'self'; style-src 'self'; img-src 'self' blob:"
_REVALIDATE = {"Cache-Control": "no-cache"}  # a browser never combines files of two releases
_OPENAPI = "/openapi.json"
_SWAGGER = "https://cdn.jsdelivr.net"


class PageFiles(StaticFiles):
    """The files of the page. A browser asks each time whether its copies are still valid."""

    @override
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_REVALIDATE)
        return response


@router.get("/")
async def index() -> FileResponse:
    """Return the page."""
    return FileResponse(STATIC / "index.html", headers={"Content-Security-Policy": _INDEX_POLICY, **_REVALIDATE})


@router.get(_OPENAPI)
async def openapi(request: Request) -> Response:
    """Return the OpenAPI document. It is serialized once for each path prefix, which takes a millisecond."""
    return Response(_document(request.app, request.scope["root_path"]), media_type="application/json")


@lru_cache(8)
def _document(app: FastAPI, root_path: str) -> bytes:
    servers = {"servers": [{"url": root_path}]} if root_path else {}
    return bytes(JSONResponse(app.openapi() | servers).body)


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """Return Swagger UI, which loads from its public CDN. The policy allows the inline script by its checksum."""
    url = request.scope["root_path"] + _OPENAPI
    page = get_swagger_ui_html(openapi_url=url, title=request.app.title, swagger_favicon_url="data:,")
    script = re.search(rb"<script>(.*?)</script>", bytes(page.body), re.DOTALL)
    checksum = base64.b64encode(hashlib.sha256(script[1] if script else b"").digest()).decode()
    page.headers["Content-Security-Policy"] = (
        f"{_NOTHING_ELSE}script-src {_SWAGGER} 'sha256-{checksum}'; "
        f"style-src {_SWAGGER} 'unsafe-inline'; img-src 'self' data: {_SWAGGER}"
    )
    return page
