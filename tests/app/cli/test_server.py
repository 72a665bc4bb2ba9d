"""Test the commands with --server against a real service that has keys."""

import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cascades import copy_version
from command_line import answered, refused, typed
from server import Server

from training.store import LocalStore

pytestmark = pytest.mark.slow

KEY = "the-key-of-this-test"


@pytest.fixture(scope="module")
def service(published_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A service with a key, to which CIFAR100_SERVER and CIFAR100_API_KEY point. Tests change its store."""
    folder = tmp_path_factory.mktemp("service")
    shutil.copytree(published_store, folder / "models")
    store = LocalStore(folder / "models")
    copy_version(store, "resnet", "resnet")
    store.promote("resnet", 1)
    with (
        Server(folder / "models", folder / "runs", folder / "log", api_keys=KEY, allow_uploads="true") as server,
        pytest.MonkeyPatch.context() as environment,
    ):
        environment.setenv("CIFAR100_SERVER", str(server.address))
        environment.setenv("CIFAR100_API_KEY", KEY)
        yield


@pytest.fixture
def photo(image: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(image)
    return path


def test_images_are_classified_explained_and_measured(service: None, photo: Path, published_store: Path) -> None:
    text = photo.with_name("text.txt")
    text.write_text("no image")
    result = typed("predict", photo, text, "--json")
    assert result.exit_code == 1
    remote, failed = json.loads(result.stdout)
    assert failed["error"].startswith("the bytes are not a supported image")
    local = ("--server", "", "--models", published_store)
    assert [remote] == answered("predict", photo, *local)
    words = ("explain", photo, "--class", "red_disc", "--model", "resnet/1")
    assert answered(*words) == answered(*words, *local)
    assert "did you mean red_disc" in refused(1, "explain", photo, "--class", "red_disk")
    measured = answered("evaluate", "--limit", "50")
    assert (measured["model"], measured["split"], measured["result"]["images"]) == ("resnet", "test", 50)
    assert "resnet/1 on 50 test images: top-1" in typed("evaluate", "resnet", "--limit", "50").stdout


def test_a_job_is_submitted_followed_and_cancelled(service: None) -> None:
    job = typed("jobs", "submit", "resnet", "epochs=400", "validation_images=0").stdout.strip()
    assert answered("jobs", "cancel", job)["state"] == "cancelled"
    followed = typed("jobs", "follow", job)
    assert followed.exit_code == 1
    assert followed.stdout.splitlines()[-1] == "cancelled"
    (listed,) = answered("jobs", "list")
    assert (listed["id"], listed["state"]) == (job, "cancelled")
    assert answered("jobs", "show", job)["request"]["overrides"] == {"epochs": 400, "validation_images": 0}


def test_a_version_is_downloaded_and_uploaded(service: None, published_store: Path, tmp_path: Path) -> None:
    file, local = tmp_path / "version.zip", tmp_path / "local.zip"
    assert answered("models", "download", "resnet/1", "--output", file)["bytes"] == file.stat().st_size
    typed("models", "download", "resnet", "--output", local, "--server", "", "--models", published_store)
    with zipfile.ZipFile(file) as ours, zipfile.ZipFile(local) as theirs:
        assert ours.namelist() == theirs.namelist()
        assert ours.read("model.pt") == theirs.read("model.pt")
    # The store has the files of version 2, a copy of version 1, so they are not checked again.
    assert answered("models", "upload", file) == {"name": "resnet", "version": 2, "live": False, "check": None}
    assert "is no zip of" in refused(1, "models", "upload", Path(__file__))
    assert "name it by --server" in refused(2, "models", "upload", file, "--server", "")


def test_versions_are_promoted_rolled_back_and_deleted(service: None) -> None:
    assert answered("models", "list")[0]["versions"] == [1, 2]
    assert answered("models", "promote", "resnet/2")["live"] == 2
    assert answered("models", "rollback", "resnet")["live"] == 1
    assert "newest version" in refused(1, "models", "delete", "resnet/2", "--yes")
    assert answered("models", "promote", "resnet/2")["live"] == 2
    assert answered("models", "delete", "resnet/1", "--yes")["versions"] == [2]
    assert "there is no version 1" in refused(1, "models", "show", "resnet/1")


def test_a_missing_key_is_asked_for(service: None) -> None:
    for key in ("", "another-wrong-key"):
        fault = refused(1, "jobs", "submit", "resnet", "--key", key)
        assert fault.endswith("give it by --key or CIFAR100_API_KEY")


def test_a_path_that_is_no_service_is_told(service: None) -> None:
    address = os.environ["CIFAR100_SERVER"]
    assert "is no service (404 Not Found for GET /health)" in refused(1, "models", "list", "--server", f"{address}/x")
