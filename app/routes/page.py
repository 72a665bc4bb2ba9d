"""Serve the web pages: / to try the service, and /docs with the OpenAPI document."""

from functools import lru_cache
from html import escape
from http import HTTPStatus
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.types import Scope
from typing_extensions import override

from app.errors import ERRORS_PATH, MEANINGS
from app.openapi import build_document

router = APIRouter(include_in_schema=False)

STATIC = Path(__file__).parents[1] / "static"
_NOTHING_ELSE = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; connect-src 'self'; "
_INDEX_POLICY = _NOTHING_ELSE + "script-src 'self'; style-src 'self'; img-src 'self' blob:"
_DOCS_POLICY = _NOTHING_ELSE + "script-src 'self'; style-src 'self'; img-src 'self' data:"
_REVALIDATE = {"Cache-Control": "no-cache"}  # a browser never combines files of two releases


class PageFiles(StaticFiles):
    """The files of the page. A browser asks each time whether its copies are still valid."""

    path = "/static"
    """Path under which the files are mounted. The metrics have it as the route of their requests."""

    @override
    async def get_response(self, path: str, scope: Scope) -> Response:
        scope["route"] = self
        response = await super().get_response(path, scope)
        response.headers.update(_REVALIDATE)
        return response


@router.get("/")
async def index() -> FileResponse:
    """Return the page."""
    return FileResponse(STATIC / "index.html", headers={"Content-Security-Policy": _INDEX_POLICY, **_REVALIDATE})


@router.get(ERRORS_PATH)
async def errors() -> HTMLResponse:
    """Return the descriptions of all problems. The types of problems are addresses of its sections."""
    return HTMLResponse(_describe_errors(), headers={"Content-Security-Policy": _INDEX_POLICY})


@lru_cache(1)
def _describe_errors() -> str:
    sections = "".join(
        f'<section id="{status}"><h2>{status} {HTTPStatus(status).phrase}</h2><p>{escape(meaning)}</p></section>\n'
        for status, meaning in MEANINGS.items()
    )
    return (STATIC / "errors.html").read_text().replace("<!-- sections -->", sections)


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    """Return the OpenAPI document. It is serialized once for each path prefix, which takes a millisecond."""
    return Response(_document(request.app, request.scope["root_path"]), media_type="application/json")


@lru_cache(8)
def _document(app: FastAPI, root_path: str) -> bytes:
    servers = {"servers": [{"url": root_path}]} if root_path else {}
    return bytes(JSONResponse(build_document(app) | servers).body)


@router.get("/docs")
async def docs() -> FileResponse:
    """Return Swagger UI, which shows the OpenAPI document. It is part of the service and needs no other host."""
    return FileResponse(STATIC / "docs.html", headers={"Content-Security-Policy": _DOCS_POLICY})
