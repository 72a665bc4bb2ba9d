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


def test_each_cell_is_hidden_alone_and_in_a_block_under_the_mean_color() -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 32, 32), np.uint8)
    color = image.mean((1, 2)).round().astype(np.uint8)[:, None, None]
    original, *masked = explanation.occlude(image)
    assert len(masked) == explanation.COUNT - 1 == 64 + 16
    np.testing.assert_array_equal(original, image)
    for number, (top, left, side) in {10: (4, 8, 4), 64 + 5: (12, 12, 8)}.items():
        expected = image.copy()
        expected[:, top : top + side, left : left + side] = color
        np.testing.assert_array_equal(masked[number], expected)
    hidden = (np.array(masked) != image).any(1).reshape(len(masked), 8, 4, 8, 4).any((2, 4))
    assert (hidden.sum(0) == 2).all()


def test_the_map_has_the_share_of_each_cell_in_the_fall_of_the_log_probability() -> None:
    shares = np.random.default_rng(0).random((8, 8))
    cells = np.eye(64).reshape(64, 8, 8)
    blocks = np.roll(np.eye(16).reshape(16, 4, 4).repeat(2, 1).repeat(2, 2), (1, 1), (1, 2))
    falls = [0.0, *np.tensordot(np.concatenate([cells, blocks]), shares)]
    importance = explanation.importance_map(np.exp(-np.array(falls)))
    np.testing.assert_allclose(importance, shares, atol=0.1)  # the ridge regression draws them to 0


def test_the_map_is_computed_by_the_model_that_answers(
    client: TestClient, published_store: Path, dataset: Dataset, image: bytes
) -> None:
    answer = client.post("/explain", files={"file": ("disc.png", image)}).json()
    best = client.post("/predict", files={"file": image}).json()["predictions"][0]["classes"][0]
    assert {key: answer[key] for key in best} == pytest.approx(best)
    assert (answer["model"], answer["version"], answer["file"], answer["warnings"]) == ("resnet", 1, "disc.png", [])

    masked = explanation.occlude(dataset.test.images[0].transpose(2, 0, 1))
    with torch.inference_mode():
        logits = torchscript.load(published_store / "resnet" / "1" / "model.pt")(torch.from_numpy(masked))
    expected = explanation.importance_map(logits.double().softmax(1)[:, answer["class_id"]].numpy())
    np.testing.assert_allclose(answer["map"], expected, atol=5e-4)


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
    assert_problem(explain("80/hour")[0], 429, "costs 81 units of the rate limit of 80 per 1 hour; explanations need")


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
