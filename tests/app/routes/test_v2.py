"""Test /v2 in process: access, limits, refusals in the form of the protocol, and the cost of hostile JSON."""

import base64
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import pytest
from api import encode_png
from fastapi import FastAPI
from fastapi.testclient import TestClient
from local_client import make_local_client

from app.main import create_app
from app.routes import tensors
from app.settings import Settings
from training.dataset import Dataset

KEY = "a-key-of-sixteen-characters"
INFER = "/v2/models/resnet/infer"
ONE = [1, 3, 32, 32]
BLACK = {"name": "pixels", "datatype": "UINT8", "shape": ONE, "data": [0] * 3072}


@pytest.fixture(scope="module")
def client(published_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    settings = Settings(models=published_store, runs=tmp_path_factory.mktemp("runs"), max_predict_bytes=2 << 20)
    with make_local_client(create_app(settings)) as client:
        yield client


def infer(client: TestClient, *inputs: dict[str, Any], **more: Any) -> httpx.Response:
    response: httpx.Response = client.post(INFER, json={"inputs": list(inputs), **more})
    return response


def assert_error(response: httpx.Response, status: int, words: str) -> None:
    assert response.status_code == status, response.text[:1000]
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert words in body["error"], body["error"]
    assert (body["detail"], body["status"]) == (body["error"], status)


def test_json_answers_are_those_of_predict(client: TestClient, dataset: Dataset) -> None:
    content = encode_png(dataset, 0)
    text = base64.b64encode(content).decode()
    best = client.post("/predict", files={"file": content}).json()["predictions"][0]["classes"][0]
    for shape, data in (([1], [text]), ([1, 1], [[text]])):
        tensor = {"name": "image", "datatype": "BYTES", "shape": shape, "data": data}
        logits, probabilities, labels = infer(client, tensor, model_name="resnet", id="7").json()["outputs"]
        assert (logits["shape"], labels["data"]) == ([1, 100], [best["label"]])
        assert probabilities["data"][best["class_id"]] == pytest.approx(best["probability"])
    pixels = dataset.test.images[0].transpose(2, 0, 1)[None]
    for data in (pixels.tolist(), pixels.ravel().tolist()):
        tensor = {"name": "pixels", "datatype": "UINT8", "shape": ONE, "data": data}
        (output,) = infer(client, tensor, outputs=[{"name": "labels"}]).json()["outputs"]
        assert output["data"] == [best["label"]]


def test_binary_data_follow_the_json_in_the_order_of_the_outputs(client: TestClient) -> None:
    names = [{"name": "labels"}, {"name": "logits", "parameters": {"binary_data": False}}, {"name": "probabilities"}]
    response = infer(client, BLACK, outputs=names, parameters={"binary_data_output": True})
    assert response.headers["content-type"] == "application/octet-stream"
    length = int(response.headers[tensors.JSON_LENGTH])
    labels, logits, probabilities = json.loads(response.content[:length])["outputs"]
    size = labels["parameters"]["binary_data_size"]
    assert "parameters" not in logits
    assert struct.unpack_from("<I", response.content, length) == (size - 4,)
    values = np.frombuffer(response.content[length + size :], "<f4")
    assert len(values) * 4 == probabilities["parameters"]["binary_data_size"]
    assert values.sum() == pytest.approx(1)


@pytest.mark.parametrize("accepted", ["gzip", "br, deflate", "gzip;q=0, deflate", "identity", "gzip;q=0"])
def test_responses_are_compressed_as_the_client_accepts(client: TestClient, accepted: str) -> None:
    response = client.post(INFER, json={"inputs": [BLACK]}, headers={"Accept-Encoding": accepted})
    expected = {"gzip": "gzip", "br, deflate": "deflate", "gzip;q=0, deflate": "deflate"}.get(accepted)
    assert response.headers.get("content-encoding") == expected
    assert response.headers["vary"] == "Accept-Encoding"
    assert len(response.json()["outputs"]) == 3


PNG = {"name": "image", "datatype": "BYTES", "shape": [1]}


@pytest.mark.parametrize(
    ("inputs", "status", "words"),
    [
        ([], 422, "at least 1 item"),
        ([BLACK, BLACK], 422, "at most 1 item"),
        ([BLACK | {"name": "pixel"}], 422, "inputs.0.name"),
        ([BLACK | {"datatype": "FP32"}], 422, "the datatype of pixels is 'FP32'; it must be UINT8"),
        ([BLACK | {"shape": [1, 32, 32, 3]}], 422, "the shape of pixels is '[1, 32, 32, 3]'"),
        ([BLACK | {"shape": [-1, 3, 32, 32]}], 422, "with N above 0"),
        ([BLACK | {"shape": [33, 3, 32, 32]}], 400, "pixels has 33 images; the limit is 32"),
        ([BLACK | {"data": [0] * 3071}], 422, "pixels has 3,071 elements"),
        ([BLACK | {"data": [256] * 3072}], 422, "not in 0 to 255"),
        ([BLACK | {"data": [-1] * 3072}], 422, "not in 0 to 255"),
        ([BLACK | {"data": [0.5] * 3072}], 422, "must be a list of integers"),
        ([BLACK | {"data": [True] * 3072}], 422, "must be a list of integers"),
        ([BLACK | {"data": "0"}], 422, "must be a list of integers"),
        ([BLACK | {"parameters": {"shared_memory_region": "a"}}], 422, "shared_memory_region"),
        ([BLACK | {"parameters": {"binary_data_size": 1}}], 422, "either data or the parameter binary_data_size"),
        ([PNG], 422, "either data or the parameter binary_data_size"),
        ([PNG | {"data": ["?"]}], 422, "element 0 of image is not base64"),
        ([PNG | {"data": ["ä"]}], 422, "element 0 of image is not base64"),
        ([PNG | {"data": ["YQ==", "YQ=="]}], 422, "image has 2 elements"),
        ([PNG | {"data": ["YQ=="]}], 415, "not a supported image"),
    ],
)
def test_invalid_inputs_are_named(client: TestClient, inputs: list[dict[str, Any]], status: int, words: str) -> None:
    assert_error(infer(client, *inputs), status, words)


@pytest.mark.parametrize(
    ("binary", "declared", "words"),
    [
        (b"", 1, "0 bytes follow the JSON, but image declares 1"),
        (b"ab", 2, "end within element 0 of 1"),
        (struct.pack("<I", 9) + b"a", 5, "end within element 0 of 1"),
        (struct.pack("<I", 0xFFFFFFFF) + b"a", 5, "end within element 0 of 1"),
        (struct.pack("<I", 1) + b"abc", 7, "2 bytes follow the last element"),
    ],
)
def test_binary_data_that_do_not_fit_are_400(client: TestClient, binary: bytes, declared: int, words: str) -> None:
    head = json.dumps({"inputs": [PNG | {"parameters": {"binary_data_size": declared}}]}).encode()
    response = client.post(INFER, content=head + binary, headers={tensors.JSON_LENGTH: str(len(head))})
    assert_error(response, 400, words)


def test_a_wrong_length_of_the_json_is_named(client: TestClient) -> None:
    for length in ("9999", "-1", "x"):
        assert_error(client.post(INFER, content=b"{}", headers={tensors.JSON_LENGTH: length}), 400, "give the length")
    assert_error(client.post(INFER, content=b"{}", headers={tensors.JSON_LENGTH: "1"}), 422, "the body is not JSON")


def test_every_refusal_has_the_member_error(client: TestClient) -> None:
    assert_error(client.get("/v2/models/other"), 404, "no live model 'other'")
    assert_error(client.get("/v2/models/resnet/versions/7/stats"), 404, "there is no version 7 of resnet")
    assert_error(client.post("/v2/models/resnet/versions/7/infer", json={"inputs": [BLACK]}), 404, "version 7")
    assert_error(client.get("/v2/other"), 404, "there is no path")
    assert_error(client.get(INFER), 405, "use POST")
    assert_error(client.post(f"{INFER}?a=1", json={"inputs": [BLACK]}), 422, "there is no such parameter")
    assert_error(infer(client, BLACK, model_name="other"), 422, "the URL names the model 'resnet'")
    assert_error(infer(client, BLACK, parameters={"sequence_id": 1}), 422, "sequence_id")
    assert_error(client.post(INFER, content=bytes(3 << 20)), 413, "the request body is larger")
    assert_error(client.post(INFER, content=bytes((1 << 20) + 1)), 413, "send large tensors as binary data")
    assert_error(client.post(INFER, content=b"a", headers={"Content-Encoding": "br"}), 415, "'br' is not supported")
    assert client.get("/v3").headers["content-type"] == "application/problem+json"


def test_hostile_json_is_refused_without_a_list_of_its_faults(client: TestClient) -> None:
    """Each of these bodies of 1 MiB took seconds when all faults were listed."""
    fields = "{" + ",".join(f'"{number:x}":1' for number in range(100_000)) + "}"
    assert_error(client.post(INFER, content=fields), 422, "the JSON has 100,001 faults")
    for body in (
        '{"inputs":[' + "{}," * 300_000 + "{}]}",
        '{"inputs":[],"outputs":[' + "1," * 500_000 + "1]}",
    ):
        response = client.post(INFER, content=body)
        assert response.status_code == 422
        assert len(response.json()["errors"]) <= 4
    deep = '{"inputs":' + "[" * 400_000 + "]" * 400_000 + "}"
    assert_error(client.post(INFER, content=deep), 422, "the body is not JSON")


def test_keys_and_rate_limits_are_those_of_predict(published_store: Path, tmp_path: Path, dataset: Dataset) -> None:
    settings = Settings.model_validate(
        {
            "models": published_store,
            "runs": tmp_path,
            "api_keys": KEY,
            "predict_needs_key": True,
            "predict_rate_limit": "2/hour",
        }
    )
    with make_local_client(create_app(settings)) as client:
        assert_error(infer(client, BLACK), 401, "needs an API key")
        client.headers["Authorization"] = f"Bearer {KEY}"
        assert infer(client, BLACK).status_code == 200
        form = {"file": encode_png(dataset, 0)}
        assert client.post("/predict", files=form).status_code == 200
        assert_error(infer(client, BLACK), 429, "more than 2 per 1 hour predictions")
        assert client.get("/v2/models/resnet").status_code == 200


def test_a_full_queue_refuses_before_the_body_is_read(client: TestClient) -> None:
    services = cast(FastAPI, client.app).state.services
    batcher = services.pool.live()["resnet"].batcher
    shedder = services.shedder
    batcher.queued = batcher.max_queue
    try:
        assert shedder.should_shed(b"/v2/models/resnet/infer", "127.0.0.1")
        assert shedder.should_shed(b"/ml/v2/models/resnet/infer", "127.0.0.1")
        assert not shedder.should_shed(b"/v2/models/other/infer", "127.0.0.1")
        assert not shedder.should_shed(b"/v2/models/resnet/versions/1/infer", "127.0.0.1")  # has its own queue
    finally:
        batcher.queued = 0
    refused = 'cifar100_requests_total{method="POST",route="/v2/models/{name}/infer",status="503"} 2.0'
    assert refused in client.get("/metrics").text


def test_a_timeout_shortens_the_deadline(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    deadlines: list[float] = []
    batcher = cast(FastAPI, client.app).state.services.pool.live()["resnet"].batcher
    run = batcher.run

    async def record(images: Any, deadline: float) -> Any:
        deadlines.append(deadline)
        return await run(images)

    monkeypatch.setattr(batcher, "run", record)
    for parameters in ({}, {"timeout": 1_000_000}, {"timeout": 10**12}):
        assert infer(client, BLACK, parameters=parameters).status_code == 200
    usual, short, long = deadlines
    assert short < usual
    assert long >= usual


def test_the_openapi_document_describes_both_kinds_of_bodies(client: TestClient) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/v2/models/{name}/infer"]["post"]
    assert operation["requestBody"]["content"].keys() == {"application/json", "application/octet-stream"}
    assert operation["responses"]["200"]["content"].keys() == {"application/json", "application/octet-stream"}
    assert "error" in operation["responses"]["4XX"]["content"]["application/json"]["schema"]["properties"]
