"""Add a second member and a cascade to a store that has one tiny model."""

from typing import Any

from training.store import CASCADE, MODEL, Cascade, LocalStore, ModelCard, PinnedMember

MEMBERS = ("resnet", "resnet18")


def add_second_member(store: LocalStore) -> ModelCard:
    """Publish a copy of the live version of `resnet` as a live version of `resnet18`."""
    return copy_version(store, "resnet", "resnet18")


def copy_version(store: LocalStore, source: str, name: str) -> ModelCard:
    """Publish a copy of a model's live version under a name, make it live, and return its card."""
    card = store.card(source, store.live(source) or 0)
    with store.draft(name) as draft:
        (draft / MODEL).write_bytes((store.folder(source, card.version) / MODEL).read_bytes())
        card = store.publish(draft, card.model_copy(update={"name": name}))
    store.promote(name, card.version)
    return card


def make_cascade(store: LocalStore, **changes: Any) -> Cascade:
    """Return a cascade of the live versions of both members. By default it sends every image on."""
    cards = [store.card(name, store.live(name) or 0) for name in MEMBERS]
    first, second = (PinnedMember(name=card.name, version=card.version, files=card.files) for card in cards)
    fields = {"members": (first, second), "threshold": 1.0, "weights": (0.5, 0.5), "temperature": 2.0}
    return Cascade.model_validate(fields | changes)


def add_cascade(store: LocalStore, **changes: Any) -> ModelCard:
    """Publish a cascade as the next version of `cascade`, make it live, and return its card."""
    card = store.card("resnet", store.live("resnet") or 0)
    with store.draft("cascade") as draft:
        (draft / CASCADE).write_text(make_cascade(store, **changes).model_dump_json())
        card = store.publish(draft, card.model_copy(update={"name": "cascade", "recipe": {"name": "cascade"}}))
    store.promote("cascade", card.version)
    return card
