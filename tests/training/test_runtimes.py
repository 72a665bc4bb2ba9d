"""Test the runtimes: every engine computes the logits of the exported file, or is refused."""

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from training.dataset import Dataset
from training.runtimes import Device, Runtime, selection
from training.runtimes.engine import MAX_DEVIATION, EngineError, deviation
from training.runtimes.openvino import OpenVinoEngine, quantize
from training.runtimes.selection import Purpose, list_candidates
from training.runtimes.torchscript import TorchScriptEngine, load


@pytest.fixture
def model(models: Path) -> Path:
    return models / "resnet" / "1" / "model.pt"


@pytest.fixture(scope="session")
def int8_form(published_store: Path, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model file and its quantized form, which takes seconds to make."""
    model = tmp_path_factory.mktemp("int8") / "model.pt"
    shutil.copy(published_store / "resnet" / "1" / "model.pt", model)
    quantize(model, torch.from_numpy(dataset.train.images[:8]))
    return model.parent


@pytest.fixture
def quantized(model: Path, int8_form: Path) -> Path:
    """The model file with a quantized int8 form beside it."""
    for file in int8_form.glob("int8.*"):
        shutil.copy(file, model.parent)
    return model


@pytest.mark.parametrize("runtime", ["torchscript", "openvino"])
def test_answers_are_those_of_the_exported_file(model: Path, dataset: Dataset, runtime: Runtime) -> None:
    engine = selection.load(model, "cpu", runtime)
    assert engine.name.startswith(runtime)
    for size in (1, 3, 16, 13, 64, 2):  # repeated and new batch sizes
        images = np.ascontiguousarray(dataset.test.images[:size].transpose(0, 3, 1, 2))
        with torch.inference_mode():
            expected = load(model)(torch.from_numpy(images)).numpy()
        logits = engine(images)
        assert logits.shape == (size, 100)
        assert logits.dtype == np.float32
        assert deviation(logits, expected) <= engine.tolerance


def test_torchscript_computes_in_half_precision(model: Path, dataset: Dataset) -> None:
    images = np.ascontiguousarray(dataset.test.images[:16].transpose(0, 3, 1, 2))
    exact, halved = (TorchScriptEngine(model, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert halved.name == exact.name + "-bf16"
    expected, logits = exact(images), halved(images)
    assert logits.dtype == np.float32
    assert not np.array_equal(logits, expected)
    assert deviation(logits, expected) <= halved.tolerance


@pytest.mark.parametrize("runtime", ["torchscript", "openvino"])
def test_an_answer_is_not_overwritten_by_the_next_one(model: Path, runtime: Runtime) -> None:
    engine = selection.load(model, "cpu", runtime)
    first = engine(np.zeros((2, 3, 32, 32), np.uint8))
    kept = first.copy()
    engine(np.full((2, 3, 32, 32), 255, np.uint8))
    np.testing.assert_array_equal(first, kept)


@pytest.mark.slow
@pytest.mark.parametrize(("instructions", "name"), [("avx512_vnni", "openvino-int8"), ("avx2", "openvino-")])
def test_int8_serves_where_a_model_has_it_and_the_processor_computes_it_fast(
    quantized: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, instructions: str, name: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instructions: True})
    engine = selection.load(quantized, "cpu", "auto")
    assert engine.name.startswith(name)
    assert ("int8" in engine.name) == (name == "openvino-int8")
    assert "int8" not in selection.load(quantized, "cpu", "openvino").name
    images = np.ascontiguousarray(dataset.test.images.transpose(0, 3, 1, 2))
    with torch.inference_mode():
        expected = load(quantized)(torch.from_numpy(images))
    np.testing.assert_allclose(engine(images), expected, atol=0.5)


@pytest.mark.slow
def test_a_damaged_int8_form_is_not_served(quantized: Path, caplog: pytest.LogCaptureFixture) -> None:
    quantized.with_name("int8.xml").write_text("<net/>")
    with pytest.raises(EngineError, match="int8 on cpu cannot compute"):
        selection.load(quantized, "cpu", "int8")
    with caplog.at_level(logging.WARNING):
        assert "int8" not in selection.load(quantized, "cpu", "auto").name


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [lambda logits: 1000 * logits, np.zeros_like, lambda logits: np.roll(logits, 1, axis=1), lambda _: np.nan],
    ids=["factor", "nothing", "other classes", "no numbers"],
)
def test_a_runtime_that_computes_something_else_is_refused(
    quantized: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[NDArray[np.float32]], NDArray[np.float32]],
) -> None:
    right = OpenVinoEngine.__call__

    def wrong(engine: OpenVinoEngine, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.broadcast_to(change(right(engine, images)), (len(images), 100)).astype(np.float32)

    monkeypatch.setattr(OpenVinoEngine, "__call__", wrong)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    with caplog.at_level(logging.WARNING):
        assert selection.load(quantized, "cpu", "auto").name == "torchscript-cpu"
    assert "deviate from those in float32" in caplog.text
    for runtime in ("int8", "openvino"):
        with pytest.raises(EngineError, match="deviate from those in float32"):
            selection.load(quantized, "cpu", runtime)


def test_a_model_that_is_too_coarse_in_the_fastest_precision_is_computed_in_float32(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Coarse(OpenVinoEngine):
        def __init__(self, file: Path, precision: str | None = None, threads: int | None = None):
            super().__init__(file, precision, threads)
            self._factor = np.float32(1 if precision == "f32" else 1000)

        def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
            return super().__call__(images) * self._factor

    monkeypatch.setattr(selection, "OpenVinoEngine", Coarse)
    with caplog.at_level(logging.WARNING):
        assert selection.load(model, "cpu", "openvino").name == "openvino-f32"
    assert caplog.text.count("deviate from those in float32") == 1


@pytest.mark.parametrize(
    ("instructions", "tolerance", "name"),
    [
        ("avx512_bf16", 0.03, "torchscript-cpu-bf16"),
        ("avx512_bf16", 0.0, "torchscript-cpu"),
        ("avx2", 0.03, "torchscript-cpu"),
    ],
    ids=["fast and fine", "too coarse", "not fast"],
)
def test_torchscript_takes_bfloat16_where_it_is_faster_and_fine_enough(
    model: Path, monkeypatch: pytest.MonkeyPatch, instructions: str, tolerance: float, name: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instructions: True})
    monkeypatch.setitem(MAX_DEVIATION, "half", tolerance)
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert selection.load(model, "cpu", "auto").name == name
    assert selection.load(model, "cpu", "torchscript").name == "torchscript-cpu"


def test_where_the_gpu_cannot_be_used_the_cpu_serves(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with caplog.at_level(logging.WARNING):
        assert selection.load(model, "auto", "auto").name.startswith("openvino")
    assert "is computed by openvino" in caplog.text
    with pytest.raises(EngineError, match="torchscript on cuda in float16 cannot compute"):
        selection.load(model, "cuda", "auto")


def test_without_openvino_torchscript_serves(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert selection.load(model, "cpu", "auto").name == "torchscript-cpu"
    with pytest.raises(EngineError, match="openvino on cpu cannot compute"):
        selection.load(model, "cpu", "openvino")


CPU_CANDIDATES = ["openvino on cpu", "openvino on cpu in float32", "torchscript on cpu in float32"]
GPU_CANDIDATES = ["torchscript on cuda in float16", "torchscript on cuda in float32"]
BFLOAT16_INSTRUCTIONS = {"avx512_bf16": True}
INT8_INSTRUCTIONS = {"avx512_vnni": True}


@pytest.mark.parametrize(
    ("capabilities", "gpu", "device", "runtime", "purpose", "expected"),
    [
        ({}, False, "auto", "auto", "serving", CPU_CANDIDATES),
        ({}, True, "auto", "auto", "serving", GPU_CANDIDATES + CPU_CANDIDATES),
        ({}, True, "cpu", "auto", "serving", CPU_CANDIDATES),
        ({}, True, "cuda", "auto", "serving", GPU_CANDIDATES),
        ({}, True, "cuda", "torchscript", "serving", GPU_CANDIDATES),
        ({}, True, "auto", "torchscript", "serving", [*GPU_CANDIDATES, CPU_CANDIDATES[2]]),
        ({}, True, "auto", "openvino", "serving", CPU_CANDIDATES[:2]),
        ({}, False, "cpu", "int8", "serving", ["int8 on cpu"]),
        (INT8_INSTRUCTIONS, False, "cpu", "pt2", "serving", ["pt2 on cpu in float32"]),
        ({}, True, "auto", "onnx", "serving", ["onnx on cpu in float32"]),
        (INT8_INSTRUCTIONS, False, "cpu", "auto", "serving", ["int8 on cpu", *CPU_CANDIDATES]),
        (
            BFLOAT16_INSTRUCTIONS,
            False,
            "cpu",
            "auto",
            "serving",
            [*CPU_CANDIDATES[:2], "torchscript on cpu in bfloat16", CPU_CANDIDATES[2]],
        ),
        (BFLOAT16_INSTRUCTIONS, False, "cpu", "torchscript", "serving", CPU_CANDIDATES[2:]),
        (BFLOAT16_INSTRUCTIONS, False, "cpu", "auto", "evaluation", CPU_CANDIDATES[2:]),
        (INT8_INSTRUCTIONS, False, "cpu", "int8", "evaluation", ["int8 on cpu"]),
        ({}, True, "auto", "auto", "evaluation", GPU_CANDIDATES[1:]),
        (INT8_INSTRUCTIONS, False, "cpu", "auto", "teaching", ["openvino on cpu"]),
        ({}, False, "cpu", "auto", "online-teaching", ["int8 on cpu"]),
        ({}, True, "cuda", "auto", "teaching", GPU_CANDIDATES[:1]),
        ({}, True, "cuda", "auto", "online-teaching", GPU_CANDIDATES[:1]),
    ],
)
def test_candidates_are_listed_in_order_of_preference(
    capabilities: dict[str, bool],
    gpu: bool,
    device: Device,
    runtime: Runtime,
    purpose: Purpose,
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "int8.xml").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    candidates = list_candidates(tmp_path / "model.pt", device, runtime, purpose)
    assert [str(candidate) for candidate in candidates] == expected
    assert all(candidate.graphs == (purpose == "serving") for candidate in candidates if candidate.device == "cuda")


def test_a_model_without_an_int8_form_has_no_int8_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: INT8_INSTRUCTIONS)
    purposes: tuple[Purpose, ...] = ("serving", "online-teaching")
    for purpose in purposes:
        candidates = list_candidates(tmp_path / "model.pt", "cpu", "auto", purpose)
        assert "int8" not in {candidate.runtime for candidate in candidates}


def test_evaluation_computes_the_logits_of_the_exported_file(model: Path, dataset: Dataset) -> None:
    images = torch.from_numpy(dataset.test.images[:8]).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = load(model)(images)
        assert torch.equal(selection.load(model, "cpu", purpose="evaluation").compute_logits(images), expected)


@pytest.mark.slow
def test_an_engine_for_evaluation_is_not_refused_for_its_logits(
    quantized: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenVinoEngine, "__call__", lambda _, images: np.zeros((len(images), 100), np.float32))
    engine = selection.load(quantized, "cpu", "int8", "evaluation")
    assert engine.name == "openvino-int8"
    assert not engine.compute_logits(torch.from_numpy(dataset.test.images[:2]).permute(0, 3, 1, 2)).any()


def test_an_impossible_choice_is_an_error_that_names_it(model: Path) -> None:
    with pytest.raises(EngineError, match="no runtime fits runtime=torchscript on device=cpu for teaching"):
        selection.load(model, "cpu", "torchscript", "teaching")
