"""The routes that take images share these functions: bodies, parameters, and cancellation when a client disconnects.

request --read_images--> files and text fields --route--> result --ImageRoute--> response
"""

import io
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import cached_property, lru_cache
from typing import Any, cast

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json
from starlette.datastructures import URLPath
from starlette.routing import BaseRoute, Match, NoMatchFound
from starlette.types import Receive, Scope, Send
from typing_extensions import override

from app.exceptions import UnsupportedImage, UnsupportedMediaType
from app.inference.decoding import File
from app.inference.pool import Version
from app.middleware.proxy import route_path
from app.routes.disconnects import run_until_disconnect
from app.routes.parameters import parse_parameters
from app.routes.uploads import MULTIPART, URLENCODED, form_schema, media_type, read_form
from app.server.joined_writes import join_writes
from training.text import quote

DESCRIBED = ConfigDict(use_attribute_docstrings=True)
"""Configuration of dataclasses whose docstrings of fields are descriptions in the OpenAPI document."""

_UNKNOWN_TYPES = ("", URLENCODED)  # clients send these for bodies of any kind
_BINARY_TYPES = ("application/octet-stream", "binary/octet-stream")
_HOW_TO_SEND = "send multipart/form-data with a field 'file', or an image as the body with its image/* type"
_EXAMPLE = "curl -F file=@photo.jpg"
_BINARY = {"schema": {"type": "string", "format": "binary"}}


class ModelQuery(BaseModel, frozen=True):
    """The parameters that choose a model."""

    model: str | None = Field(
        default=None, description="Default: the configured model, or a live cascade, or the most accurate live model."
    )
    version: Version | None = Field(default=None, description="Default: the live version.")


def describe_body(query: type[BaseModel], max_images: int | None = None) -> dict[str, Any]:
    """Return the OpenAPI description of a body with images.

    Args:
        query: Parameters of the route, which may be text fields of the form.
        max_images: 1 if the form has one image, None if it may have several.
    """
    files = _BINARY["schema"] if max_images == 1 else {"type": "array", "items": _BINARY["schema"]}
    return {
        "security": [{}, {"HTTPBearer": []}],  # the API key is required if one is configured
        "requestBody": {
            "required": True,
            "content": {
                MULTIPART: {"schema": form_schema(files, query)},
                "image/*": _BINARY,
                "application/octet-stream": _BINARY,
            },
        },
    }


class ImageRoute(APIRoute):
    """A route that parses the query itself and cancels a request whose client disconnects.

    It replaces FastAPI's handling of a request, whose dependencies, validation and exit stacks would take as long as
    all other work outside the network. The OpenAPI document comes from the endpoint's signature, as usual. The endpoint
    takes the request and its parsed query, the only parameter with a pydantic model. Its result is a response, or is
    serialized to JSON.
    """

    @override
    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)  # 405
            return
        response = await _respond(self.endpoint, self._query, Request(scope, receive, send))
        with join_writes(scope):
            await response(scope, receive, send)

    @cached_property
    def _query(self) -> type[BaseModel]:
        """Model of the endpoint's only parameter that is one."""
        (query,) = self.dependant.query_params
        return cast("type[BaseModel]", query.field_info.annotation)


class DirectRoute(BaseRoute):
    """The route of an `ImageRoute` without path parameters, for the routes of the application itself.

    FastAPI searches the routes of included routers much slower.

    Args:
        route: The route that handles the requests.
    """

    def __init__(self, route: ImageRoute):
        self._route = route
        self._scope = {"endpoint": route.endpoint, "path_params": {}, "route": route}

    @override
    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        is_match = (
            scope["type"] == "http"
            and scope["method"] in (self._route.methods or ())
            and route_path(scope) == self._route.path
        )
        return (Match.FULL, self._scope) if is_match else (Match.NONE, {})

    @override
    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._route.handle(scope, receive, send)

    @override
    def url_path_for(self, name: str, /, **path_params: Any) -> URLPath:
        raise NoMatchFound(name, path_params)


async def _respond(
    endpoint: Callable[..., Coroutine[Any, Any, Any]], query: type[BaseModel], request: Request
) -> Response:
    """Run an endpoint and serialize its result. Cancel it if the client disconnects."""
    parsed = _parse_query(query, request.scope["query_string"])
    result = await run_until_disconnect(request, endpoint(request, parsed))
    return result if isinstance(result, Response) else Response(to_json(result), media_type="application/json")


@lru_cache(256)
def _parse_query(model: type[BaseModel], query: bytes) -> BaseModel:
    return parse_parameters(model, query)


@asynccontextmanager
async def read_images(
    request: Request, max_bytes: int, max_images: int
) -> AsyncIterator[tuple[list[File], list[tuple[str, str]]]]:
    """Read the request body. Yield the names and contents of its images, and the text fields of its form.

    A body without a Content-Type, or with the default type of several clients, is an image if its bytes are one. The
    larger files of a form are on disk. They are closed at the end of the context.

    Raises:
        UnsupportedMediaType: The content type is not supported.
        Problem: The errors of `read_form`.
    """
    content_type = media_type(request)
    if content_type == MULTIPART:
        form = await read_form(request, max_images, _EXAMPLE)
        try:
            yield [(upload.filename, upload.file) for upload in form.files], form.fields
        finally:
            await form.close()
    elif content_type.startswith("image/") or content_type in (*_BINARY_TYPES, *_UNKNOWN_TYPES):
        content = bytearray()
        async for chunk in request.stream():
            if len(content) <= max_bytes:  # read the rest, so that the client gets the response
                content += chunk
        try:
            yield [(None, io.BytesIO(content))], []
        except UnsupportedImage as error:
            if content_type in _UNKNOWN_TYPES:
                error.detail += f"; the content type is {quote(content_type or '(none)')}: {_HOW_TO_SEND}"
            raise
    else:
        raise UnsupportedMediaType(f"the content type {quote(content_type)} is not supported; {_HOW_TO_SEND}")
