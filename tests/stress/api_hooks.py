"""Hooks that give schemathesis real images and the names of existing models and jobs. See api_properties.py.

schemathesis sends them in addition to the values that it generates.
"""

import io
from typing import Any
from urllib.parse import quote

import httpx
import schemathesis
from hypothesis import strategies as st
from PIL import Image

KEY = "key-for-the-properties"


def _encoded(kind: str, side: int) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


_IMAGES = st.sampled_from([_encoded(kind, side) for kind in ("PNG", "JPEG", "GIF", "WEBP") for side in (1, 32, 100)])
_FILES = st.one_of(_IMAGES, st.binary(max_size=200))

schemathesis.openapi.format("binary", _FILES)
schemathesis.openapi.media_type("image/*", _FILES)
schemathesis.openapi.media_type("application/octet-stream", _FILES)


def _sometimes(values: dict[str, Any] | None, name: str, known: Any) -> dict[str, Any] | None:
    """Replace about half of the generated values by the known value."""
    if values and name in values and len(str(values[name])) % 2:
        return values | {name: known}
    return values


@schemathesis.hook
def map_path_parameters(_: schemathesis.HookContext, path_parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    return _sometimes(path_parameters, "name", "resnet")


@schemathesis.hook
def map_query(_: schemathesis.HookContext, query: dict[str, Any] | None) -> dict[str, Any] | None:
    return _sometimes(_sometimes(query, "model", "resnet"), "version", 1)


@schemathesis.hook
def before_call(_: schemathesis.HookContext, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
    """Cancel the job whose events are requested, because the event stream ends only with the job."""
    if case.operation.path.endswith("/events"):
        job_id = quote(str((case.path_parameters or {}).get("job_id")), safe="")
        service = (case.operation.base_url or "").rstrip("/")
        httpx.delete(f"{service}/train/{job_id}", headers={"Authorization": f"Bearer {KEY}"})
