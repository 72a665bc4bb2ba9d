"""Serve /models: the versions of each model, their cards, and the live version."""

from typing import Annotated

from fastapi import APIRouter, Path, Response
from pydantic import BaseModel

from app.dependencies import Services, ServicesDependency
from app.exceptions import Conflict, NotFound, Unavailable
from app.inference.pool import Version
from app.middleware.access import OperatorOnly
from app.routes.parameters import StrictRoute
from app.routes.responses import json_response
from training.encoding import replace_surrogates
from training.store import ModelCard, StoreError, VersionInUse
from training.text import quote

router = APIRouter(prefix="/models", tags=["models"], route_class=StrictRoute)


class ModelSummary(BaseModel, use_attribute_docstrings=True):
    """A model and its versions."""

    name: str
    """Name of the model."""
    live: int | None
    """Version that is served now; None if there is none."""
    versions: list[int]
    """All versions, oldest first."""
    error: str | None
    """Reason why the live version is not served, and errors of damaged versions."""


class ModelDetails(ModelSummary):
    """A model with the card of every readable version, oldest first."""

    cards: list[ModelCard]
    """Cards of the readable versions, oldest first."""


ModelName = Annotated[str, Path(description="Name of a model.")]
VersionNumber = Annotated[Version, Path(description="Number of a version.")]

_SUMMARY = set(ModelSummary.model_fields)


class LiveVersion(BaseModel, extra="forbid", use_attribute_docstrings=True):
    """The version to serve."""

    version: Version
    """Number of a version that the store has."""


@router.get("", response_model=list[ModelSummary], summary="All models")
async def models(services: ServicesDependency) -> Response:
    """List the models with their versions and errors."""

    def read() -> Response:
        details = [_details(services, name) for name in _names(services)]
        return json_response([each.model_dump(include=_SUMMARY) for each in details])

    return await services.store_threads.read(read)


@router.get("/{name}", response_model=ModelDetails, summary="One model with its cards")
async def model(name: ModelName, services: ServicesDependency) -> Response:
    """Return a model with the cards of its versions."""

    def read() -> Response:
        _require(services, name)
        return json_response(_details(services, name))

    return await services.store_threads.read(read)


@router.get("/{name}/{version:int}", response_model=ModelCard, summary="The card of one version")
async def card(name: ModelName, version: VersionNumber, services: ServicesDependency) -> Response:
    """Return the card of a version."""

    return await services.store_threads.read(lambda: json_response(read_card(services, name, version)))


@router.put("/{name}/live", dependencies=[OperatorOnly], summary="Promote or roll back")
async def promote(name: ModelName, live: LiveVersion, services: ServicesDependency) -> ModelSummary:
    """Make a version live. It serves all later requests. Requests in progress finish on the version they started with.

    Other workers, and other servers on the same store, switch within about a second.
    """
    await services.store_threads.read(_require, services, name)
    try:
        # The version is loaded before it is promoted, so a version that cannot be served never becomes live.
        await services.pool.get(name, live.version, patient=True)
        await services.store_threads.run(services.store.promote, name, live.version)
    except StoreError as error:
        raise NotFound(str(error)) from None
    except OSError as error:
        raise Unavailable(f"the model store cannot be changed: {error.strerror}") from error
    await services.pool.refresh()
    return await services.store_threads.read(_details, services, name)


@router.delete("/{name}/{version:int}", dependencies=[OperatorOnly], summary="Delete a version")
async def delete_version(name: ModelName, version: VersionNumber, services: ServicesDependency) -> ModelSummary:
    """Delete a version.

    The live version, the newest one, one that a cascade pins, and one that a waiting training job needs are kept.
    """
    jobs = services.training_jobs
    if version in await jobs.threads.read(jobs.required_versions, name):
        raise Conflict(f"a waiting training job needs {name}/{version}; cancel the job first")
    try:
        await services.store_threads.run(services.store.delete, name, version)
    except VersionInUse as error:
        raise Conflict(str(error)) from None
    except StoreError as error:
        raise NotFound(f"{error}; GET /models lists all") from None
    except OSError as error:
        raise Unavailable(f"the model store cannot be changed: {error.strerror}") from error
    return await services.store_threads.read(_details, services, name)


def read_card(services: Services, name: str, version: int) -> ModelCard:
    """Read the card of a version from the store. Call this in a thread.

    Raises:
        NotFound: There is no such version.
        Unavailable: The card is damaged.
    """
    try:
        services.store.require(name, version)
    except StoreError as error:
        raise NotFound(f"{error}; GET /models lists all") from None
    try:
        return services.store.card(name, version)
    except StoreError as error:
        raise Unavailable(str(error)) from None


def _names(services: Services) -> list[str]:
    """List the models of the store, and those that are served although the store has lost them."""
    return sorted({*services.store.names(), *services.pool.live()})


def _require(services: Services, name: str) -> None:
    names = _names(services)
    if name not in names:
        raise NotFound(f"there is no model {quote(name)}; there are: {', '.join(names) or 'none'}")


def _details(services: Services, name: str) -> ModelDetails:
    cards, errors = [], []
    versions = services.store.versions(name)
    for version in versions:
        try:
            cards.append(services.store.card(name, version))
        except StoreError as error:
            errors.append(replace_surrogates(str(error)))
    if name in services.pool.errors:
        errors.insert(0, services.pool.errors[name])
    model = services.pool.live().get(name)
    return ModelDetails(
        name=name,
        live=model.card.version if model else None,
        versions=versions,
        error="; ".join(errors) or None,
        cards=cards,
    )
