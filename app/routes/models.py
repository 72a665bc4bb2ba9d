"""/models: versions, their cards, and which one is live."""

import asyncio

from fastapi import APIRouter
from pydantic import BaseModel

from app.access import ForOperators
from app.errors import NotFound, Unavailable
from app.pool import Version
from app.services import FromApp, Services
from training.store import ModelCard, StoreError

router = APIRouter(prefix="/models", tags=["models"])


class ModelSummary(BaseModel):
    """A model and its versions."""

    name: str
    live: int | None
    """The version that is served now."""
    versions: list[int]
    error: str | None
    """Why the version that should be live is not, or which versions are damaged."""


class ModelDetails(ModelSummary):
    """A model with the card of every readable version, oldest first."""

    cards: list[ModelCard]


class Live(BaseModel):
    """The version to serve."""

    version: Version


# Routes that are no coroutines run in threads: the store may be on a slow disk.


@router.get("", summary="All models")
def models(services: FromApp) -> list[ModelSummary]:
    return [_details(services, name) for name in services.store.names()]


@router.get("/{name}", summary="One model with its cards")
def model(name: str, services: FromApp) -> ModelDetails:
    _require(services, name)
    return _details(services, name)


@router.put("/{name}/live", dependencies=[ForOperators], summary="Promote or roll back")
async def promote(name: str, live: Live, services: FromApp) -> ModelSummary:
    """Serves this version from the next request on; requests under way finish on the one they began with.

    Other workers, and other servers on the same store, follow within about a second.
    """
    await asyncio.to_thread(_require, services, name)
    try:
        # Loaded before it is promoted: a version that cannot be served never becomes live.
        await services.pool.get(name, live.version, patient=True)
        await asyncio.to_thread(services.store.promote, name, live.version)
    except StoreError as error:
        raise NotFound(str(error)) from None
    except OSError as error:
        raise Unavailable(f"the model store cannot be changed: {error.strerror}") from error
    await services.pool.refresh()
    return await asyncio.to_thread(_details, services, name)


def _require(services: Services, name: str) -> None:
    names = services.store.names()
    if name not in names:
        raise NotFound(f"there is no model {name!r}; there are: {', '.join(names) or 'none'}")


def _details(services: Services, name: str) -> ModelDetails:
    cards, errors = [], []
    versions = services.store.versions(name)
    for version in versions:
        try:
            cards.append(services.store.card(name, version))
        except StoreError as error:
            errors.append(str(error))
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
