"""Test that parameters are never ignored: unknown names, and names with two values, are 422 with a suggestion."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api import assert_problem, make_zip
from fastapi.testclient import TestClient
from local_client import make_local_client

from app.main import create_app
from app.settings import Settings


@pytest.fixture(scope="module")
def client(published_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    runs = tmp_path_factory.mktemp("runs")
    settings = Settings(models=published_store, runs=runs, data="synthetic:4", operator_rate_limit=None)
    with make_local_client(create_app(settings)) as client:
        yield client


def test_every_operation_refuses_an_unknown_query_parameter(client: TestClient) -> None:
    operations = [
        (method, path)
        for path, methods in client.get("/openapi.json").json()["paths"].items()
        for method in methods
        if path != "/metrics"
    ]
    assert len(operations) >= 19
    streams = [path for _, path in operations if path.endswith(("/events", "/zip"))]
    operations += [("head", path) for method, path in operations if method == "get" and path not in streams]
    for method, path in operations:
        url = re.sub(r"{\w+}", "1", path)
        refused = client.request(method, f"{url}?surplus=1", json={} if method in ("put", "post") else None)
        assert refused.status_code == 422, (method, path)
        words = "query.surplus: there is no such parameter"
        if path.startswith("/v2"):
            assert method == "head" or words in refused.json()["error"]
        elif method != "head":
            assert_problem(refused, 422, words)


def test_pages_files_and_metrics_take_any_query(client: TestClient) -> None:
    for path in ("/", "/docs", "/openapi.json", "/static/main.js", "/metrics"):
        for method in ("GET", "HEAD"):
            assert client.request(method, f"{path}?surplus=1").status_code == 200, path


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        ("POST /predict?topk=1", "query.topk: there is no such parameter; did you mean top_k?"),
        ("POST /predict?topK=1", "did you mean top_k?"),
        ("POST /predict?TOP-K=1", "did you mean top_k?"),
        ("POST /predict?top_k[]=1", "did you mean top_k?"),
        ("POST /predict?modell=resnet", "did you mean model?"),
        ("POST /predict?Version=1", "did you mean version?"),
        ("POST /predict?k=1", "the parameters are model, version, top_k"),
        ("POST /predict?=1", "the parameters are"),
        ("POST /evaluate?limt=10", "did you mean limit?"),
        ("POST /evaluate?Split=train", "did you mean split?"),
        ("GET /evaluate?model=resnet", "query.model: there is no such parameter; this call has none"),
        ("GET /evaluate/jobs?limits=1", "did you mean limit?"),
        ("GET /train?Limit=1", "did you mean limit?"),
        ("GET /health?verbose", "this call has none"),
        ("DELETE /train/1?force=true", "this call has none"),
    ],
)
def test_unknown_query_parameter_is_named_with_a_suggestion(
    client: TestClient, image: bytes, call: str, hint: str
) -> None:
    method, _, url = call.partition(" ")
    body = {"files": {"file": image}} if url.startswith("/predict") else {}
    assert_problem(client.request(method, url, **body), 422, hint)


def test_parameter_with_two_values_is_refused(client: TestClient, image: bytes) -> None:
    for url in ("/predict?top_k=1&top_k=2", "/predict?model=a&model=b", "/predict?version=1&version=2"):
        assert_problem(client.post(url, files={"file": image}), 422, "the parameter has two values")
    assert_problem(client.get("/train?limit=1&limit=2"), 422, "query.limit: the parameter has two values, '1' and '2'")
    assert client.post("/predict?top_k=1&top_k=1", files={"file": image}).status_code == 200
    assert client.get("/train?limit=1&limit=1").status_code == 200


def test_thousands_of_unknown_parameters_are_refused_in_few_words(client: TestClient, image: bytes) -> None:
    query = "&".join(f"topk{number}=1" for number in range(5000))
    refused = client.post(f"/predict?{query}", files={"file": image})
    assert_problem(refused, 422, "did you mean top_k?")
    assert len(refused.json()["errors"]) == 10
    assert len(refused.content) < 4000


def test_form_fields_work_as_the_query(client: TestClient, image: bytes) -> None:
    def send(fields: dict[str, Any], url: str = "/predict") -> Any:
        return client.post(url, data=fields, files={"file": image})

    fields = {"model": "resnet", "version": "1", "top_k": "3"}
    answer = send(fields).json()
    assert (answer["model"], answer["version"]) == ("resnet", 1)
    assert answer["predictions"] == send({}, "/predict?model=resnet&version=1&top_k=3").json()["predictions"]
    assert len(answer["predictions"][0]["classes"]) == 3
    assert send({"top_k": "3"}, "/predict?model=resnet").json()["predictions"] == answer["predictions"]
    assert send({"top_k": "3"}, "/predict?top_k=3").json()["predictions"] == answer["predictions"]
    assert send({"top_k": ["3", "3"]}).json()["predictions"] == answer["predictions"]
    assert send({"model": "", "version": "", "top_k": "3"}).json()["predictions"] == answer["predictions"]
    assert_problem(send({"model": "vgg"}), 404, "vgg")
    assert_problem(send({"top_k": "0"}), 422, "form.top_k: '0' is too small; give at least 1")
    assert_problem(send({"top_k": "x"}), 422, "form.top_k: 'x' is not a whole number; give one such as 5")
    assert_problem(send({"top_k": "1"}, "/predict?top_k=2"), 422, "form.top_k: the parameter has two values, '2' and")
    assert_problem(send({"top_k": ["1", "2"]}), 422, "form.top_k: the parameter has two values, '1' and '2'")
    assert_problem(send({"modell": "resnet"}), 422, "form.modell: there is no such parameter; did you mean model?")
    assert_problem(send({"topk": "1", "verson": "1"}), 422, "did you mean version?")
    files = {"file": image, "model": b"resnet"}
    assert_problem(client.post("/predict", files=files), 422, "a file in the field 'model'")


def test_evaluations_of_a_zip_take_form_fields(client: TestClient, image: bytes) -> None:
    archive = make_zip({"red_disc/1.png": image})

    def send(fields: dict[str, Any], url: str = "/evaluate") -> Any:
        return client.post(url, data=fields, files={"file": archive})

    answer = send({"model": "resnet", "version": "1"}).json()
    assert (answer["model"], answer["version"], answer["split"]) == ("resnet", 1, "zip")
    assert_problem(send({"model": "vgg"}), 404, "vgg")
    assert_problem(send({"modell": "resnet"}), 422, "form.modell: there is no such parameter; did you mean model?")
    assert_problem(send({"model": "resnet"}, "/evaluate?model=vgg"), 422, "two values")
    for fields, url in (({"limit": "1"}, "/evaluate"), ({}, "/evaluate?limit=1"), ({}, "/evaluate?split=test")):
        assert_problem(send(fields, url), 422, "apply to the data set only; a zip is measured whole")


def test_body_without_a_form_that_an_evaluation_would_ignore_is_refused(client: TestClient) -> None:
    for headers in ({}, {"Content-Type": "application/x-www-form-urlencoded"}):
        for content in (b"limit=10", iter([b"limit", b"=10"])):  # an iterator is sent in chunks
            assert_problem(client.post("/evaluate", content=content, headers=headers), 415, "send a zip as multipart")
        assert client.post("/evaluate?limit=4", headers=headers).json()["result"]["images"] == 4


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"recip": "resnet"}', "body.recip: there is no such field; did you mean recipe?"),
        ('{"recipe": "resnet", "epochs": 3}', "body.epochs: there is no such field; the fields are recipe, overrides"),
        ('{"recipe": "resnet", "recipe": "resnet18"}', "the field 'recipe' has two values"),
        ('{"recipe": "resnet", "overrides": {"epochs": 1, "epochs": 2}}', "the field 'epochs' has two values"),
        ("{'recipe': 'resnet'}", "Expecting property name enclosed in double quotes"),
        ("", "body: the body is missing; send JSON"),
    ],
)
def test_json_fields_are_never_ignored(client: TestClient, body: str, words: str) -> None:
    refused = client.post("/train", content=body, headers={"Content-Type": "application/json"})
    assert_problem(refused, 422, words)


def test_promotion_with_an_unknown_field_is_refused(client: TestClient) -> None:
    refused = client.put("/models/resnet/live", json={"version": 1, "versions": 2})
    assert_problem(refused, 422, "body.versions: there is no such field; did you mean version?")


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain", "text/json", ""])
def test_json_of_another_content_type_is_refused_by_name(client: TestClient, content_type: str) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    for method, url in (("POST", "/train"), ("PUT", "/models/resnet/live")):
        refused = client.request(method, url, content=b'{"recipe": "resnet"}', headers=headers)
        assert_problem(refused, 415, f"the content type {content_type or '(none)'!r} is not supported; send JSON")


def test_the_openapi_document_describes_the_form_fields(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path in ("/predict", "/evaluate"):
        operation = paths[path]["post"]
        schema = operation["requestBody"]["content"]["multipart/form-data"]["schema"]
        assert schema["required"] == ["file"]
        assert set(schema["properties"]) == {"file"} | {each["name"] for each in operation["parameters"]}
