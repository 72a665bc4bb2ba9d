"""Test the drafts of a store in a folder, which are beside the versions."""

import os
import shutil
from pathlib import Path

from stores import published

from training.store import LocalStore


def test_a_draft_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    published(store)
    with store.draft("resnet") as draft:
        (draft / "model.pt").write_text("half of the wei")
    assert [path.name for path in (tmp_path / "resnet").iterdir()] == ["1"]


def test_a_draft_of_a_killed_process_is_no_version(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    published(store)
    shutil.copytree(tmp_path / "resnet" / "1", tmp_path / "resnet" / ".draft-abc")
    assert store.versions("resnet") == [1]
    assert published(store).version == 2


def test_the_draft_of_a_process_that_was_killed_is_removed_after_a_day(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    published(store)
    old, new = (store.root / "resnet" / f".draft-{name}" for name in ("old", "new"))
    for draft in (old, new):
        draft.mkdir()
    os.utime(old, (0, 0))
    published(store)
    assert new.exists()
    assert not old.exists()
