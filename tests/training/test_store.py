"""Test what every model store promises: version numbers, the live version, concurrent writers, and failures."""

import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from s3_server import make_bucket
from stores import Files, pin, published

from training.store import (
    FamiliarityThreshold,
    ModelCard,
    Promotion,
    Store,
    StoreError,
    VersionInUse,
    make_store,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["folder", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("CIFAR100_MODELS_CACHE", str(tmp_path / "cache"))
    name = f"bucket-{uuid.uuid4().hex}"
    if request.param == "s3":
        request.getfixturevalue("s3")
        make_bucket(name)
    return make_store(tmp_path / "models" if request.param == "folder" else f"{request.param}://{name}/models")


def reopened(store: Store) -> Store:
    """Return the store as another process opens it."""
    return make_store(store.location)


def test_a_store_that_does_not_exist_yet_is_empty(store: Store) -> None:
    assert store.names() == []
    assert store.versions("resnet") == []
    assert store.live("resnet") is None


def test_versions_are_numbered_from_1(store: Store) -> None:
    assert [published(store, f"weights {n}").version for n in range(1, 12)] == list(range(1, 12))
    assert store.names() == ["resnet"]
    assert store.versions("resnet") == list(range(1, 12))
    assert (store.fetch(store.card("resnet", 10)) / "model.pt").read_text() == "weights 10"


def test_a_published_card_is_read_back_as_it_was(store: Store) -> None:
    original = published(store, top1=0.25, notes="für später")
    assert store.card("resnet", 1) == original
    folder = store.verify(original)
    assert {path.name for path in folder.iterdir() if path.name[0] != "."} == {"card.json", "model.pt"}
    assert ModelCard.model_validate_json((folder / "card.json").read_bytes()) == original
    assert original.test.top1 == 0.25


def test_a_card_is_amended_but_lists_the_same_files(store: Store) -> None:
    first = published(store)
    threshold = FamiliarityThreshold(threshold=4.5, kept=0.95, images=100)
    store.amend(first.model_copy(update={"familiarity": threshold}))
    assert store.card("resnet", 1).familiarity == threshold
    store.verify(store.card("resnet", 1))
    with pytest.raises(StoreError, match="cannot list other files"):
        store.amend(first.model_copy(update={"files": {}}))
    with pytest.raises(StoreError, match="there is no version 2"):
        store.amend(first.model_copy(update={"version": 2}))


def test_publishing_leaves_no_draft_behind_and_makes_nothing_live(store: Store) -> None:
    published(store)
    assert set(Files(store).list("resnet")) - {"1/claim"} == {"1/card.json", "1/model.pt"}
    assert store.live("resnet") is None


def test_a_draft_that_fails_leaves_nothing(store: Store) -> None:
    def fail() -> None:
        with store.draft("resnet") as draft:
            (draft / "model.pt").write_text("half of the wei")
            raise RuntimeError("out of power")

    with pytest.raises(RuntimeError, match="out of power"):
        fail()
    assert store.names() == []
    assert published(store).version == 1


PUBLISHER = """
import sys, time
from pathlib import Path
sys.path.insert(0, "tests/helpers")
from stores import published
from training.store import make_store

store, folder, writer = make_store(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
(folder / writer).touch()
while not (folder / "go").exists():
    pass
for n in range(15):
    published(store, f"{writer} {n}")
"""


@pytest.mark.slow
def test_processes_that_publish_at_once_lose_and_overwrite_nothing(store: Store, tmp_path: Path) -> None:
    if store.location.startswith("memory:"):
        pytest.skip("the memory of a process is its own")
    command = [sys.executable, "-c", PUBLISHER, store.location, str(tmp_path)]
    processes = [subprocess.Popen([*command, writer], cwd=ROOT) for writer in "ab"]
    while not all((tmp_path / writer).exists() for writer in "ab"):
        assert all(process.poll() is None for process in processes)
    (tmp_path / "go").touch()
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert_all_there(store, [f"{writer} {n}" for writer in "ab" for n in range(15)])


def test_threads_that_publish_and_promote_at_once_lose_and_overwrite_nothing(store: Store) -> None:
    def publish(writer: int) -> None:
        for n in range(5):
            store.promote_if(published(store, f"{writer} {n}"), "always")

    threads = [threading.Thread(target=publish, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_all_there(store, [f"{writer} {n}" for writer in range(4) for n in range(5)])
    assert store.live("resnet") in store.versions("resnet")


def assert_all_there(store: Store, contents: list[str]) -> None:
    assert store.versions("resnet") == list(range(1, len(contents) + 1))
    found = [store.verify(store.card("resnet", version)) / "model.pt" for version in store.versions("resnet")]
    assert sorted(path.read_text() for path in found) == sorted(contents)
    leftovers = {file.partition("/")[0] for file in Files(store).list("resnet") if not file[0].isdigit()}
    assert leftovers <= {"live", ".lock", "promotions"}


@pytest.mark.timeout(30)
def test_a_version_folder_without_a_card_does_not_stand_in_the_way(store: Store) -> None:
    published(store)
    Files(store).remove("resnet/1/card.json")
    assert published(reopened(store)).version == 2


def test_promotion_goes_forward_and_back(store: Store) -> None:
    for _ in range(2):
        published(store)
    for version in (1, 2, 1):
        store.promote("resnet", version)
        assert store.live("resnet") == version


def test_a_version_that_does_not_exist_is_not_promoted(store: Store) -> None:
    published(store)
    store.promote("resnet", 1)
    with pytest.raises(StoreError, match="no version 2 of resnet"):
        store.promote("resnet", 2)
    assert store.live("resnet") == 1


@pytest.mark.parametrize(
    ("promotion", "changes", "live"),
    [
        ("if-better", {"top1": 0.51}, True),
        ("if-better", {"top1": 0.5}, True),
        ("if-better", {"top1": 0.49}, False),
        ("if-better", {"top1": 0.9, "data": "another data set"}, False),
        ("always", {"top1": 0.1, "data": "another data set"}, True),
        ("never", {"top1": 0.9}, False),
    ],
)
def test_a_new_version_goes_live_if_the_rule_says_so(
    promotion: Promotion, changes: dict[str, Any], live: bool, store: Store
) -> None:
    store.promote_if(published(store, top1=0.5), "always")
    assert store.promote_if(published(store, **changes), promotion) is live
    assert store.live("resnet") == (2 if live else 1)


@pytest.mark.parametrize(("promotion", "live"), [("if-better", 1), ("always", 1), ("never", None)])
def test_the_first_version_goes_live_unless_never(promotion: Promotion, live: int | None, store: Store) -> None:
    store.promote_if(published(store, top1=0.0), promotion)
    assert store.live("resnet") == live


def test_one_changed_byte_is_found_and_the_file_named(store: Store) -> None:
    original = published(store, "weights")
    Files(store).write("resnet/1/model.pt", "weighty")
    with pytest.raises(StoreError, match=r"resnet/1/model\.pt is damaged"):
        reopened(store).verify(original)


def test_a_file_too_many_is_found_and_named(store: Store) -> None:
    card = published(store)
    Files(store).write("resnet/1/.DS_Store", "")  # file managers create it
    reopened(store).verify(card)
    Files(store).write("resnet/1/int8.xml", "")
    with pytest.raises(StoreError, match=r"int8\.xml does not belong to this version"):
        reopened(store).verify(card)


def test_a_card_that_does_not_know_its_model_is_refused(store: Store) -> None:
    card = published(store)
    other = card.model_copy(update={"files": {}})
    with pytest.raises(StoreError, match=r"model\.pt does not belong to this version"):
        store.verify(other)
    Files(store).remove("resnet/1/model.pt")
    with pytest.raises(StoreError, match=r"card\.json does not list model\.pt"):
        reopened(store).verify(other)


def test_of_versions_that_are_published_at_once_the_best_goes_live(store: Store) -> None:
    store.promote_if(published(store, top1=0.5), "always")
    for _ in range(5):
        cards = [published(store, top1=top1) for top1 in (0.8, 0.6, 0.7)]
        store.promote("resnet", 1)
        with ThreadPoolExecutor(3) as threads:
            list(threads.map(lambda card: store.promote_if(card, "if-better"), cards))
        assert store.live("resnet") == cards[0].version


def test_a_missing_file_is_found_and_named(store: Store) -> None:
    original = published(store)
    Files(store).remove("resnet/1/model.pt")
    with pytest.raises(StoreError, match=r"resnet/1/model\.pt is missing"):
        reopened(store).verify(original)


def test_a_card_cannot_point_outside_its_folder(store: Store) -> None:
    original = published(store)
    Files(store).copy("resnet/1", "resnet/2")
    outside = original.model_copy(update={"files": {"../2/model.pt": original.files["model.pt"]}})
    with pytest.raises(StoreError, match="missing"):
        reopened(store).verify(outside)


def test_a_damaged_card_is_an_error_naming_it(store: Store) -> None:
    published(store)
    files = Files(store)
    files.write("resnet/1/card.json", files.read("resnet/1/card.json")[:-20])
    with pytest.raises(StoreError, match=r"resnet/1/card\.json is damaged"):
        reopened(store).card("resnet", 1)


def test_the_card_of_another_version_is_refused(store: Store) -> None:
    published(store)
    Files(store).copy("resnet/1", "resnet/2")
    with pytest.raises(StoreError, match=r"2/card\.json is the card of resnet version 1"):
        reopened(store).card("resnet", 2)


def test_the_card_of_another_model_is_refused(store: Store) -> None:
    published(store)
    Files(store).copy("resnet", "resnet18")
    with pytest.raises(StoreError, match="is the card of resnet version 1"):
        reopened(store).card("resnet18", 1)


def test_a_damaged_live_pointer_is_an_error_naming_it(store: Store) -> None:
    published(store)
    Files(store).write("resnet/live", "latest")
    with pytest.raises(StoreError, match="resnet/live is damaged: it must contain a version number"):
        reopened(store).live("resnet")


@pytest.mark.parametrize("name", ["../x", "..", "", "/etc", "a/b", "Resnet", ".hidden", "-x", "x\n", "a" * 65])
def test_a_name_that_is_no_model_name_is_refused_everywhere(name: str, store: Store) -> None:
    for call in (
        lambda: store.versions(name),
        lambda: store.live(name),
        lambda: store.card(name, 1),
        lambda: store.promote(name, 1),
        lambda: store.draft(name).__enter__(),
    ):
        with pytest.raises(StoreError, match="is not a model name"):
            call()
    assert store.names() == []


def test_folders_that_are_no_models_are_not_listed(store: Store) -> None:
    published(store)
    files = Files(store)
    for name in (".git/1", "Notes/1", "empty/1"):
        files.copy("resnet/1", name)
    files.remove("empty/1/card.json")
    assert reopened(store).names() == ["resnet"]


@pytest.mark.parametrize(
    ("live", "keep", "left"), [(5, 2, [4, 5]), (2, 2, [2, 4, 5]), (1, 1, [1, 5]), (5, 9, [1, 2, 3, 4, 5])]
)
def test_old_versions_are_removed_but_never_the_live_one(live: int, keep: int, left: list[int], store: Store) -> None:
    for _ in range(5):
        published(store)
    store.promote("resnet", live)
    gone = store.prune("resnet", keep)
    assert store.versions("resnet") == left
    assert gone == [version for version in range(1, 6) if version not in left]
    folders = {file.partition("/")[0] for file in Files(store).list("resnet")}
    assert folders <= {".lock", "live", "promotions", *map(str, left)}
    assert published(store).version == 6
    with pytest.raises(ValueError, match="at least 1"):
        store.prune("resnet", 0)


def test_a_version_that_is_needed_is_not_removed(store: Store) -> None:
    for _ in range(4):
        published(store)
    assert store.prune("resnet", 1, protected={2}) == [1, 3]
    assert store.versions("resnet") == [2, 4]


def test_removing_and_promoting_at_once_never_leaves_a_live_version_that_is_gone(store: Store) -> None:
    refused: list[StoreError] = []

    def promote() -> None:
        for version in range(1, 11):
            try:
                store.promote("resnet", version)
            except StoreError as error:
                refused.append(error)
            live = store.live("resnet")
            assert live is not None
            assert store.card("resnet", live)

    for _ in range(10):
        published(store)
    store.promote("resnet", 10)
    promoting = threading.Thread(target=promote)
    promoting.start()
    while promoting.is_alive():
        store.prune("resnet", 1)
    live = store.live("resnet")
    assert live in store.versions("resnet")
    expected = ("there is no version", "is being removed", "was removed")
    assert not [error for error in refused if not any(part in str(error) for part in expected)]


def test_a_version_is_found_by_the_checksum_of_its_file(store: Store) -> None:
    first, second = published(store, "one"), published(store, "two")
    Files(store).write("resnet/2/card.json", "{")
    store = reopened(store)
    assert store.find_by_checksum("resnet", first.files["model.pt"]) == first
    assert store.find_by_checksum("resnet", second.files["model.pt"]) is None
    assert store.find_by_checksum("resnet18", first.files["model.pt"]) is None


def test_pinned_versions_are_fetched_and_not_removed(store: Store) -> None:
    first, second, _ = published(store, "one"), published(store, "two"), published(store, "three")
    pinning = pin(store, first, second)
    assert store.pins("resnet") == {1: "cascade/1", 2: "cascade/1"}
    store.verify(pinning)
    with pytest.raises(VersionInUse, match="cascade/1 pins resnet/1"):
        store.delete("resnet", 1)
    assert store.prune("resnet", 1) == []
    assert store.versions("resnet") == [1, 2, 3]


def test_a_version_that_is_gone_cannot_be_pinned(store: Store) -> None:
    cards = [published(store, str(number)) for number in range(3)]
    store.delete("resnet", 1)
    with pytest.raises(StoreError, match="there is no version 1 of resnet"):
        pin(store, cards[0], cards[1])
    assert store.versions("cascade") == []


def test_the_live_and_the_newest_version_are_not_deleted(store: Store) -> None:
    for _ in range(3):
        published(store)
    store.promote("resnet", 2)
    with pytest.raises(VersionInUse, match="resnet/2 is live"):
        store.delete("resnet", 2)
    with pytest.raises(VersionInUse, match="resnet/3 is the newest version"):
        store.delete("resnet", 3)
    store.delete("resnet", 1)
    assert store.versions("resnet") == [2, 3]
    assert store.live("resnet") == 2
