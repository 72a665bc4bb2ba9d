"""Test a store in an object store: copies, races without a lock, and traces of killed processes."""

import os
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from s3_server import make_bucket
from stores import Files, pin, published

from training.store import (
    LocalStore,
    Store,
    StoreError,
    StoreUnavailable,
    VersionInUse,
    make_store,
    objects,
    open_store,
)

CACHE = "CIFAR100_MODELS_CACHE"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> objects.ObjectStore:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return objects.ObjectStore(f"memory://{uuid.uuid4().hex}/models")


def another_process(store: Store) -> Store:
    return make_store(store.location)


def test_a_damaged_copy_is_replaced(store: Store) -> None:
    card = published(store, "weights")
    copy = store.verify(card) / "model.pt"
    copy.write_text("weighty")
    assert store.verify(card) == copy.parent
    assert copy.read_text() == "weights"


def test_a_copy_serves_while_its_object_is_damaged(store: Store) -> None:
    card = published(store, "weights")
    store.verify(card)
    Files(store).write("resnet/1/model.pt", "weighty")
    store.verify(card)


def test_copies_of_other_stores_and_versions_are_not_confused(store: Store, tmp_path: Path) -> None:
    other = objects.ObjectStore(f"memory://{uuid.uuid4().hex}/models")
    folders = [each.verify(published(each, text)) for each, text in ((store, "a"), (other, "b"), (store, "a"))]
    assert len(set(folders)) == 3
    assert [(folder / "model.pt").read_text() for folder in folders] == ["a", "b", "a"]


def test_copies_that_nothing_has_used_for_a_week_are_deleted(store: Store) -> None:
    first, second = published(store, "one"), published(store, "two")
    old = store.fetch(first)
    os.utime(old, (0, 0))
    recent = store.fetch(second)
    assert not old.exists()
    assert recent.exists()


def test_a_version_that_goes_live_while_it_is_marked_is_not_removed(
    store: objects.ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        published(store)
    store.promote("resnet", 3)
    mark: Callable[[str, bytes], None] = store._write

    def mark_and_promote(path: str, content: bytes) -> None:
        mark(path, content)
        Files(store).write("resnet/promotions/00000002", "1\n")  # by a process that has looked for a mark before

    monkeypatch.setattr(store, "_write", mark_and_promote)
    with pytest.raises(VersionInUse, match="resnet/1 is live"):
        store.delete("resnet", 1)
    assert another_process(store).live("resnet") == 1
    assert not [file for file in Files(store).list("resnet") if "removing" in file]


@pytest.mark.parametrize("is_removed", [True, False])
def test_a_promotion_waits_for_the_process_that_has_marked_the_version(
    is_removed: bool, store: objects.ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        published(store)
    store.promote("resnet", 2)
    create: Callable[[str, bytes], None] = store._create

    def create_after_mark(path: str, content: bytes) -> None:
        Files(store).write("resnet/1/removing-abc", "")  # by a process that sees the live version 2
        create(path, content)

    def finish_removal(_: float) -> None:
        for file in ("removing-abc", *(["card.json"] if is_removed else [])):
            Files(store).remove(f"resnet/1/{file}")

    monkeypatch.setattr(store, "_create", create_after_mark)
    monkeypatch.setattr("time.sleep", finish_removal)
    if is_removed:
        with pytest.raises(StoreError, match="resnet/1 was removed by another process at the same time"):
            store.promote("resnet", 1)
    else:
        store.promote("resnet", 1)
    assert another_process(store).live("resnet") == (2 if is_removed else 1)


def test_a_version_that_is_being_removed_is_neither_promoted_nor_pinned(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_MARK_WAIT_S", 0.3)
    cards = [published(store, str(number)) for number in range(3)]
    Files(store).write("resnet/1/removing-abc", "")  # the process that removes it has died here
    with pytest.raises(StoreError, match="resnet/1 is being removed by another process"):
        another_process(store).promote("resnet", 1)
    with pytest.raises(StoreError, match="removal of resnet/1 was begun and not finished; delete it again"):
        pin(another_process(store), cards[0], cards[1])
    assert another_process(store).versions("cascade") == []
    store.delete("resnet", 1)
    assert not [file for file in Files(store).list("resnet") if file.startswith("1/")]


def test_a_promotion_of_a_version_that_was_removed_meanwhile_is_void(store: Store) -> None:
    for _ in range(3):
        published(store)
    store.promote("resnet", 2)
    Files(store).write("resnet/promotions/00000002", "1\n")  # by a process that has died here
    store.promote("resnet", 2)
    store.delete("resnet", 1)
    Files(store).write("resnet/promotions/00000004", "1\n")  # by a process that did not see the removal
    assert another_process(store).live("resnet") == 2
    with pytest.raises(VersionInUse):
        another_process(store).delete("resnet", 2)


def test_only_the_latest_promotions_are_kept(store: Store) -> None:
    for _ in range(2):
        published(store)
    for turn in range(30):
        store.promote("resnet", turn % 2 + 1)
    assert store.live("resnet") == 2
    kept = [file for file in Files(store).list("resnet") if file.startswith("promotions/")]
    assert sorted(kept) == [f"promotions/{number:08}" for number in range(11, 31)]


def test_files_of_a_killed_publisher_are_deleted_after_a_day(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    published(store)
    for file in ("claim", "model.pt"):
        Files(store).write(f"resnet/2/{file}", "half")
    assert published(store).version == 3
    assert "2/model.pt" in Files(store).list("resnet")
    old = datetime.now(UTC) - timedelta(days=2)
    monkeypatch.setattr(MemoryFileSystem, "modified", lambda *_: old)
    assert published(store).version == 4
    assert not [file for file in Files(store).list("resnet") if file.startswith("2/")]


def test_a_number_is_not_assigned_again_after_its_publisher_was_killed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(store)
    Files(store).write("resnet/2/claim", "")
    monkeypatch.setattr(MemoryFileSystem, "modified", lambda *_: datetime.now(UTC) - timedelta(days=2))
    assert published(store).version == 3


def test_a_server_that_ignores_conditions_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    original = MemoryFileSystem.pipe_file
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", lambda self, path, value, **_: original(self, path, value))
    with pytest.raises(StoreError, match="ignores If-None-Match"):
        published(store)
    assert store.versions("resnet") == []


def test_a_folder_can_be_copied_into_a_bucket(store: Store, tmp_path: Path) -> None:
    local = LocalStore(tmp_path / "models")
    cards = [published(local, str(number)) for number in range(2)]
    pin(local, *cards)
    local.promote("resnet", 1)
    files, root = objects.ObjectStore(store.location)._filesystem
    files.put(str(local.root), root, recursive=True)
    assert store.names() == ["cascade", "resnet"]
    assert store.live("resnet") == 1
    store.verify(store.card("cascade", 1))
    assert published(store).version == 3
    store.promote("resnet", 3)
    assert another_process(store).live("resnet") == 3


@pytest.mark.slow
@pytest.mark.usefixtures("s3")
def test_a_bucket_that_does_not_exist_is_an_error_naming_it() -> None:
    with pytest.raises(StoreUnavailable, match=r"s3://nowhere/models cannot be listed: .*bucket does not exist"):
        open_store("s3://nowhere/models")
    make_bucket("somewhere")
    assert open_store("s3://somewhere/models").names() == []


def test_a_server_that_does_not_answer_is_an_error_naming_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs = pytest.importorskip("s3fs")
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StoreUnavailable, match="s3://far/models cannot be used: "):
        open_store("s3://far/models")
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_scheme_that_is_unknown_or_needs_a_package_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="ftpx://host/models: the scheme is unknown"):
        make_store("ftpx://host/models")
    with pytest.raises(StoreError, match=r"adl://host/models needs a package"):
        make_store("adl://host/models").names()
