"""The model store: versioned, immutable models and the live version of each. See `training.store.store`."""

from pathlib import Path

from training.store.cards import (
    CARD,
    CASCADE,
    MODEL,
    Cascade,
    CascadeReport,
    EpochSummary,
    Evaluation,
    ExtraData,
    FamiliarityScore,
    FamiliarityThreshold,
    ModelCard,
    PinnedMember,
    Promotion,
    QuantizationReport,
)
from training.store.local import LIVE, LocalStore
from training.store.store import Store, StoreError, StoreUnavailable, VersionInUse

__all__ = [
    "CARD",
    "CASCADE",
    "LIVE",
    "MODEL",
    "Cascade",
    "CascadeReport",
    "EpochSummary",
    "Evaluation",
    "ExtraData",
    "FamiliarityScore",
    "FamiliarityThreshold",
    "LocalStore",
    "ModelCard",
    "PinnedMember",
    "Promotion",
    "QuantizationReport",
    "Store",
    "StoreError",
    "StoreUnavailable",
    "VersionInUse",
    "make_store",
    "open_store",
]


def make_store(location: str | Path) -> Store:
    """Return the store at a location, which need not exist yet.

    Args:
        location: A folder, or a URL such as s3://bucket/models or gs://bucket/models.

    Raises:
        StoreError: The URL has an unknown scheme, or a package for its scheme is missing.
    """
    if "://" in str(location):
        from training.store.objects import ObjectStore  # imports fsspec

        return ObjectStore(str(location))
    return LocalStore(Path(location))


def open_store(location: str | Path) -> Store:
    """Return the store at a location, see `make_store`.

    Raises:
        StoreError: There is no such store.
        OSError: The store cannot be read.
    """
    store = make_store(location)
    store.require_access()
    return store
