"""Test /v2 on a real server with the public client of Triton, unmodified."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from server import Server

from training.dataset import Dataset

triton = pytest.importorskip("tritonclient.http")
pytestmark = pytest.mark.slow

Client = Any
OUTPUTS = ["logits", "probabilities", "labels"]


@pytest.fixture(scope="module")
def address(published_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("service")
    with Server(published_store, folder / "runs", folder / "log") as server:
        yield str(server.address)


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    client = triton.InferenceServerClient(address.removeprefix("http://"))
    yield client
    client.close()


@pytest.fixture(scope="module")
def pixels(dataset: Dataset) -> NDArray[np.uint8]:
    return np.ascontiguousarray(dataset.test.images[:3].transpose(0, 3, 1, 2))


@pytest.fixture(scope="module")
def files(dataset: Dataset) -> NDArray[np.object_]:
    """The same images as PNG files."""
    contents = []
    for image in dataset.test.images[:3]:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        contents.append(buffer.getvalue())
    return np.array(contents, np.object_)


def make_input(name: str, values: Any, binary: bool = True) -> Any:
    tensor = triton.InferInput(name, values.shape, {"pixels": "UINT8", "image": "BYTES"}[name])
    return tensor.set_data_from_numpy(values, binary_data=binary)


def test_triton_client_reads_health_and_metadata(client: Client) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("resnet")
    assert client.is_model_ready("resnet", "1")
    assert not client.is_model_ready("resnet", "9")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data", "statistics"]
    metadata = client.get_model_metadata("resnet", "1")
    assert (metadata["name"], metadata["versions"]) == ("resnet", ["1"])
    assert [(each["name"], each["datatype"], each["shape"]) for each in metadata["inputs"]] == [
        ("pixels", "UINT8", [-1, 3, 32, 32]),
        ("image", "BYTES", [-1]),
    ]
    assert [each["name"] for each in metadata["outputs"]] == OUTPUTS
    with pytest.raises(triton.InferenceServerException, match="there is no version 9 of resnet") as raised:
        client.get_model_metadata("resnet", "9")
    assert raised.value.status() == "404"


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_triton_client_gets_the_answers_of_predict(
    client: Client,
    address: str,
    pixels: NDArray[np.uint8],
    files: NDArray[np.object_],
    dataset: Dataset,
    compression: str | None,
) -> None:
    form = [("file", ("a.png", content)) for content in files]
    answer = httpx.post(f"{address}/predict?top_k=100", files=form).json()
    expected = np.zeros((3, 100))
    for row, prediction in zip(expected, answer["predictions"], strict=True):
        row[[each["class_id"] for each in prediction["classes"]]] = [
            each["probability"] for each in prediction["classes"]
        ]
    codings = {"request_compression_algorithm": compression, "response_compression_algorithm": compression}
    json_output = [triton.InferRequestedOutput(name, binary_data=False) for name in OUTPUTS]
    requests = [
        ([make_input("pixels", pixels)], None),
        ([make_input("pixels", pixels, binary=False)], json_output),
        ([make_input("image", files)], None),
        ([make_input("image", files[:, None])], [triton.InferRequestedOutput(name) for name in reversed(OUTPUTS)]),
    ]
    for inputs, outputs in requests:
        result = client.infer("resnet", inputs, "1", outputs, request_id="seven", **codings)
        assert np.allclose(result.as_numpy("probabilities"), expected, atol=1e-6)
        logits = result.as_numpy("logits")
        assert logits.shape == (3, 100)
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        assert np.allclose(exponentials / exponentials.sum(1, keepdims=True), expected, atol=1e-6)
        labels = [each.decode() if isinstance(each, bytes) else each for each in result.as_numpy("labels")]
        assert labels == [dataset.classes[each] for each in expected.argmax(1)]
        response = result.get_response()
        assert (response["model_name"], response["model_version"], response["id"]) == ("resnet", "1", "seven")
        names = [each["name"] for each in response["outputs"]]
        assert names == (OUTPUTS[::-1] if outputs and outputs is not json_output else OUTPUTS)


def test_a_single_output_comes_alone(client: Client, pixels: NDArray[np.uint8]) -> None:
    result = client.infer("resnet", [make_input("pixels", pixels)], outputs=[triton.InferRequestedOutput("labels")])
    assert result.as_numpy("labels").shape == (3,)
    assert result.as_numpy("logits") is None


def test_triton_client_reads_the_reason_of_every_refusal(client: Client, pixels: NDArray[np.uint8]) -> None:
    many = np.repeat(pixels, 11, 0)
    damaged = np.array([b"\x89PNG", b"text"], np.object_)
    refusals: list[tuple[str, list[Any], dict[str, Any], str, str]] = [
        ("other", [make_input("pixels", pixels)], {}, "404", "no live model 'other'"),
        ("resnet", [make_input("pixels", many)], {}, "400", "pixels has 33 images; the limit is 32"),
        ("resnet", [make_input("pixels", pixels)] * 2, {}, "422", "at most 1 item"),
        ("resnet", [make_input("pixels", pixels[:, :1])], {}, "422", "must be [N, 3, 32, 32]"),
        ("resnet", [make_input("image", damaged)], {}, "422", "image[0]: the PNG image"),
        ("resnet", [make_input("pixels", pixels)], {"priority": 1}, "422", "parameters.priority"),
    ]
    for name, inputs, options, status, words in refusals:
        with pytest.raises(triton.InferenceServerException) as raised:
            client.infer(name, inputs, **options)
        assert (raised.value.status(), words in raised.value.message()) == (status, True), raised.value
    with pytest.raises(triton.InferenceServerException, match="Content-Encoding 'br' is not supported"):
        client.infer("resnet", [make_input("pixels", pixels)], headers={"Content-Encoding": "br"})


def test_statistics_count_requests_images_and_batches(client: Client, pixels: NDArray[np.uint8]) -> None:
    def read() -> dict[str, Any]:
        (stats,) = client.get_inference_statistics("resnet", "1")["model_stats"]
        assert stats == client.get_inference_statistics("resnet")["model_stats"][0]
        assert stats == client.get_inference_statistics()["model_stats"][0]
        return dict(stats)

    before = read()
    for _ in range(2):
        client.infer("resnet", [make_input("pixels", pixels)])
    with pytest.raises(triton.InferenceServerException):
        client.infer("resnet", [make_input("image", np.array([b"text"], np.object_))])
    after = read()
    assert (after["name"], after["version"]) == ("resnet", "1")
    assert after["inference_count"] - before["inference_count"] == 6
    assert after["execution_count"] - before["execution_count"] == 2
    assert after["last_inference"] > 1.7e12
    counts = {
        name: each["count"] - before["inference_stats"][name]["count"]
        for name, each in after["inference_stats"].items()
    }
    assert counts == {
        "success": 2, "fail": 1, "queue": 2, "compute_input": 2, "compute_infer": 2,
        "compute_output": 0, "cache_hit": 0, "cache_miss": 0,
    }  # fmt: skip
    spent = {
        name: each["ns"] - before["inference_stats"][name]["ns"] for name, each in after["inference_stats"].items()
    }
    assert 0 < spent["compute_infer"] < spent["success"]
    (of_three,) = [each for each in after["batch_stats"] if each["batch_size"] == 3]
    assert of_three["compute_infer"]["count"] >= 2
