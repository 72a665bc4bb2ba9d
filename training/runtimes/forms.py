"""The forms of a model for other programs, which an export writes beside `model.pt` on request.

This module imports no library, so that the command line knows the forms without loading PyTorch.
"""

from collections.abc import Collection
from importlib.util import find_spec

from training.errors import UsageError
from training.runtimes import Form
from training.text import quote

FORM_FILES: dict[Form, str] = {"pt2": "model.pt2", "onnx": "model.onnx"}
"""File name of each form."""


class FormError(UsageError):
    """There is no such form, or its exporter is not installed."""


def parse_forms(text: str) -> list[Form]:
    """Parse names of forms, separated by commas.

    Raises:
        FormError: There is no such form, or its exporter is not installed.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    forms = [form for form in FORM_FILES if form in names]
    for name in names:
        if name not in forms:
            raise FormError(f"there is no form {quote(name)}; give {', '.join(FORM_FILES)}, or several with commas")
    require_exporters(forms)
    return forms


def require_exporters(forms: Collection[Form]) -> None:
    """Check that the libraries which write these forms are installed.

    Raises:
        FormError: A library is missing.
    """
    if "onnx" in forms and not find_spec("onnxscript"):
        raise FormError("ONNX needs onnxscript; pip install 'cifar100[onnx]' adds it")
