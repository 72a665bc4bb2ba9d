"""Parse parameters strictly: unknown names and conflicting values are errors with a suggestion.

    query, form fields --parse_parameters--> model of the route
    query, JSON body   --StrictRoute-->      arguments of the endpoint

The known names are the parameters that a route declares.
"""

import json
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.datastructures import QueryParams
from typing_extensions import override

from app.exceptions import UnsupportedMediaType
from app.routes.uploads import media_type
from training.text import quote, suggest

_MAX_FAULTS = 10  # faults that a response lists; each unknown name is compared with all known names

Given = tuple[str, str, str]
"""Source of a parameter ("query" or "form"), its name and its value."""
Model = TypeVar("Model", bound=BaseModel)


class StrictRoute(APIRoute):
    """A route that refuses query parameters and JSON fields which it does not declare."""

    @override
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        respond = super().get_route_handler()
        known = list(_query_names(self.dependant))
        fields = _model_fields(self.body_field.field_info.annotation) if self.body_field else []

        async def respond_strictly(request: Request) -> Response:
            if request.scope["query_string"]:
                _collect(_query_items(request.scope["query_string"]), known)
            try:
                return await respond(_JsonRequest(request.scope, request.receive) if fields else request)
            except RequestValidationError as error:
                if isinstance(error.body, bytes) and error.body:  # FastAPI parses a body only if its type is JSON
                    raise UnsupportedMediaType(
                        f"the content type {quote(media_type(request) or '(none)')} is not supported; send JSON with "
                        "the header 'Content-Type: application/json'"
                    ) from None
                raise RequestValidationError([_explain(fault, fields) for fault in error.errors()]) from None

        return respond_strictly


def _query_names(dependant: Dependant) -> Iterator[str]:
    """Iterate over the query parameters of an endpoint and its dependencies."""
    for field in dependant.query_params:
        yield from _model_fields(field.field_info.annotation) or [field.alias]
    for each in dependant.dependencies:
        yield from _query_names(each)


def _model_fields(kind: Any) -> list[str]:
    """Return the names of the fields of a pydantic model, as clients send them. Empty for other types."""
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return []
    return [field.alias or name for name, field in kind.model_fields.items()]


class _JsonRequest(Request):
    """A request whose JSON body names each field once."""

    @override
    async def json(self) -> Any:
        return json.loads(await self.body(), object_pairs_hook=_unique_fields)


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if fields.setdefault(name, value) != value:
            raise json.JSONDecodeError(f"the field {quote(name)} has two values", "", 0)
    return fields


def _explain(fault: dict[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """Make the message of a fault more specific."""
    match fault:
        case {"type": "extra_forbidden", "loc": ("body", str(name))}:
            return {**fault, "msg": f"there is no such field; {suggest(name, fields)}"}
        case {"type": "json_invalid", "ctx": {"error": reason}, "loc": ("body", position)}:
            place = f" at character {position}" if position else ""
            return {**fault, "msg": f"the body is not valid JSON: {reason}; correct it{place} and send it again"}
    return fault


def parse_parameters(model: type[Model], query: bytes, fields: Iterable[tuple[str, str]] = ()) -> Model:
    """Parse the parameters of a request.

    Args:
        model: The parameters that the route declares.
        query: Query string of the URL.
        fields: Names and values of the text fields of a form. They have the meaning of query parameters. An empty value
            stands for an empty input of an HTML form and is ignored.

    Raises:
        RequestValidationError: A parameter is unknown or invalid, or is given twice with different values.
    """
    given = [*_query_items(query), *(("form", name, value) for name, value in fields)]
    found = _collect(given, _model_fields(model))
    values = {name: value for name, (source, value) in found.items() if value or source == "query"}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        faults = [{**fault, "loc": (found[str(fault["loc"][0])][0], *fault["loc"])} for fault in error.errors()]
        raise RequestValidationError(faults) from None


def _query_items(query: bytes) -> list[Given]:
    return [("query", name, value) for name, value in QueryParams(query).multi_items()]


def _collect(given: Iterable[Given], known: Collection[str]) -> dict[str, tuple[str, str]]:
    """Return the source and the value of each parameter by its name.

    Raises:
        RequestValidationError: A name is unknown, or has two values.
    """
    found: dict[str, tuple[str, str]] = {}
    faults = list[dict[str, Any]]()
    for source, name, value in given:
        if name not in known:
            hint = suggest(name, known, "parameters") if known else "this call has none"
            faults.append({"type": "unknown", "loc": (source, name), "msg": f"there is no such parameter; {hint}"})
        elif (other := found.setdefault(name, (source, value))[1]) != value:
            message = f"the parameter has two values, {quote(other)} and {quote(value)}"
            faults.append({"type": "conflict", "loc": (source, name), "msg": message})
        if len(faults) == _MAX_FAULTS:
            break
    if faults:
        raise RequestValidationError(faults)
    return found
