"""Publish small versions in a model store, and change its files behind its back."""

from datetime import UTC, datetime
from typing import Any

from s3_server import open_files

from training.store import Cascade, Evaluation, ModelCard, PinnedMember, Store


def make_card(top1: float = 0.5, **changes: Any) -> ModelCard:
    evaluation = Evaluation(images=4, top1=top1, top5=1, loss=1, ece=0, per_class=[0.5, 0.5])
    fields: dict[str, Any] = {
        "name": "resnet",
        "version": 0,
        "created": datetime(2024, 1, 2, tzinfo=UTC),
        "recipe": {},
        "classes": ["cat", "dog"],
        "superclasses": ["animal", "animal"],
        "parameters": 3,
        "seed": 0,
        "data": "one data set",
        "temperature": 1,
        "test": evaluation,
        "test_ece_uncalibrated": 0,
        "curve": [],
        "training_seconds": 1,
        "device": "abacus",
        "libraries": {},
        "commit": None,
        "files": {},
    }
    return ModelCard(**fields | changes)


def published(store: Store, content: str = "weights", **changes: Any) -> ModelCard:
    with store.draft("resnet") as draft:
        (draft / "model.pt").write_text(content)
        return store.publish(draft, make_card(**changes))


def pin(store: Store, *members: ModelCard) -> ModelCard:
    """Publish a cascade that pins versions."""
    pinned = [PinnedMember(name=each.name, version=each.version, files=each.files) for each in members]
    cascade = Cascade(members=(pinned[0], pinned[1]), threshold=0.5, weights=(0.5, 0.5), temperature=1)
    with store.draft("cascade") as draft:
        (draft / "cascade.json").write_text(cascade.model_dump_json())
        return store.publish(draft, make_card(name="cascade"))


class Files:
    """The files of a store, as others may change them."""

    def __init__(self, store: Store):
        self._files, self._root = open_files(store.location)

    def write(self, path: str, content: str) -> None:
        self._files.pipe_file(f"{self._root}/{path}", content.encode())

    def read(self, path: str) -> str:
        return str(self._files.cat_file(f"{self._root}/{path}").decode())

    def remove(self, path: str) -> None:
        self._files.rm_file(f"{self._root}/{path}")

    def copy(self, source: str, target: str) -> None:
        for file in self._files.find(f"{self._root}/{source}"):
            copy = f"{self._root}/{target}/{file.split(f'/{source}/')[1]}"
            self._files.makedirs(copy.rpartition("/")[0], exist_ok=True)
            self._files.cp_file(file, copy)

    def list(self, path: str) -> list[str]:
        return [file.split(f"/{path}/")[1] for file in self._files.find(f"{self._root}/{path}")]
