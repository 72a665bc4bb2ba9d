"""Test POST /explain: its map and picture, its limits, and the priority of predictions."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from api import assert_problem
from fastapi.testclient import TestClient
from local_client import make_local_client, services_of
from PIL import Image

from app.inference import explanation
from app.inference.batching import Batcher
from app.main import create_app
from app.settings import Settings
from training.dataset import Dataset
from training.runtimes import torchscript


@pytest.fixture(scope="module")
def client(published_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    settings = Settings(models=published_store, runs=tmp_path_factory.mktemp("runs"), deadline_s=600)
    with make_local_client(create_app(settings)) as client:
        yield client


def test_a_cell_is_the_mean_fall_of_the_log_probability_where_it_is_hidden(
    client: TestClient, published_store: Path, dataset: Dataset, image: bytes
) -> None:
    answer = client.post("/explain", files={"file": ("disc.png", image)}).json()
    best = client.post("/predict", files={"file": image}).json()["predictions"][0]["classes"][0]
    assert {key: answer[key] for key in best} == pytest.approx(best)
    assert (answer["model"], answer["version"], answer["file"], answer["warnings"]) == ("resnet", 1, "disc.png", [])

    pixels = dataset.test.images[0].transpose(2, 0, 1)
    hidden = []
    for top in (0, 4):  # the windows that hide the cell of row 1 and column 7, which are cut off at the right border
        for left in (24, 28):
            masked = pixels.copy()
            color = pixels.mean((1, 2)).round().astype(np.uint8)[:, None, None]
            masked[:, top : top + 8, left : left + 8] = color
            hidden.append(masked)
    with torch.inference_mode():
        logits = torchscript.load(published_store / "resnet" / "1" / "model.pt")(
            torch.from_numpy(np.array([pixels, *hidden]))
        )
    logarithms = logits.double().log_softmax(1)[:, answer["class_id"]]
    assert answer["map"][1][7] == pytest.approx((logarithms[0] - logarithms[1:]).mean().item(), abs=2e-4)
    assert np.array(answer["map"]).shape == (8, 8)


def test_any_class_is_explained_and_an_unknown_one_is_refused(
    client: TestClient, image: bytes, dataset: Dataset
) -> None:
    label = dataset.classes[41]
    for call in ({"params": {"class": label}}, {"data": {"class": label}}):
        answer = client.post("/explain", files={"file": image}, **call).json()
        assert (answer["class_id"], answer["label"]) == (41, label)
    unknown = client.post("/explain", files={"file": image}, params={"class": label[:-1]})
    assert_problem(unknown, 422, f"did you mean {label}?")


def test_the_picture_is_opaque_where_the_map_is_highest(client: TestClient, image: bytes) -> None:
    importance = np.array(client.post("/explain", files={"file": image}).json()["map"])
    for accept, kind in (
        ("image/png", "image/png"),
        ("image/png, application/json", "image/png"),
        ("application/json, image/png", "application/json"),
        ("text/html", "application/json"),
    ):
        answer = client.post("/explain", files={"file": image}, headers={"Accept": accept})
        assert answer.headers["content-type"] == kind, accept
    picture = client.post("/explain", files={"file": image}, headers={"Accept": "image/png"})
    assert picture.headers["vary"] == "Accept"
    alpha = np.asarray(Image.open(io.BytesIO(picture.content)))[..., 3]
    assert alpha.shape == (128, 128)
    centers = alpha[8::16, 8::16].astype(float)
    assert np.corrcoef(centers.ravel(), np.abs(importance).ravel())[0, 1] > 0.95


def test_a_class_whose_probability_does_not_change_has_an_empty_map_and_picture() -> None:
    importance = explanation.importance_map(np.zeros(explanation.COUNT))
    assert not importance.any()
    assert not np.asarray(Image.open(io.BytesIO(explanation.draw_overlay(importance))))[..., 3].any()


def test_uploads_parameters_and_models_are_those_of_predict(client: TestClient, image: bytes) -> None:
    raw = client.post("/explain?model=resnet&version=1", content=image, headers={"Content-Type": "image/png"})
    assert raw.status_code == 200
    assert_problem(
        client.post("/explain", files=[("file", image)] * 2), 400, "Too many files. Maximum number of files is 1"
    )
    assert_problem(
        client.post("/explain", content=b"hello", headers={"Content-Type": "image/png"}), 415, "not a supported"
    )
    assert_problem(client.post("/explain", files={"file": image}, params={"model": "vgg"}), 404, "no live model 'vgg'")
    assert_problem(client.post("/explain", files={"file": image}, params={"clas": "x"}), 422, "did you mean class?")


def test_every_masked_image_counts_for_the_rate_limit(published_store: Path, tmp_path: Path, image: bytes) -> None:
    def explain(limit: str) -> list[Any]:
        settings = Settings(models=published_store, runs=tmp_path, predict_rate_limit=limit)  # type: ignore[arg-type]
        with make_local_client(create_app(settings)) as client:
            return [client.post("/explain", files={"file": image}) for _ in range(2)]

    first, second = explain("100/hour")
    assert first.status_code == 200
    assert_problem(second, 429, "more than 100 per 1 hour predictions")
    assert_problem(explain("80/hour")[0], 429, "costs 82 units of the rate limit of 80 per 1 hour; explanations need")


def test_a_key_is_needed_where_predictions_need_one(published_store: Path, tmp_path: Path, image: bytes) -> None:
    key = "the-secret-of-this-test"
    settings = Settings(models=published_store, runs=tmp_path, api_keys=key, predict_needs_key=True)  # type: ignore[arg-type]
    with make_local_client(create_app(settings)) as client:
        assert_problem(client.post("/explain", files={"file": image}), 401, "needs an API key")
        client.headers["Authorization"] = f"Bearer {key}"
        assert client.post("/explain", files={"file": image}).status_code == 200


def test_a_client_with_its_share_and_a_full_queue_are_refused(client: TestClient, image: bytes) -> None:
    services = services_of(client)
    shares, batcher = services.masked_images, services.pool.live()["resnet"].batcher
    shares.add("127.0.0.1", 200)
    try:
        assert_problem(client.post("/explain", files={"file": image}), 503, "200 masked images are waiting already")
    finally:
        shares.remove("127.0.0.1", 200)
    assert isinstance(batcher, Batcher)
    batcher.queued_in_background += 200
    try:
        assert_problem(client.post("/explain", files={"file": image}), 503, "200 images are waiting already")
        assert client.post("/predict", files={"file": image}).status_code == 200
    finally:
        batcher.queued_in_background -= 200
    assert client.post("/explain", files={"file": image}).status_code == 200
    assert shares.total == batcher.waiting == 0
