"""Test the commands on the store, the runs folder and the data set of this machine."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from api import encode_png, make_zip
from cascades import add_cascade, add_second_member
from command_line import answered, refused, typed
from PIL import Image
from postgres import PostgresServer

from training.dataset import Dataset
from training.run import Run
from training.store import LocalStore

DATA = "synthetic:4"


@pytest.fixture
def store(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    """The store that commands use. Version 1 of resnet is live, and version 2 is an equal one."""
    monkeypatch.setenv("CIFAR100_MODELS", str(models))
    monkeypatch.setenv("CIFAR100_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CIFAR100_DATA", DATA)
    store = LocalStore(models)
    with store.draft("resnet") as draft:
        (draft / "model.pt").write_bytes((models / "resnet" / "1" / "model.pt").read_bytes())
        store.publish(draft, store.card("resnet", 1))
    return store


@pytest.fixture
def photo(image: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(image)
    return path


def test_predict_classifies_every_image_that_it_can(
    store: LocalStore, photo: Path, image: bytes, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("no image")
    files: list[str | Path] = [photo, "-", tmp_path / "text.txt", tmp_path / "none.png", tmp_path]
    result = typed("predict", *files, "--top-k", "2", "--json", stdin=image)
    assert result.exit_code == 1
    first, second, *failed = json.loads(result.stdout)
    assert (first["model"], first["version"], first["file"], len(first["classes"])) == ("resnet", 1, str(photo), 2)
    assert (second["file"], second["classes"]) == ("-", first["classes"])
    assert [each["file"] for each in failed] == list(map(str, files[2:]))
    faults = ["the bytes are not a supported image", "No such file or directory", "Is a directory"]
    for each, fault in zip(failed, faults, strict=True):
        assert each["error"].startswith(fault)
        assert f"error: {each['file']}: {each['error']}\n" in result.stderr

    shown = typed("predict", photo, "--model", "resnet/2")
    best = first["classes"][0]
    assert shown.stdout.splitlines()[0] == f"{photo}  (resnet/2)"
    assert shown.stdout.splitlines()[1].split() == [f"{best['probability']:.2%}", best["label"], best["superclass"]]
    assert "there is no model nope" in refused(1, "predict", photo, "--model", "nope")


def test_the_default_model_is_that_of_a_service(store: LocalStore, photo: Path) -> None:
    add_second_member(store)
    add_cascade(store)
    assert answered("predict", photo)[0]["model"] == "cascade"
    assert answered("predict", photo, CIFAR100_DEFAULT_MODEL="resnet18")[0]["model"] == "resnet18"
    (store.root / "cascade" / "live").unlink()
    assert store.default_card().name in ("resnet", "resnet18")


def test_explain_prints_the_map_and_draws_it_over_the_image(store: LocalStore, photo: Path, tmp_path: Path) -> None:
    picture = tmp_path / "map.png"
    explained = answered("explain", photo, "--class", "red_disc", "--picture", picture)
    assert (explained["label"], explained["model"], explained["version"]) == ("red_disc", "resnet", 1)
    assert [len(row) for row in explained["map"]] == [8] * 8
    with Image.open(picture) as drawn:
        assert (drawn.mode, drawn.size) == ("RGB", (256, 256))
    shown = typed("explain", photo, "--class", "red_disc").stdout.splitlines()
    assert [float(cell) for cell in shown[1].split()] == pytest.approx(explained["map"][0], abs=0.0051)
    assert "did you mean red_disc" in refused(1, "explain", photo, "--class", "red_disk")


def test_evaluate_measures_a_split_some_of_it_or_photos(store: LocalStore, dataset: Dataset, tmp_path: Path) -> None:
    test = store.card("resnet", 1).test
    measured = answered("evaluate")
    assert (measured["model"], measured["version"], measured["split"]) == ("resnet", 1, "test")
    assert measured["result"]["top1"] == pytest.approx(test.top1)
    assert "resnet/2 on 30 test images: top-1 " in typed("evaluate", "resnet/2", "--limit", "30").stdout

    photos = tmp_path / "photos.zip"
    rows = range(20)
    names = {f"{dataset.classes[dataset.test.labels[row]]}/{row}.png": encode_png(dataset, row) for row in rows}
    photos.write_bytes(make_zip(names))
    measured = answered("evaluate", "--photos", photos)
    assert (measured["split"], measured["result"]["images"]) == ("zip", 20)
    photos.write_bytes(b"no zip")
    assert "the zip cannot be read" in refused(1, "evaluate", "--photos", photos)
    assert "none.zip: No such file" in refused(1, "evaluate", "--photos", tmp_path / "none.zip")


def test_models_are_listed_shown_and_compared(store: LocalStore) -> None:
    top1 = store.card("resnet", 1).test.top1
    row = {"name": "resnet", "live": 1, "versions": [1, 2], "test_top1": top1, "error": None}
    assert answered("models", "list") == [row]
    listed = typed("models", "list").stdout.splitlines()
    assert listed[1].split() == ["resnet", "1", f"{top1:.2%}", "1,", "2"]
    assert answered("models", "show", "resnet") == json.loads((store.root / "resnet" / "1" / "card.json").read_text())
    assert "recipe      resnet epochs=1" in typed("models", "show", "resnet/2").stdout
    compared = answered("models", "compare", "resnet", "resnet/2")
    assert (compared["versions"], compared["test"]["top1"]) == (["resnet/1", "resnet/2"], [top1, top1])
    assert compared["recipe"] == {}
    shown = typed("models", "compare", "resnet", "resnet/2").stdout
    assert f"test top-1       {top1:.2%}" in shown
    assert "there is no model 'nope'; there are: resnet" in refused(1, "models", "show", "nope")
    assert "there is no version 9 of resnet" in refused(1, "models", "show", "resnet/9")


def test_models_are_promoted_rolled_back_and_deleted(store: LocalStore) -> None:
    assert typed("models", "promote", "resnet/2").stdout == "resnet/2 is live\n"
    assert "is live; promote another" in refused(1, "models", "delete", "resnet/2", "--yes")
    assert answered("models", "rollback", "resnet") == {"name": "resnet", "live": 1, "versions": [1, 2]}
    assert "no version before the live one, 1" in refused(1, "models", "rollback", "resnet")
    store.promote("resnet", 2)
    assert "add --yes" in refused(2, "models", "delete", "resnet/1")
    assert typed("models", "delete", "resnet/1", "--yes").stdout == "deleted resnet/1; resnet has the versions 2\n"


def test_a_damaged_version_is_told_and_not_promoted(store: LocalStore) -> None:
    with (store.root / "resnet" / "2" / "model.pt").open("ab") as file:
        file.write(b"\0")
    assert "model.pt is damaged" in refused(1, "models", "promote", "resnet/2")
    assert store.live("resnet") == 1
    (store.root / "resnet" / "2" / "model.pt").unlink()
    (model,) = answered("models", "list")
    assert "model.pt is missing" in model["error"]


def test_jobs_wait_for_a_service_until_they_are_cancelled(store: LocalStore, tmp_path: Path) -> None:
    assert refused(1, "jobs", "list") == (
        f"there are no training jobs in {tmp_path / 'runs'}; name another folder by --runs or CIFAR100_RUNS"
    )
    submitted = answered("jobs", "submit", "resnet", "width=8", "weights=resnet/1")
    assert (submitted["state"], submitted["request"]["overrides"]) == ("queued", {"width": 8, "weights": "resnet/1"})
    job = submitted["id"]
    store.promote("resnet", 2)
    assert "a waiting training job needs resnet/1" in refused(1, "models", "delete", "resnet/1", "--yes")
    assert [each["id"] for each in answered("jobs", "list")] == [job]
    assert "resnet width=8 weights=resnet/1" in typed("jobs", "list").stdout
    run = Run(tmp_path / "runs" / job)
    run.path.mkdir()
    run.record({"event": "phase", "phase": "loading", "message": "loading the images", "done": 0, "images": 0})
    run.record({"event": "tick", "epoch": 1, "step": 2, "steps": 3, "loss": 4.5})
    run.record({"event": "epoch", "epoch": 1, "train_loss": 4.5, "split": "test", "loss": 4.25, "top1": 0.125})
    assert typed("jobs", "cancel", job).stdout == f"{job}  cancelled\n"
    followed = typed("jobs", "follow", job)
    assert followed.exit_code == 1
    epoch = "epoch 1  train loss 4.500  test loss 4.250  top-1 12.50%"
    lines = ["loading: loading the images", "epoch 1  step 2/3  loss 4.500", epoch, "cancelled"]
    assert followed.stdout.splitlines() == lines
    *_, last, end = map(json.loads, typed("jobs", "follow", job, "--json").stdout.splitlines())
    assert (last["event"], last["number"], last["data"]["top1"]) == ("epoch", 3, 0.125)
    assert (end["event"], end["data"]["state"]) == ("end", "cancelled")
    shown = typed("jobs", "show", job).stdout.splitlines()
    assert shown[0] == f"{job}  cancelled  resnet width=8 weights=resnet/1"
    assert shown[-1] == epoch
    assert refused(1, "jobs", "show", "nope") == "there is no training job 'nope'; cifar100 jobs list lists them"
    assert "did you mean epochs" in refused(1, "jobs", "submit", "resnet", "epoch=2")


def test_a_job_database_that_is_none_is_told(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "jobs.sqlite").write_text("no database")
    assert "jobs.sqlite cannot be used: file is not a database" in refused(1, "jobs", "list")


def test_data_is_checked(tmp_path: Path) -> None:
    checked = answered("data", "check", "--data", DATA)
    assert (checked["train"], checked["test"], checked["classes"], checked["is_cifar100"]) == (400, 100, 100, False)
    assert f"there is no cifar100.npz in {tmp_path}; get it by" in refused(1, "data", "check", "--data", tmp_path)
    (tmp_path / "cifar100.npz").write_text("no archive")
    assert "is not a readable npz file" in refused(1, "data", "check", "--data", tmp_path)
    assert "is not a readable npz file" in refused(1, "data", "download", "--data", tmp_path)


def findings(*words: str, **environment: Any) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Return the exit status, the findings by topic and the settings by name."""
    result = typed("doctor", *words, "--json", CIFAR100_PORT="0", **environment)
    answer = json.loads(result.stdout)
    assert "a-secret-key-of-this-test" not in result.output
    return (
        result.exit_code,
        {each.pop("topic"): each for each in answer["findings"]},
        {each.pop("name"): each for each in answer["settings"]},
    )


def test_doctor_finds_a_damaged_store_and_says_where_settings_come_from(store: LocalStore, tmp_path: Path) -> None:
    secret = {"CIFAR100_API_KEYS": "a-secret-key-of-this-test"}
    _, found, settings = findings(**secret)
    assert found["store"]["state"] == "ok"
    assert "2 versions; live: resnet/1; all checksums match" in found["store"]["text"]
    assert found["runtime"]["text"] == "resnet/1 is computed by torchscript-cpu"
    assert settings["port"] == {"value": "0", "source": "CIFAR100_PORT"}
    assert settings["host"] == {"value": "127.0.0.1", "source": "default"}

    with (store.root / "resnet" / "2" / "model.pt").open("ab") as file:
        file.write(b"\0")
    status, found, settings = findings("--runs", str(tmp_path / "other"))
    assert status == 1
    assert found["store"]["state"] == "problem"
    assert "model.pt is damaged" in found["store"]["text"]
    assert settings["runs"]["source"] == "--runs"

    status, found, _ = findings(CIFAR100_MAX_QUEUE="0")
    assert status == 1
    assert found["settings"]["text"] == "CIFAR100_MAX_QUEUE: Input should be greater than 0"


def test_jobs_of_a_postgresql_database_are_listed_and_checked(
    store: LocalStore, tmp_path: Path, postgres: PostgresServer
) -> None:
    url = postgres.create_database()
    assert answered("jobs", "list", CIFAR100_DATABASE=url) == []
    _, found, settings = findings(CIFAR100_DATABASE=url)
    assert found["jobs"]["state"] == "ok"
    assert found["jobs"]["text"].startswith("the PostgreSQL database test_")
    assert settings["database"] == {"value": "**********", "source": "CIFAR100_DATABASE"}
    nothing = {"CIFAR100_DATABASE": "postgresql://somebody:a-secret-key-of-this-test@127.0.0.1:1/jobs"}
    assert "the PostgreSQL database jobs on 127.0.0.1 cannot be used: " in refused(1, "jobs", "list", **nothing)
    status, found, _ = findings(**nothing)
    assert status == 1
    assert found["jobs"]["remedy"] == "check CIFAR100_DATABASE"


def test_a_folder_without_permission_is_told(store: LocalStore) -> None:
    store.root.chmod(0)
    try:
        if os.access(store.root, os.R_OK):
            pytest.skip("this user may read every folder")
        assert "Permission denied" in refused(1, "models", "list", CIFAR100_MODELS=str(store.root / "x"))
    finally:
        store.root.chmod(0o755)
