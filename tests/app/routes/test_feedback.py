"""Test the corrections of predictions: their files, keys, bounds and export."""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from api import assert_problem, encode_png, make_zip
from command_line import answered, refused
from fastapi.testclient import TestClient
from local_client import make_local_client, services_of
from PIL import Image

from app.feedback import FeedbackStore
from app.main import create_app
from app.settings import Settings
from training import extra_data
from training.dataset import Dataset

ROOM = 3


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def client(published_store: Path, runs: Path) -> Iterator[TestClient]:
    settings = Settings(
        models=published_store, runs=runs, data="synthetic:4", feedback=True, max_feedback=ROOM, max_image_bytes=50_000
    )
    with make_local_client(create_app(settings)) as client:
        yield client


def send(client: TestClient, image: bytes, **fields: Any) -> httpx.Response:
    answer: httpx.Response = client.post("/feedback", files={"file": image}, data=fields)
    return answer


def kept(runs: Path) -> list[Path]:
    return sorted((runs / "feedback").glob("*.png"))


def test_the_pixels_the_class_and_the_answer_are_kept_and_nothing_else(
    client: TestClient, runs: Path, image: bytes
) -> None:
    photo, exif = io.BytesIO(), Image.Exif()
    exif[0x010F] = "a camera"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).resize((256, 256), Image.Resampling.NEAREST).save(photo, "PNG", exif=exif)
    answer = send(client, photo.getvalue(), **{"class": "red_ring", "model": "resnet", "version": "1"})
    assert answer.status_code == 201, answer.text
    correction = answer.json()
    predicted = client.post("/predict", files={"file": photo.getvalue()}).json()["predictions"][0]["classes"][0]
    assert correction["label"] == "red_ring"
    probability = pytest.approx(predicted["probability"])
    answered = {"model": "resnet", "version": 1, "predicted": predicted["label"], "probability": probability}
    assert correction["answer"] == answered
    (file,) = kept(runs)
    assert file.stem == correction["id"]
    assert file.stat().st_size <= 4096
    assert b"camera" not in file.read_bytes()
    assert client.get("/feedback").json() == [correction]
    raw = client.post("/feedback", content=image, params={"class": "red_disc"}, headers={"Content-Type": "image/png"})
    assert raw.status_code == 201
    with Image.open(kept(runs)[-1]) as opened, Image.open(io.BytesIO(image)) as original:
        assert (np.asarray(opened) == np.asarray(original.convert("RGB"))).all()


def test_a_second_correction_replaces_the_first_and_a_full_folder_refuses_others(
    client: TestClient, runs: Path, dataset: Dataset
) -> None:
    images = [encode_png(dataset, row) for row in range(ROOM + 1)]
    for image in images[:ROOM]:
        assert send(client, image, **{"class": "red_disc"}).status_code == 201
    services_of(client).feedback.require_room = lambda: None  # type: ignore[method-assign]  # another server is faster
    assert send(client, images[0], **{"class": "blue_ring"}).json()["label"] == "blue_ring"
    del services_of(client).feedback.require_room
    assert_problem(send(client, images[ROOM], **{"class": "red_disc"}), 507, "keeps 3 corrections")
    labels = [each["label"] for each in client.get("/feedback").json()]
    assert (len(labels), labels.count("blue_ring")) == (ROOM, 1)
    removed = client.get("/feedback", params={"limit": 1}).json()[0]["id"]
    assert client.delete(f"/feedback/{removed}").json() == {"kept": ROOM - 1}
    assert_problem(client.delete(f"/feedback/{removed}"), 404, "GET /feedback lists them")
    assert_problem(client.delete("/feedback/..%2Fjobs"), 404, "")
    assert send(client, images[ROOM], **{"class": "red_disc"}).status_code == 201


def test_corrections_without_a_class_of_the_model_or_an_image_are_refused(
    client: TestClient, runs: Path, image: bytes
) -> None:
    assert_problem(send(client, image), 422, "the parameter class is missing")
    assert_problem(send(client, image, **{"class": "red_disk"}), 422, "did you mean red_disc?")
    assert_problem(send(client, image, **{"class": "red_disc", "model": "vgg"}), 404, "vgg")
    assert_problem(send(client, b"hello", **{"class": "red_disc"}), 415, "not a supported image")
    assert_problem(send(client, bytes(200_000), **{"class": "red_disc"}), 413, "larger than")
    assert kept(runs) == []


def test_feedback_is_off_by_default_and_has_the_limits_of_predictions(
    published_store: Path, runs: Path, image: bytes
) -> None:
    common: dict[str, Any] = {"models": published_store, "runs": runs}
    with make_local_client(create_app(Settings(**common))) as client:
        assert_problem(send(client, image, **{"class": "red_disc"}), 403, "CIFAR100_FEEDBACK=true")
        assert client.get("/health").json()["feedback"] is False
    common |= {"feedback": True, "predict_rate_limit": "2/hour", "api_keys": "k" * 16, "predict_needs_key": True}
    limited = Settings(**common)
    with make_local_client(create_app(limited)) as client:
        assert_problem(send(client, image, **{"class": "red_disc"}), 401, "API key")
        client.headers["Authorization"] = "Bearer " + "k" * 16
        statuses = [send(client, image, **{"class": "red_disc"}).status_code for _ in range(3)]
        assert statuses == [201, 201, 429]


def test_corrections_are_deleted_after_their_days(client: TestClient, runs: Path, image: bytes) -> None:
    send(client, image, **{"class": "red_disc"})
    (file,) = kept(runs)
    file.rename(file.with_name(f"20260101-000000-{'0' * 16}.png"))
    FeedbackStore(runs / "feedback", ROOM)._delete_expired()
    assert len(kept(runs)) == 1
    FeedbackStore(runs / "feedback", ROOM, days=10)._delete_expired()
    assert kept(runs) == []


def test_exported_corrections_are_evaluated_and_trained_on(
    client: TestClient, runs: Path, dataset: Dataset, tmp_path: Path
) -> None:
    folder, packed = tmp_path / "export", tmp_path / "extra.npz"
    export = ("data", "export-feedback", folder, "--runs", runs)
    assert "has no corrections" in refused(1, *export)
    for row, label in enumerate(("red_disc", "blue_ring")):
        send(client, encode_png(dataset, row), **{"class": label})
    (runs / "feedback" / "damaged.png").write_bytes(b"x")
    assert answered(*export) == {"folder": str(folder), "images": 2}
    assert sorted(path.parent.name for path in folder.glob("*/*")) == ["blue_ring", "red_disc"]
    assert "is not empty" in refused(1, *export)

    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.glob("*/*")}
    measured = client.post("/evaluate", files={"file": make_zip(files, zipfile.ZIP_DEFLATED)}).json()
    assert measured["result"]["images"] == 2

    assert answered("data", "pack", folder, packed)["images"] == 2
    with np.load(packed) as arrays:
        assert (arrays["images"][arrays["labels"] == "red_disc"] == dataset.test.images[0]).all()
    with pytest.raises(Exception, match="no image that is neither in the test set"):
        extra_data.add(dataset, packed, 0)
    (folder / "red_disc" / "notes.txt").write_text("x")
    assert "notes.txt: the bytes are not" in refused(1, "data", "pack", folder, packed)
