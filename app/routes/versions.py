"""Serve the files of versions: download of one file or of all as a zip, and upload to another service."""

import re
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as Parameter
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, Field
from starlette.staticfiles import NotModifiedResponse

from app.archives import zip_chunks
from app.dependencies import Services, ServicesDependency
from app.exceptions import Forbidden, NotFound, RangeNotSatisfiable, Unavailable, UnsupportedMediaType
from app.inference.check_process import CheckResult
from app.middleware.access import OperatorOnly
from app.routes.models import ModelName, VersionNumber, read_card
from app.routes.parameters import StrictRoute, parse_parameters
from app.routes.uploads import MULTIPART, form_schema, media_type, read_form
from training.files import sha256
from training.store import CARD, ModelCard, Promotion, StoreError
from training.text import quote

router = APIRouter(prefix="/models", tags=["models"], route_class=StrictRoute)

_EXAMPLE = "curl -F file=@resnet-4.zip"
_BINARY = "application/octet-stream"
_ZIP = "application/zip"
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")

FileName = Annotated[str, Parameter(description="card.json, or a name in `files` of the card.")]


class UploadQuery(BaseModel):
    """The parameters of an upload, in the query or as text fields of the form."""

    promote: Promotion = Field(
        default="never",
        description="When the new version goes live: never, always, or if it is at least as accurate as the live one.",
    )


class UploadedVersion(BaseModel, use_attribute_docstrings=True):
    """A version that was uploaded."""

    name: str
    """Name of the model."""
    version: int
    """Number of the version in this store."""
    live: bool
    """True if the version is live now."""
    check: CheckResult | None
    """The result of the check; None if the store had a version with the same files already."""


def _binary(kind: str) -> dict[int | str, dict[str, Any]]:
    return {200: {"content": {kind: {"schema": {"type": "string", "format": "binary"}}}}}


@router.get(
    "/{name}/{version:int}/files/{file}",
    dependencies=[OperatorOnly],
    response_class=FileResponse,
    responses=_binary(_BINARY),
    summary="A file of a version",
)
async def version_file(
    name: ModelName, version: VersionNumber, file: FileName, request: Request, services: ServicesDependency
) -> Response:
    """Return a file of a version, such as `model.pt`. Its ETag is its SHA-256, and one range of it can be requested."""
    files = await services.store_threads.read(_list_files, services, name, version)
    if file not in files:
        raise NotFound(f"{name}/{version} has no file {quote(file)}; it has: {', '.join(files)}")
    path, checksum = files[file]
    response = FileResponse(path, headers={"ETag": f'"{checksum}"'}, media_type=_BINARY, filename=file)
    if response.headers["etag"] in request.headers.get("if-none-match", ""):
        return NotModifiedResponse(response.headers)
    _require_range(request, response.headers["etag"], (await services.store_threads.read(path.stat)).st_size)
    return response


@router.get(
    "/{name}/{version:int}/zip",
    dependencies=[OperatorOnly],
    response_class=StreamingResponse,
    responses=_binary(_ZIP),
    summary="All files of a version",
)
async def version_zip(name: ModelName, version: VersionNumber, services: ServicesDependency) -> StreamingResponse:
    """Return a zip of the card and the files of a version, which `POST /models/{name}` of another service accepts."""
    files = await services.store_threads.read(_list_files, services, name, version)
    headers = {"Content-Disposition": f'attachment; filename="{name}-{version}.zip"'}
    return StreamingResponse(zip_chunks(path for path, _ in files.values()), headers=headers, media_type=_ZIP)


@router.post(
    "/{name}",
    status_code=HTTPStatus.CREATED,
    dependencies=[OperatorOnly],
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {MULTIPART: {"schema": form_schema({"type": "string", "format": "binary"}, UploadQuery)}},
        }
    },
    responses={200: {"model": UploadedVersion, "description": "The store had a version with the same files already."}},
    summary="Upload a version",
)
async def upload_version(
    name: ModelName,
    request: Request,
    response: Response,
    services: ServicesDependency,
    query: Annotated[UploadQuery, Query()],
) -> UploadedVersion:
    """Publish a version of another service: the multipart field `file` is a zip of its card and files.

    The version is checked in a process with limited resources before the service loads it. A client that may upload a
    model can run code, so uploads are off unless CIFAR100_ALLOW_UPLOADS is true, and always need a key.
    """
    if not services.settings.allow_uploads:
        raise Forbidden("uploads are off; start the service with CIFAR100_ALLOW_UPLOADS=true and CIFAR100_API_KEYS")
    if media_type(request) != MULTIPART:
        raise UnsupportedMediaType(
            f"the content type {quote(media_type(request) or '(none)')} is not supported; send a zip as "
            f"multipart/form-data: {_EXAMPLE}"
        )
    live = next(iter(services.pool.live().values()), None)
    form = await read_form(request, 1, _EXAMPLE)
    try:
        query = parse_parameters(UploadQuery, request.scope["query_string"], form.fields)
        card, check = await services.uploads.threads.run(
            services.uploads.receive, name, form.files[0].file, live.card.classes if live else None
        )
    finally:
        await form.close()
    if query.promote != "never":
        await _promote(services, card, query.promote)
    with suppress(Unavailable):  # the next publication prunes again
        await services.store_threads.run(services.training_runner.prune, name)
    if check is None:
        response.status_code = HTTPStatus.OK
    response.headers["Location"] = f"{request.scope['root_path']}/models/{name}/{card.version}"
    served = services.pool.live().get(name)
    is_live = served is not None and served.card.version == card.version
    return UploadedVersion(name=name, version=card.version, live=is_live, check=check)


async def _promote(services: Services, card: ModelCard, promotion: Promotion) -> None:
    """Make a version live if the rule allows it. It is loaded before, so that it can be served."""
    await services.pool.get(card.name, card.version, patient=True)
    try:
        await services.store_threads.run(services.store.promote_if, card, promotion)
    except (StoreError, OSError) as error:
        raise Unavailable(f"{card.name}/{card.version} is published, but cannot be promoted: {error}") from error
    await services.pool.refresh()


def _list_files(services: Services, name: str, version: int) -> dict[str, tuple[Path, str]]:
    """Return the path and the sha256 of each file of a version, by its name."""
    card = read_card(services, name, version)
    try:
        folder = services.store.fetch(card)
    except StoreError as error:
        raise Unavailable(str(error)) from None
    files = {CARD: sha256(folder / CARD), **card.files}
    return {file: (folder / file, checksum) for file, checksum in files.items()}


def _require_range(request: Request, etag: str, size: int) -> None:
    """Remove a header `Range` that does not apply, so that the whole file is returned (RFC 9110, section 14.2).

    Raises:
        RangeNotSatisfiable: The range begins behind the end of the file.
    """
    found = _RANGE.fullmatch(request.headers.get("range", ""))
    start, end = found.groups() if found else ("", "")
    applies = (start or end) and not (start and end and int(start) > int(end))
    if not applies or request.headers.get("if-range", etag) != etag:
        request.scope["headers"] = [each for each in request.scope["headers"] if each[0] != b"range"]
    elif (int(start) if start else size - int(end)) >= size:
        raise RangeNotSatisfiable(f"the file has {size:,} bytes; ask for a range within it", size)
