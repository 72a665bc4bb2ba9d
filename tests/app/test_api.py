"""Test the HTTP interface in process: accepted requests, refused requests, and the format of the answers."""

import io
import json
import shutil
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast
from unittest.mock import AsyncMock

import httpx
import numpy as np
import pytest
import torch
from api import assert_problem, encode_png, make_zip
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient
from local_client import make_local_client
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from app.exceptions import Unavailable
from app.inference.images import encoded
from app.jobs import evaluation_runner
from app.jobs.labeled_images import LabeledImages, read_zip
from app.jobs.queue import State
from app.main import create_app
from app.routes import predict as predict_route
from app.settings import Settings
from training.dataset import Dataset
from training.evaluate import evaluate, predict
from training.recipes import RECIPES
from training.runtimes import selection, torchscript
from training.runtimes.engine import Engine, EngineError
from training.store import FamiliarityThreshold, LocalStore


@pytest.fixture
def client(models: Path, tmp_path: Path) -> Iterator[TestClient]:
    settings = Settings(
        models=models,
        runs=tmp_path / "runs",
        data="synthetic:4",
        max_image_bytes=20_000,
        max_image_pixels=10_000,
        max_archive_images=100,
        deadline_s=600,  # a busy machine may load a version slowly
    )
    with make_local_client(create_app(settings)) as client:
        yield client


def second_version(models: Path) -> LocalStore:
    """Publish version 2 as a copy of version 1 and return the store. Version 1 stays live."""
    store = LocalStore(models)
    with store.draft("resnet") as draft:
        (draft / "model.pt").write_bytes((models / "resnet" / "1" / "model.pt").read_bytes())
        store.publish(draft, store.card("resnet", 1))
    return store


def test_predict_equals_offline_evaluation_bit_for_bit(client: TestClient, models: Path, dataset: Dataset) -> None:
    module = torchscript.load(models / "resnet" / "1" / "model.pt")
    for row in range(5):
        answer = client.post("/predict", files={"file": encode_png(dataset, row)}, params={"top_k": 100}).json()
        with torch.inference_mode():
            logits = module(torch.from_numpy(dataset.test.images[row]).permute(2, 0, 1)[None])[0].double().numpy()
        exponentials = np.exp(logits - logits.max())
        probabilities = exponentials / exponentials.sum()
        assert answer["predictions"][0]["classes"] == [
            {
                "class_id": each,
                "label": dataset.classes[each],
                "superclass": dataset.superclasses[each],
                "probability": probabilities[each],
            }
            for each in np.argsort(-logits, kind="stable").tolist()
        ]


def test_an_image_is_familiar_if_its_score_reaches_the_threshold_of_the_card(
    models: Path, tmp_path: Path, dataset: Dataset
) -> None:
    def predictions(threshold: FamiliarityThreshold | None) -> list[dict[str, Any]]:
        store = LocalStore(models)
        store.amend(store.card("resnet", 1).model_copy(update={"familiarity": threshold}))
        with make_local_client(create_app(Settings(models=models, runs=tmp_path))) as client:
            answer = client.post("/predict", files=[("file", encode_png(dataset, row)) for row in range(3)])
            found: list[dict[str, Any]] = answer.json()["predictions"]
            return found

    without = predictions(None)
    assert [each["familiar"] for each in without] == [None] * 3
    scores = [each["familiarity"] for each in without]
    images = torch.from_numpy(dataset.test.images[:3]).permute(0, 3, 1, 2)
    with torch.inference_mode():
        logits = torchscript.load(models / "resnet" / "1" / "model.pt")(images)
    assert scores == pytest.approx(logits.double().logsumexp(1).tolist(), abs=1e-5)
    for threshold in scores:
        fitted = FamiliarityThreshold(threshold=threshold, kept=0.95, images=100)
        assert [each["familiar"] for each in predictions(fitted)] == [score >= threshold for score in scores]


def test_five_classes_by_default_and_top_k_on_request(client: TestClient, image: bytes) -> None:
    def count(**params: int) -> int:
        answer = client.post("/predict", files={"file": image}, params=params).json()
        return len(answer["predictions"][0]["classes"])

    assert count() == 5
    assert count(top_k=1) == 1
    assert count(top_k=100) == 100
    for top_k in (0, 101):
        assert_problem(client.post("/predict", files={"file": image}, params={"top_k": top_k}), 422, "top_k")


def test_a_raw_body_is_the_same_as_a_form(client: TestClient, image: bytes) -> None:
    form = client.post("/predict", files={"file": image}).json()["predictions"][0]["classes"]
    binary = "application/octet-stream", "binary/octet-stream", "application/x-www-form-urlencoded"
    for content_type in ("image/png", "image/anything", *binary, None):
        headers = {"content-type": content_type} if content_type else {}
        raw = client.post("/predict", content=image, headers=headers).json()
        assert raw["predictions"][0]["classes"] == form


def test_several_images_are_answered_in_order(client: TestClient, dataset: Dataset) -> None:
    images = [encode_png(dataset, row) for row in range(3)]
    files = [("file", (f"{number}.png", image)) for number, image in enumerate(images)]
    together = client.post("/predict", files=files).json()["predictions"]
    assert [each["file"] for each in together] == ["0.png", "1.png", "2.png"]
    for image, prediction in zip(images, together, strict=True):
        alone = client.post("/predict", files={"file": image}).json()["predictions"][0]
        assert alone["classes"][0]["label"] == prediction["classes"][0]["label"]


def test_a_cut_off_jpeg_is_answered_with_a_warning(client: TestClient, image: bytes) -> None:
    photo = io.BytesIO()
    Image.open(io.BytesIO(image)).resize((96, 96)).save(photo, "JPEG")
    thumbnail = io.BytesIO()
    Image.open(io.BytesIO(image)).save(thumbnail, "JPEG")
    files = [("file", (name, each)) for name, each in (("a.jpg", photo.getvalue()[:-2]), ("b.png", image))]
    cut_off, whole = client.post("/predict", files=files).json()["predictions"]
    assert cut_off["warnings"] == ["the JPEG is cut off: its end is missing; the picture is whole"]
    assert whole["warnings"] == []
    for content in (photo.getvalue(), thumbnail.getvalue(), image):
        complete, shorter = (
            client.post("/predict", files={"file": each}).json()["predictions"][0] for each in (content, content[:-2])
        )
        assert complete["warnings"] == []
        assert len(shorter["warnings"]) == (0 if content == image else 1)
        assert shorter["classes"] == complete["classes"]
    half = client.post("/predict", files={"file": photo.getvalue()[: len(photo.getvalue()) // 2]})
    assert_problem(half, 422, "of the picture is missing, the limit is 5%; send the whole file")


def test_the_openapi_document_describes_the_warnings(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()["components"]["schemas"]["Prediction"]
    assert schema["properties"]["warnings"]["items"] == {"type": "string"}


@pytest.mark.slow
def test_an_avif_is_decoded_in_a_process_for_predictions_and_evaluations(client: TestClient, image: bytes) -> None:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image)).save(buffer, "AVIF", quality=95)
    answer = client.post("/predict", files={"file": buffer.getvalue()}).json()["predictions"][0]
    expected = client.post("/predict", files={"file": image}).json()["predictions"][0]
    assert answer["classes"][0]["label"] == expected["classes"][0]["label"]
    measured = client.post("/evaluate", files={"file": make_zip({"red_disc/1.avif": buffer.getvalue()})})
    assert measured.json()["result"]["images"] == 1


def test_bad_images_are_problems(client: TestClient, image: bytes) -> None:
    def send(content: bytes) -> httpx.Response:
        answer: httpx.Response = client.post("/predict", content=content, headers={"content-type": "image/png"})
        return answer

    assert_problem(send(b""), 422, "empty")
    assert_problem(send(b"hello"), 415, "not a supported image")
    assert_problem(send(image[:-200]), 422, "cannot be decoded")
    assert_problem(send(image + bytes(20_000)), 413, "20,000")
    assert_problem(client.post("/predict", files={"file": bytes(20_001)}), 413, "20,000")
    buffer = io.BytesIO()
    Image.new("1", (101, 101)).save(buffer, "PNG")
    assert_problem(send(buffer.getvalue()), 413, "101x101")


def test_a_bad_image_among_several_is_named(client: TestClient, image: bytes) -> None:
    files = [("file", ("good.png", image)), ("file", ("bad.png", b"hello"))]
    assert_problem(client.post("/predict", files=files), 415, "bad.png")


def test_partial_answers_have_a_prediction_or_an_error_for_each_image(client: TestClient, image: bytes) -> None:
    contents = {"a.png": image, "text.png": b"hello", "large.png": bytes(20_001), "b.png": image, "half": image[:-200]}
    files = [("file", (name, content)) for name, content in contents.items()]
    alone = [client.post("/predict", files=[file]).json() for file in files]
    answers = [client.post("/predict", files=files, params={"partial": "true"})]
    answers.append(client.post("/predict", files=files, data={"partial": "true"}))
    for answer in answers:
        assert answer.status_code == 200
        predictions = answer.json()["predictions"]
        assert [each["file"] for each in predictions] == list(contents)
        for prediction, expected in zip(predictions, alone, strict=True):
            if "predictions" in expected:
                assert prediction["classes"][0]["label"] == expected["predictions"][0]["classes"][0]["label"]
            else:
                assert prediction == {"file": prediction["file"], "error": expected}
        assert [each.get("error", {}).get("status") for each in predictions] == [None, 415, 413, None, 422]
    assert_problem(client.post("/predict", files=files), 415, "text.png: ")


def test_partial_answers_with_errors_only_are_200_and_limits_of_the_request_hold(
    client: TestClient, image: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = {"partial": "true", "model": "resnet"}
    for files in ([("file", b"hello")], [("file", b"hello")] * 2):
        answer = client.post("/predict", files=files, params=partial).json()
        assert (answer["model"], answer["version"]) == ("resnet", 1)
        assert [each["error"]["status"] for each in answer["predictions"]] == [415] * len(files)
    assert_problem(client.post("/predict", files=[("file", image)] * 33, params=partial), 400, "Too many files")
    assert_problem(client.post("/predict", files={"file": image}, params={**partial, "model": "vgg"}), 404, "vgg")
    decoders = cast(FastAPI, client.app).state.services.decoders
    monkeypatch.setattr(decoders, "_decode", AsyncMock(side_effect=Unavailable("late")))
    assert_problem(client.post("/predict", files=[("file", image)] * 2, params=partial), 503, "late")


def test_other_bodies_are_problems(client: TestClient, image: bytes) -> None:
    assert_problem(client.post("/predict", json={}), 415, "application/json")
    assert_problem(client.post("/predict", content=b"hello"), 415, "the content type is '(none)'")
    assert_problem(client.post("/predict", data={"top_k": "1"}), 415, "application/x-www-form-urlencoded")
    assert_problem(client.post("/predict"), 422, "empty")
    assert_problem(client.post("/predict", files={"image": image}), 422, "no field 'file'")
    multipart = {"content-type": "multipart/form-data"}
    assert_problem(client.post("/predict", content=b"x", headers=multipart), 400, "boundary")
    assert_problem(client.post("/train", content=bytes(2 << 20)), 413, "larger than")
    streamed = client.post("/train", content=iter([bytes(1 << 20)] * 3))
    assert_problem(streamed, 413, "larger than")
    assert streamed.headers["connection"] == "close"
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="+2AA-"\r\n\r\n' + image + b"\r\n--x--\r\n"
    for charset, status in (("undefined", 422), ("utf-7", 200), ("unheard-of", 200)):
        form = {"content-type": f"multipart/form-data; boundary=x; charset={charset}"}
        assert client.post("/predict", content=part, headers=form).status_code == status, charset
    too_many = [("file", image)] * 33
    assert_problem(client.post("/predict", files=too_many), 400, "Too many files")


def test_unknown_models_and_versions_are_404(client: TestClient, image: bytes) -> None:
    for params in ({"model": "vgg"}, {"model": "resnet", "version": 9}, {"model": "../secrets", "version": 1}):
        assert_problem(client.post("/predict", files={"file": image}, params=params), 404, "GET /models")
    for version in (0, 10**300):
        assert client.post("/predict", files={"file": image}, params={"version": version}).status_code == 422
    assert_problem(client.get("/models/vgg"), 404, "resnet")
    assert_problem(client.put("/models/resnet/live", json={"version": 9}), 404, "version 9")
    assert_problem(client.get("/nowhere"), 404, "")
    assert_problem(client.delete("/predict"), 405, "DELETE is not supported here; use POST")


def test_a_version_that_is_removed_while_it_is_loaded_is_404(
    client: TestClient, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second_version(models)

    def pruned(model: Path, *_: object) -> None:
        shutil.rmtree(model.parent)
        raise OSError("no such file")

    monkeypatch.setattr("training.runtimes.selection.load", pruned)
    assert_problem(client.put("/models/resnet/live", json={"version": 2}), 404, "no version 2 of resnet")


# Warning filters are global: another thread may restore the filter that the loading thread has disabled.
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_versions_that_are_not_live_are_loaded_one_at_a_time(
    client: TestClient, models: Path, image: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    second_version(models)
    right, begun, gate = selection.load, threading.Event(), threading.Event()

    def slow(*given: Any) -> Engine:
        begun.set()
        assert gate.wait(10)
        return right(*given)

    monkeypatch.setattr("training.runtimes.selection.load", slow)
    wanted: dict[str, Any] = {"files": {"file": image}, "params": {"model": "resnet", "version": 2}}
    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(client.post, "/predict", **wanted)
        assert begun.wait(10)
        assert_problem(client.post("/predict", **wanted), 503, "is being loaded")
        promoted = clients.submit(client.put, "/models/resnet/live", json={"version": 2})  # waits for the load
        gate.set()
        assert first.result().json()["version"] == 2
        assert promoted.result().json()["live"] == 2


def test_a_live_version_that_cannot_be_loaded_is_not_tried_all_the_time(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = list[Path]()

    def failing(model: Path, *_: object) -> None:
        tried.append(model)
        raise EngineError("no such instructions")

    monkeypatch.setattr("training.runtimes.selection.load", failing)
    with make_local_client(create_app(Settings(models=models, runs=tmp_path / "runs", store_poll_s=0.01))) as client:
        before = len(tried)
        time.sleep(0.3)
        assert "no such instructions" in client.get("/health").json()["errors"]["resnet"]
        assert len(tried) == before <= 2  # once as the live version, once as the fallback


def test_evaluate_tells_the_recorded_accuracy(client: TestClient, models: Path) -> None:
    card = LocalStore(models).card("resnet", 1)
    answer = client.get("/evaluate").json()
    assert [(each["model"], each["version"], each["test"]["top1"]) for each in answer] == [
        ("resnet", 1, card.test.top1)
    ]


def test_evaluate_measures_through_the_engine(client: TestClient, models: Path, dataset: Dataset) -> None:
    answer = client.post("/evaluate").json()
    assert answer["state"] == "succeeded"
    assert answer["result"]["top1"] == LocalStore(models).card("resnet", 1).test.top1
    train = client.post("/evaluate", params={"split": "train", "limit": 30}).json()
    assert train["result"]["images"] == 30
    assert client.get(f"/evaluate/{train['id']}").json() == train
    assert_problem(client.get("/evaluate/none"), 404, "none")


def test_an_evaluation_is_known_to_other_servers_and_to_later_ones(
    client: TestClient, models: Path, tmp_path: Path
) -> None:
    measured = client.post("/evaluate").json()
    with make_local_client(create_app(Settings(models=models, runs=tmp_path / "runs"))) as other:
        assert other.get(f"/evaluate/{measured['id']}").json() == measured


def test_without_a_runs_folder_there_is_no_evaluation_but_everything_else(
    models: Path, tmp_path: Path, image: bytes
) -> None:
    (tmp_path / "runs").touch()
    with make_local_client(create_app(Settings(models=models, runs=tmp_path / "runs", data="synthetic:4"))) as client:
        assert_problem(client.post("/evaluate"), 503, "jobs are unavailable")
        assert client.get("/evaluate").status_code == 200
        assert client.post("/predict", files={"file": image}).status_code == 200


def test_evaluate_measures_a_zip_of_labelled_folders(client: TestClient, models: Path, dataset: Dataset) -> None:
    rows = range(20)
    labels = [dataset.classes[dataset.test.labels[row]] for row in rows]
    names = [f"photos/{label.replace('_', ' ')}/{row}.png" for row, label in zip(rows, labels, strict=True)]
    archive = make_zip({name: encode_png(dataset, row) for row, name in zip(rows, names, strict=True)})
    answer = client.post("/evaluate", files={"file": archive}).json()
    module = torchscript.load(models / "resnet" / "1" / "model.pt")
    logits = predict(module, torch.from_numpy(dataset.test.images[:20]))
    expected = evaluate(logits, torch.from_numpy(dataset.test.labels[:20]))
    result = answer["result"]
    assert result["images"] == 20
    assert result["top5"] == expected.top5
    assert result["loss"] == pytest.approx(expected.loss)
    assert result["classes"] == list(dataset.classes)
    assert result["images_per_class"] == np.bincount(dataset.test.labels[:20], minlength=100).tolist()
    confusion = np.zeros((100, 100), int)
    np.add.at(confusion, (dataset.test.labels[:20], logits.argmax(1).numpy()), 1)
    assert result["confusion"] == confusion.tolist()
    totals = confusion.sum(1)
    probabilities, predicted = logits.softmax(1).max(1)
    wrong = np.flatnonzero(predicted.numpy() != dataset.test.labels[:20])
    worst = max(wrong, key=lambda row: float(probabilities[row]))
    assert len(result["mistakes"]) == len(wrong)
    assert result["mistakes"][0] == {
        "file": names[worst],
        "label": dataset.classes[dataset.test.labels[worst]],
        "predicted": dataset.classes[predicted[worst]],
        "probability": pytest.approx(float(probabilities[worst]), abs=1e-4),
    }
    assert result["per_class"] == [confusion[row, row] / totals[row] if totals[row] else None for row in range(100)]
    (listed,) = client.get("/evaluate/jobs").json()
    bins = result["reliability"]
    assert sum(each["images"] for each in bins) == result["images"]
    assert sum(each["images"] * each["accuracy"] for each in bins) == pytest.approx(result["images"] * result["top1"])
    assert sum(each["images"] * abs(each["accuracy"] - each["confidence"]) for each in bins) == pytest.approx(
        result["images"] * result["ece"]
    )
    assert listed["result"] == result | {"confusion": None, "mistakes": None, "reliability": None}


def test_bad_zips_are_problems(client: TestClient, image: bytes) -> None:
    def send(content: bytes) -> httpx.Response:
        answer: httpx.Response = client.post("/evaluate", files={"file": content})
        return answer

    assert_problem(send(b"hello"), 422, "zip cannot be read")
    assert_problem(client.post("/evaluate", content=make_zip({})), 415, "(none)")
    assert_problem(
        client.post("/evaluate", content=b"", headers={"Content-Type": "application/zip"}), 415, "send a zip"
    )
    assert_problem(send(make_zip({})), 422, "no images")
    # A few kilobytes of bzip2 or LZMA data can unpack to gigabytes at once, whatever size the entry claims.
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        assert_problem(send(make_zip({"red_disc/1.png": image}, method)), 422, "unsupported method")
    damaged = bytearray(make_zip({"red_disc/1.png": bytes(5000)}, zipfile.ZIP_DEFLATED))
    damaged[45:50] = b"\xff" * 5
    assert_problem(send(bytes(damaged)), 422, "zip cannot be read")
    refusals = 0
    for at in range(20):  # one damaged byte at each of 20 places of the zip directory
        directory = bytearray(make_zip({"red_disc/1.png": image}))
        directory[-70 + 3 * at] ^= 0xFF
        answer = send(bytes(directory))
        if answer.status_code == 200:  # the byte does not matter, such as one of the time of the entry
            assert answer.json()["result"]["images"] == 1
        else:
            refusals += 1
            assert_problem(answer, 413 if "larger" in answer.text or "unpacks" in answer.text else 422, "")
    assert refusals >= 10
    assert_problem(send(make_zip({"sofa/1.png": image})), 422, "'sofa' is not a class")
    assert_problem(send(make_zip({"red_disc/1.zip": make_zip({"red_disc/1.png": image})})), 415, "red_disc/1.zip")
    assert_problem(send(make_zip({"red_disc/1.png": bytes(30_000)})), 413, "red_disc/1.png")
    assert_problem(send(make_zip({f"red_disc/{number}.png": b"" for number in range(101)})), 413, "100 entries")


def test_a_zip_that_takes_long_is_read_in_the_background(
    models: Path, tmp_path: Path, image: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_answer = threading.Event()

    def read_slowly(*args: Any) -> LabeledImages:
        assert has_answer.wait(60)
        return read_zip(*args)

    monkeypatch.setattr(evaluation_runner, "read_zip", read_slowly)
    settings = Settings(models=models, runs=tmp_path / "runs", evaluate_wait_s=0)
    with make_local_client(create_app(settings)) as client:
        for name, state in (("red_disc/1.png", "succeeded"), ("sofa/1.png", "failed")):
            has_answer.clear()
            begun = client.post("/evaluate", files={"file": make_zip({name: image})})
            has_answer.set()
            assert begun.status_code == 202
            while not State((job := client.get(begun.headers["location"]).json())["state"]).finished:
                time.sleep(0.01)
            assert job["state"] == state, job


def test_a_measurement_that_fails_is_a_500_and_known_as_failed(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(Settings(models=models, runs=tmp_path / "runs", data="synthetic:4"))
    with make_local_client(app) as client:
        broken = AsyncMock(side_effect=RuntimeError("the engine is broken"))
        monkeypatch.setattr(app.state.services.pool.live()["resnet"].batcher, "run", broken)
        assert_problem(client.post("/evaluate?limit=4"), 500, "the server's log")
        (job,) = client.get("/evaluate/jobs").json()
        assert (job["state"], job["error"]) == ("failed", "RuntimeError: the engine is broken")


def test_reading_a_zip_ends_when_its_measurement_is_over(image: bytes) -> None:
    over = threading.Event()
    over.set()
    with pytest.raises(Unavailable, match="stopped"):
        read_zip(Settings(), io.BytesIO(make_zip({"apple/1.png": image})), ["apple"], over)


def test_bad_training_requests_are_refused_before_anything_starts(client: TestClient, tmp_path: Path) -> None:
    for body, words in (
        ({"recipe": "vgg"}, "choose one of"),
        ({"recipe": "resnet", "overrides": {"epoch": 1}}, "did you mean epochs"),
        ({"recipe": "resnet", "overrides": {"epochs": 0}}, "epochs"),
        ({"recipe": "resnet18", "overrides": {"weights": "/etc/passwd"}}, "command line"),
        ({"recipe": "resnet", "overrides": {"teacher": "/etc/passwd"}}, "teacher"),
        ({"recipe": "resnet", "overrides": {"teacher": "resnet/99"}}, "teacher: there is no version 99 of resnet"),
        ({"recipe": "resnet", "overrides": {"teacher": "resnet/" + 300 * "1"}}, "teacher"),
        ({"recipe": "resnet", "overrides": {"weights": "resnet/" + 5000 * "1"}}, "weights"),
        ({"recipe": "resnet", "overrides": {"weights": "resnet/99"}}, "weights: there is no version 99 of resnet"),
        ({"recipe": "resnet", "overrides": {"weights": "resnet/1"}}, "width=8, which does not fit width=32"),
        ({"recipe": "resnet", "promote": "maybe"}, "promote"),
        ({"recipe": "resnet", "folder": "x"}, "folder"),
        ({"recipe": "resnet", "overrides": {"epochs": 501}}, "above the limit of this service, 500"),
        ({"recipe": "resnet18", "overrides": {"epochs": 300, "finetune_epochs": 300}}, "total epochs=600"),
        ({"recipe": "resnet", "overrides": {"batch_size": 4096}}, "limit of this service, 1024"),
        ({"recipe": "resnet", "overrides": {"width": 256}}, "limit of this service, 128"),
    ):
        assert_problem(client.post("/train", json=body), 422, words)
    assert client.get("/train").json() == []
    assert not [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]
    for response in (client.get("/train/x"), client.delete("/train/x"), client.get("/train/x/events")):
        assert_problem(response, 404, "no training job 'x'")
    assert_problem(client.get("/train/x/events", headers={"Last-Event-ID": "1" + 20 * "0"}), 422, "last-event-id")


def test_recipes_have_the_fields_of_their_network(client: TestClient) -> None:
    recipes = {recipe["name"]: recipe for recipe in client.get("/train/recipes").json()}
    assert list(recipes) == list(RECIPES)
    assert recipes["resnet-seed"]["model"] == "resnet-seed"
    assert recipes["resnet18"]["fields"]["trainable"] == ["layer4", "fc"]
    assert "width" not in recipes["resnet18"]["fields"]
    assert "image_size" not in recipes["resnet"]["fields"]
    schema = client.get("/openapi.json").json()["components"]["schemas"]["TrainingRequest"]["properties"]["overrides"]
    for recipe in recipes.values():
        assert set(recipe["fields"]) <= set(schema["properties"])


def test_health_and_readiness(client: TestClient) -> None:
    assert client.get("/health/live").json() == {"status": "alive"}
    assert client.get("/health/ready").json() == {"status": "ready"}
    health = client.get("/health").json()
    assert health["status"] == "ready"
    assert health["store"] is None
    assert health["models"]["resnet"]["version"] == 1
    assert health["models"]["resnet"]["engine"].startswith("torchscript")
    for path in ("/", "/docs", "/health", "/health/ready", "/metrics", "/models/resnet", "/train"):
        answer = client.head(path)
        assert answer.status_code == 200, path
        assert int(answer.headers["content-length"]) > 0, path


def test_without_models_the_service_is_alive_but_not_ready(tmp_path: Path, image: bytes) -> None:
    with make_local_client(create_app(Settings(models=tmp_path / "none", runs=tmp_path / "runs"))) as client:
        assert client.get("/health/live").status_code == 200
        assert client.get("/health/ready").status_code == 503
        assert client.get("/models").json() == []
        assert_problem(client.post("/predict", files={"file": image}), 503, "no model is live")
        assert client.get("/health").json()["store"] == str(tmp_path / "none")


def test_a_damaged_version_never_goes_live(client: TestClient, models: Path, image: bytes) -> None:
    card = json.loads((models / "resnet" / "1" / "card.json").read_text())
    damaged = models / "resnet" / "2"
    damaged.mkdir()
    (damaged / "card.json").write_text(json.dumps(card | {"version": 2}))
    (damaged / "model.pt").write_bytes(b"not the file of the card")
    assert_problem(client.put("/models/resnet/live", json={"version": 2}), 503, "sha256")
    assert client.get("/models/resnet").json()["live"] == 1
    LocalStore(models).promote("resnet", 2)  # another process promotes it, without the service
    (models / "resnet" / "live").touch()
    assert client.put("/models/resnet/live", json={"version": 1}).json()["error"] is None
    assert client.post("/predict", files={"file": image}).json()["version"] == 1


def test_after_a_restart_with_a_damaged_live_version_the_last_good_one_is_served(
    client: TestClient, models: Path, tmp_path: Path, image: bytes
) -> None:
    store = second_version(models)
    store.promote("resnet", 2)
    (models / "resnet" / "2" / "model.pt").write_bytes(b"damaged since")
    with make_local_client(create_app(Settings(models=models, runs=tmp_path / "other"))) as restarted:
        assert restarted.get("/health/ready").status_code == 200
        assert "sha256" in restarted.get("/health").json()["errors"]["resnet"]
        summary = restarted.get("/models").json()[0]
        assert (summary["live"], summary["versions"]) == (1, [1, 2])
        assert restarted.post("/predict", files={"file": image}).json()["version"] == 1


LOSSES: dict[str, Callable[[Path], None]] = {
    "store": shutil.rmtree,
    "resnet": lambda models: shutil.rmtree(models / "resnet"),
    "1": lambda models: shutil.rmtree(models / "resnet" / "1"),
    "card.json": lambda models: (models / "resnet" / "1" / "card.json").unlink(),
    "model.pt": lambda models: (models / "resnet" / "1" / "model.pt").unlink(),
    "live": lambda models: (models / "resnet" / "live").unlink(),
}


@pytest.mark.parametrize("lost", LOSSES)
def test_health_names_a_live_version_that_the_store_has_lost(
    client: TestClient, models: Path, published_store: Path, image: bytes, lost: str
) -> None:
    LOSSES[lost](models)
    refresh(client)
    health = client.get("/health").json()
    assert health["errors"]["resnet"].startswith("version 1 is served from memory until the next start: ")
    assert client.get("/health/ready").status_code == 200
    (summary,) = client.get("/models").json()
    assert (summary["live"], summary["error"].startswith("version 1 is served from memory")) == (1, True)
    assert client.get("/models/resnet").json()["live"] == 1
    assert client.post("/predict", files={"file": image}).json()["version"] == 1
    shutil.copytree(published_store, models, dirs_exist_ok=True)
    refresh(client)
    assert client.get("/health").json()["errors"] == {}


def refresh(client: TestClient) -> None:
    """Look for changes of the store, as the service does every second."""
    cast(Any, client).portal.call(cast(FastAPI, client.app).state.services.pool.refresh)


def test_card_of_one_version(client: TestClient, models: Path) -> None:
    second_version(models)
    (_, second) = client.get("/models/resnet").json()["cards"]
    assert client.get("/models/resnet/2").json() == second
    assert client.head("/models/resnet/2").status_code == 200
    for path, words in (("resnet/9", "no version 9 of resnet"), ("vgg/1", "no version 1 of vgg"), ("A/1", "'A'")):
        assert_problem(client.get(f"/models/{path}"), 404, words)
    for version in ("0", "9" * 300):
        assert_problem(client.get(f"/models/resnet/{version}"), 422, "path.version")
    assert_problem(client.get("/models/resnet/live"), 405, "")
    (models / "resnet" / "2" / "card.json").write_text("{")
    assert_problem(client.get("/models/resnet/2"), 503, "damaged")


def test_promotion_and_an_older_version_on_request(client: TestClient, models: Path, image: bytes) -> None:
    second_version(models)
    assert client.get("/models").json() == [{"name": "resnet", "live": 1, "versions": [1, 2], "error": None}]
    assert client.put("/models/resnet/live", json={"version": 2}).json()["live"] == 2
    assert client.post("/predict", files={"file": image}).json()["version"] == 2
    assert (
        client.post("/predict", files={"file": image}, params={"model": "resnet", "version": 1}).json()["version"] == 1
    )
    assert [card["version"] for card in client.get("/models/resnet").json()["cards"]] == [1, 2]


def test_the_predict_route_answers_as_a_plain_fastapi_route(
    models: Path, tmp_path: Path, image: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(app: FastAPI) -> list[tuple[int, dict[str, str], dict[str, Any]]]:
        requests: list[dict[str, Any]] = [
            {"files": [("file", ("cat.png", image)), ("file", ("dog.png", image))]},
            {"content": image, "headers": {"content-type": "image/png"}},
            {"content": image, "headers": {"content-type": "image/png"}, "params": {"top_k": 2, "model": "resnet"}},
            {"content": image, "headers": {"content-type": "image/png"}, "params": {"top_k": 0}},
            {"content": b"GIF89a", "headers": {"content-type": "image/gif"}},
            {"content": image},
        ]
        told = []
        with make_local_client(app) as client:
            for request in requests:
                response = client.post("/predict", **request)
                body, headers = response.json(), response.headers
                for changing in ("x-request-id", "content-length"):
                    del headers[changing]
                body.pop("milliseconds", None)
                told.append((response.status_code, dict(headers), body))
        return told

    settings = Settings(models=models, runs=tmp_path / "runs")
    app = create_app(settings)
    plain = APIRouter()
    plain.add_api_route("/predict", predict_route.predict, methods=["POST"])
    monkeypatch.setattr(predict_route, "router", plain)
    assert answers(app) == answers(create_app(settings))


def test_limits_hold_for_what_is_decoded_with_its_batch(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch decodes small images itself. On a machine with one processor it also decodes larger ones."""
    sizes = {96: 200, 400: 413}
    for side, status in sizes.items():
        buffer = io.BytesIO()
        Image.new("RGB", (side, side)).save(buffer, "PNG")
        in_a_thread = client.post("/predict", files={"file": buffer.getvalue()})
        with monkeypatch.context() as one_processor:
            decoders = cast(FastAPI, client.app).state.services.decoders
            one_processor.setattr(decoders, "small_bytes", 20_000)
            one_processor.setattr(decoders, "small_pixels", 10_000)
            with_its_batch = client.post("/predict", files={"file": buffer.getvalue()})
        assert in_a_thread.status_code == with_its_batch.status_code == status
        if status == 200:
            assert in_a_thread.json()["predictions"] == with_its_batch.json()["predictions"]


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_what_may_grow_a_thousandfold_does_not_keep_a_batch_waiting(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, kind: bytes
) -> None:
    buffer = io.BytesIO()
    text = PngInfo()
    text.add_text("a", 100_000 * "b", zip=True)
    profile = {"icc_profile": bytes(100_000)} if kind == b"iCCP" else {"pnginfo": text}
    Image.new("RGB", (32, 32)).save(buffer, "PNG", **profile)
    assert kind in buffer.getvalue()
    assert len(buffer.getvalue()) < 1000
    threads = set()
    decode = encoded.EncodedImage.decode

    def noted(image: encoded.EncodedImage) -> Any:
        threads.add(threading.current_thread().name.partition("_")[0])
        return decode(image)

    monkeypatch.setattr(encoded.EncodedImage, "decode", noted)
    assert client.post("/predict", files={"file": buffer.getvalue()}).status_code == 200
    assert threads == {"decoder"}


def test_metrics_count_requests(client: TestClient, image: bytes) -> None:
    client.post("/predict", files={"file": image})
    client.post("/predict", content=b"x")
    text = client.get("/metrics").text
    assert 'cifar100_requests_total{method="POST",route="/predict",status="200"} 1.0' in text
    assert 'cifar100_requests_total{method="POST",route="/predict",status="415"} 1.0' in text
    assert 'cifar100_live_version{model="resnet"} 1.0' in text
    assert 'cifar100_batch_images_bucket{le="1.0",model="resnet"} 1.0' in text
    assert 'cifar100_batch_seconds_count{model="resnet"} 1.0' in text


def test_the_page_and_its_files_are_served(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["cache-control"] == "no-cache"
    for file in ("/static/main.js", "/static/style.css", "/static/icon.svg"):
        assert file in page.text
        answer = client.get(file)
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "no-cache"
        assert client.get(file, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    assert client.get("/static/../main.py").status_code == 404


def crafted_zip(*entries: tuple[str, bytes, int | None]) -> bytes:
    """Build a zip whose directory may give wrong offsets.

    Args:
        entries: Name, content and offset of each entry. The directory gives this offset, or the true one for None.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content, _ in entries:
            archive.writestr(name, content)
        for entry, (_, _, offset) in zip(archive.filelist, entries, strict=True):
            entry.header_offset = entry.header_offset if offset is None else offset
    return buffer.getvalue()


def test_zip_entries_that_share_bytes_are_refused_before_anything_is_decoded(
    client: TestClient, image: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send(content: bytes) -> httpx.Response:
        return cast(httpx.Response, client.post("/evaluate", files={"file": content}))

    name = "red_disc/1.png"
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as archive:
        archive.writestr(name, image)
        archive.filelist *= 50  # the directory names one entry fifty times
    # The data of one entry contain another entry: the image file ends with a zip entry.
    inner = make_zip({name: image})
    other = "red_disc/2.png"
    nested = crafted_zip((name, inner, None), (other, image, 30 + len(name)))
    first = crafted_zip((name, image, None), (other, image, 0))
    longer = bytearray(make_zip({name: image, other: image}))
    directory = longer.index(b"PK\x01\x02")
    for field in (20, 24):  # positions of the first entry's sizes in the directory
        longer[directory + field : directory + field + 4] = (2 * len(image)).to_bytes(4, "little")
    whole = bytearray(make_zip({name: image}))  # its data will overlap the directory
    directory = whole.index(b"PK\x01\x02")
    for field in (20, 24):
        whole[directory + field : directory + field + 4] = (len(image) + 40).to_bytes(4, "little")
    decoded = AsyncMock()
    monkeypatch.setattr("app.inference.images.encoded.decode", decoded)
    for content in (twice.getvalue(), nested, first, bytes(longer), bytes(whole)):
        assert_problem(send(content), 422, "overlap")
    for offset in (10**6, 2**31, 3):
        assert_problem(send(crafted_zip((name, image, offset))), 422, "zip cannot be read")
    assert not decoded.called


def test_zip_behind_other_bytes_and_of_every_usual_form_is_measured(client: TestClient, image: bytes) -> None:
    files = {"photos/": b"", "red_disc/1.png": image, "red_disc/.DS_Store": b"x", "red_disc/2.png": image}
    streamed = io.BytesIO()
    with zipfile.ZipFile(cast(Any, Unseekable(streamed)), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)  # an unseekable stream gets the sizes after the data
    for content in (b"#!/bin/sh\n" + make_zip(files), make_zip(files, zipfile.ZIP_DEFLATED), streamed.getvalue()):
        measured = client.post("/evaluate", files={"file": content})
        assert measured.status_code == 200, measured.text
        assert measured.json()["result"]["images"] == 2


def test_files_that_systems_add_to_a_zip_are_skipped(client: TestClient, image: bytes) -> None:
    added = ["Thumbs.db", "ehthumbs.db", "desktop.ini", "Desktop.ini", ".DS_Store", "._1.png", ".directory", "Icon\r"]
    files = {f"{folder}{name}": b"x" for folder in ("", "photos/", "photos/red_disc/") for name in added}
    folders = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", ".Trashes", "photos/__MACOSX")
    files |= {f"{folder}/red_disc/1.png": b"x" for folder in folders}
    files |= {"photos/red_disc/1.png": image, "./red_disc/2.png": image, "red_disc\\3.png": image, "red_disc\\": b""}
    measured = client.post("/evaluate", files={"file": make_zip(files)})
    assert measured.status_code == 200, measured.text
    assert measured.json()["result"]["images"] == 3
    for name in ("red_disc/notes.txt", "red_disc/thumbs.png"):
        assert_problem(client.post("/evaluate", files={"file": make_zip({name: b"x"})}), 415, name)


class Unseekable:
    """A write-only stream that cannot seek."""

    def __init__(self, buffer: io.BytesIO):
        self._buffer = buffer

    def write(self, content: bytes) -> int:
        return self._buffer.write(content)

    def flush(self) -> None:
        pass


CARD_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "fewer classes than logits": ({"classes": 10}, "names 10 classes"),
    "superclasses of other classes": ({"superclasses": 10}, "superclasses has 10 entries for 100 classes"),
    "no classes": ({"classes": 0}, "classes is empty"),
    "a class twice": ({"classes": ["red_disc"] * 100}, "names 'red_disc' twice"),
    "an accuracy that is no number": ({"top1": float("nan")}, "top1"),
    "an accuracy above 1": ({"top1": 81.9}, "top1"),
    "the name of another model": ({"name": "resnet18"}, "card of resnet18"),
    "the number of another version": ({"version": 9}, "version 9"),
}


def spoil(card: Path, changes: dict[str, Any]) -> None:
    content = json.loads(card.read_text())
    for field, value in changes.items():
        if field == "top1":
            content["test"][field] = value
        elif isinstance(value, int) and isinstance(content[field], list):
            content[field] = content[field][:value]
            if field == "classes":
                content["superclasses"] = content["superclasses"][:value]
                content["test"]["per_class"] = content["test"]["per_class"][:value]
        else:
            content[field] = value
    card.write_text(json.dumps(content))


@pytest.mark.parametrize("fault", CARD_FAULTS)
def test_card_that_does_not_fit_its_model_is_refused_and_the_last_good_version_stays(
    fault: str, models: Path, tmp_path: Path, image: bytes
) -> None:
    changes, words = CARD_FAULTS[fault]
    store = second_version(models)
    spoil(models / "resnet" / "2" / "card.json", changes)
    app = create_app(Settings(models=models, runs=tmp_path / "runs", data="synthetic:4", store_poll_s=0.01))
    with make_local_client(app) as client:
        assert_problem(client.put("/models/resnet/live", json={"version": 2}), 503, words)
        store.promote("resnet", 2)  # another process promotes it
        end = time.monotonic() + 60
        while not (errors := client.get("/health").json()["errors"]):
            assert time.monotonic() < end
        assert words in errors["resnet"]
        for path in ("/models", "/models/resnet", "/evaluate"):
            assert client.get(path).status_code == 200
        answer = client.post("/predict", files={"file": image})
        assert (answer.status_code, answer.json()["version"]) == (200, 1)
    with make_local_client(create_app(Settings(models=models, runs=tmp_path / "runs", data="synthetic:4"))) as client:
        assert words in client.get("/health").json()["errors"]["resnet"]
        assert client.post("/predict", files={"file": image}).json()["version"] == 1  # the best loadable version


def test_model_whose_logits_are_not_finite_is_refused(models: Path, tmp_path: Path, image: bytes) -> None:
    class Overflowing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float().mean((1, 2, 3))[:, None].expand(-1, 100) / 0

    store = LocalStore(models)
    with store.draft("resnet") as draft:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated
            torch.jit.trace(Overflowing().eval(), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).save(draft / "model.pt")
        store.publish(draft, store.card("resnet", 1))
    with make_local_client(create_app(Settings(models=models, runs=tmp_path / "runs", data="synthetic:4"))) as client:
        assert_problem(client.put("/models/resnet/live", json={"version": 2}), 503, "not finite")
        assert client.post("/predict", files={"file": image}).json()["version"] == 1
