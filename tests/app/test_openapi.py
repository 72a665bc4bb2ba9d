"""Test that the OpenAPI document describes everything, and that its examples equal the answers of the service."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_examples import collect, outline

from app.errors import MEANINGS
from app.main import create_app
from app.openapi import EXAMPLES, build_document
from app.settings import Settings

DOCUMENT = build_document(create_app(Settings()))
OPERATIONS = [operation for operations in DOCUMENT["paths"].values() for operation in operations.values()]


def name(operation: dict[str, Any]) -> str:
    return str(operation["operationId"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_examples_are_what_the_service_answers_now(tmp_path: Path) -> None:
    kept, now = (outline(examples) for examples in (json.loads(EXAMPLES.read_text()), collect(tmp_path)))
    assert kept.keys() == now.keys()
    for operation in now:
        assert kept[operation] == now[operation], f"{operation}: run python tests/helpers/api_examples.py"


@pytest.mark.parametrize("operation", OPERATIONS, ids=name)
def test_every_operation_parameter_and_response_has_a_description_and_an_example(operation: dict[str, Any]) -> None:
    assert operation["summary"]
    assert operation["description"]
    for parameter in operation.get("parameters", []):
        assert parameter["description"], parameter["name"]
        assert "example" in parameter or parameter["schema"].get("examples"), parameter["name"]
    body = operation.get("requestBody", {}).get("content", {})
    assert "application/json" not in body or "example" in body["application/json"]
    for status, response in operation["responses"].items():
        assert response["description"]
        binary = ("image/", "application/octet-stream", "application/zip")
        kinds = {kind: content for kind, content in response["content"].items() if not kind.startswith(binary)}
        assert all("example" in content or content.get("examples") for content in kinds.values()), (status, kinds)


def test_every_property_has_a_description() -> None:
    def properties(schemas: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
        for schema, content in schemas.items():
            for field, described in content.get("properties", {}).items():
                yield schema, field, described

    missing = [
        (schema, field)
        for schema, field, described in properties(DOCUMENT["components"]["schemas"])
        if not described.get("description")
    ]
    assert not missing


def test_the_addresses_of_problems_are_sections_of_a_page_and_rows_of_the_guide() -> None:
    guide = (Path(__file__).parents[2] / "docs/api.md").read_text()
    rows = {int(status) for status in re.findall(r"^\| (\d{3}) \|", guide, re.MULTILINE)}
    assert rows == {*MEANINGS, 308}  # a redirect is no problem
    problems = [
        problem for example in json.loads(EXAMPLES.read_text()).values() for problem in example["problems"].values()
    ]
    assert {problem["type"] for problem in problems} <= {f"/errors#{status}" for status in MEANINGS}
    assert all(problem["type"] == f"/errors#{problem['status']}" for problem in problems)
