"""Build the OpenAPI document: FastAPI's description of the routes, with examples of requests, responses and errors.

`examples.json` has the examples by operation id. `tests/helpers/api_examples.py` writes it from answers of the service,
and a test compares it with what the service answers now.
"""

import json
from pathlib import Path
from typing import Any

from fastapi import FastAPI

EXAMPLES = Path(__file__).with_name("examples.json")

_MULTIPART = "multipart/form-data"


def build_document(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document of an application."""
    document = app.openapi()
    examples = json.loads(EXAMPLES.read_text())
    for operations in document["paths"].values():
        for operation in operations.values():
            _add_examples(operation, examples[operation["operationId"]])
    return document


def _add_examples(operation: dict[str, Any], example: dict[str, Any]) -> None:
    """Add the examples of one operation.

    Args:
        operation: Operation of the document, changed in place.
        example: `parameters` by name, the JSON `body`, `responses` by status and media type, and `problems` by status.
    """
    parameters = example.get("parameters", {})
    for parameter in operation.get("parameters", []):
        if parameter["name"] in parameters:
            parameter["example"] = parameters[parameter["name"]]
    bodies = operation.get("requestBody", {}).get("content", {})
    if "body" in example:
        bodies["application/json"]["example"] = example["body"]
    for name, schema in bodies.get(_MULTIPART, {}).get("schema", {}).get("properties", {}).items():
        if name in parameters:
            schema["example"] = parameters[name]
    for status, contents in example["responses"].items():
        for kind, value in contents.items():
            operation["responses"][status]["content"][kind]["example"] = value
    for status, problem in example["problems"].items():
        (content,) = operation["responses"][f"{status[0]}XX"]["content"].values()
        content.setdefault("examples", {})[status] = {"summary": problem["title"], "value": problem}
