"""Test the forms of a model for other programs: each computes the logits of `model.pt` and is a part of the version."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from openvino import Core
from torch import nn

from training.dataset import Dataset
from training.export import export
from training.run import Run
from training.runtimes import Form, forms, selection, torch_export
from training.runtimes.engine import EngineError, deviation, example_images
from training.runtimes.forms import FORM_FILES, FormError, parse_forms
from training.runtimes.torchscript import TorchScriptEngine
from training.store import LocalStore, StoreError

pytestmark = pytest.mark.slow
FORMS: tuple[Form, ...] = ("pt2", "onnx")


@pytest.fixture(scope="module")
def version(finished_run: Run, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a version with all forms."""
    pytest.importorskip("onnxscript")
    store = LocalStore(tmp_path_factory.mktemp("forms"))
    list(export(finished_run, dataset, store, also=FORMS))
    return store.folder("resnet", 1)


@pytest.mark.parametrize("form", FORMS)
def test_a_form_computes_the_logits_of_the_exported_file_for_every_batch_size(version: Path, form: Form) -> None:
    engine = selection.load(version / "model.pt", "cpu", form)
    assert engine.name.startswith(form)
    for count in (1, 2, 7):
        images = example_images(count).numpy()
        logits = engine(images)
        assert logits.dtype == np.float32
        assert logits.shape == (count, 100)
        assert deviation(logits, TorchScriptEngine(version / "model.pt")(images)) < 1e-5


def test_another_program_reads_the_contract_from_the_files(version: Path) -> None:
    network = Core().read_model(version / FORM_FILES["onnx"])
    (pixels,), (logits,) = network.inputs, network.outputs
    assert (pixels.any_name, pixels.element_type.to_string(), str(pixels.partial_shape)) == (
        "pixels", "u8", "[?,3,32,32]"
    )  # fmt: skip
    assert (logits.any_name, logits.element_type.to_string(), str(logits.partial_shape)) == (
        "logits", "f32", "[?,100]"
    )  # fmt: skip
    program = torch.export.load(version / FORM_FILES["pt2"]).module()
    assert program(torch.zeros(3, 3, 32, 32, dtype=torch.uint8)).shape == (3, 100)


def test_forms_are_files_of_the_version_that_are_verified_and_deleted_with_it(
    version: Path, finished_run: Run, dataset: Dataset, tmp_path: Path
) -> None:
    store = LocalStore(shutil.copytree(version.parents[1], tmp_path / "models"))
    version = store.folder("resnet", 1)
    card = store.card("resnet", 1)
    assert set(FORM_FILES.values()) < set(card.files)
    assert store.verify(card) == version
    list(export(finished_run, dataset, store))  # the newest version cannot be deleted
    store.promote("resnet", 2)
    file = version / FORM_FILES["pt2"]
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(StoreError, match=r"model\.pt2 is damaged: its sha256 differs"):
        store.verify(card)
    file.write_bytes(content)
    store.delete("resnet", 1)
    assert not version.exists()


def test_a_form_that_computes_something_else_is_refused(
    finished_run: Run, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch_export.save

    def save_another(classifier: nn.Module, file: Path, form: Form) -> None:
        save(nn.Sequential(classifier, nn.Softmax(1)), file, form)

    monkeypatch.setattr(torch_export, "save", save_another)
    with pytest.raises(EngineError, match="the logits of pt2-cpu deviate from those in float32"):
        list(export(finished_run, dataset, LocalStore(tmp_path), also=["pt2"]))
    assert LocalStore(tmp_path).versions("resnet") == []


def test_forms_are_named_with_commas() -> None:
    assert parse_forms("") == []
    assert parse_forms("onnx, pt2,") == ["pt2", "onnx"]
    with pytest.raises(FormError, match="there is no form 'ort'; give pt2, onnx, or several with commas"):
        parse_forms("pt2,ort")


def test_a_form_whose_exporter_is_missing_is_refused_at_once(
    finished_run: Run, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "find_spec", lambda _: None)
    with pytest.raises(FormError, match=r"ONNX needs onnxscript; pip install 'cifar100\[onnx\]' adds it"):
        next(export(finished_run, dataset, LocalStore(tmp_path), also=["onnx"]))
