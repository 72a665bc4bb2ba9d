"""Test the engines: every runtime computes the logits of the exported file, or the engine refuses to load."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from app import engines
from app.engines import EngineError, OpenVinoEngine, TorchScriptEngine, deviation
from app.settings import Runtime
from training.dataset import Dataset
from training.openvino_ir import Compiled, quantise
from training.torchscript import load


@pytest.fixture
def model(models: Path) -> Path:
    return models / "resnet" / "1" / "model.pt"


@pytest.fixture
def quantised(model: Path, dataset: Dataset) -> Path:
    """The model file with a quantized int8 form beside it."""
    quantise(model, torch.from_numpy(dataset.train.images[:8]))
    return model


@pytest.mark.parametrize("runtime", ["torchscript", "openvino"])
def test_answers_are_those_of_the_exported_file(model: Path, dataset: Dataset, runtime: Runtime) -> None:
    engine = engines.load(model, "cpu", runtime)
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
    exact, halved = (TorchScriptEngine(model, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert halved.name == exact.name + "-bf16"
    expected, logits = exact(images), halved(images)
    assert logits.dtype == np.float32
    assert not np.array_equal(logits, expected)
    assert deviation(logits, expected) <= halved.tolerance


@pytest.mark.parametrize("runtime", ["torchscript", "openvino"])
def test_an_answer_is_not_overwritten_by_the_next_one(model: Path, runtime: Runtime) -> None:
    engine = engines.load(model, "cpu", runtime)
    first = engine(np.zeros((2, 3, 32, 32), np.uint8))
    kept = first.copy()
    engine(np.full((2, 3, 32, 32), 255, np.uint8))
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize(("instructions", "name"), [("avx512_vnni", "openvino-int8"), ("avx2", "openvino-")])
def test_int8_serves_where_a_model_has_it_and_the_processor_computes_it_fast(
    quantised: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, instructions: str, name: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instructions: True})
    engine = engines.load(quantised, "cpu", "auto")
    assert engine.name.startswith(name)
    assert ("int8" in engine.name) == (name == "openvino-int8")
    assert "int8" not in engines.load(quantised, "cpu", "openvino").name
    images = np.ascontiguousarray(dataset.test.images.transpose(0, 3, 1, 2))
    with torch.inference_mode():
        expected = load(quantised)(torch.from_numpy(images))
    np.testing.assert_allclose(engine(images), expected, atol=0.5)


def test_a_damaged_int8_form_is_not_served(quantised: Path, caplog: pytest.LogCaptureFixture) -> None:
    quantised.with_name("int8.xml").write_text("<net/>")
    with pytest.raises(EngineError, match="int8 cannot compute"):
        engines.load(quantised, "cpu", "int8")
    with caplog.at_level(logging.WARNING):
        assert "int8" not in engines.load(quantised, "cpu", "auto").name


@pytest.mark.parametrize(
    "change",
    [lambda logits: 1000 * logits, np.zeros_like, lambda logits: np.roll(logits, 1, axis=1), lambda _: np.nan],
    ids=["factor", "nothing", "other classes", "no numbers"],
)
def test_a_runtime_that_computes_something_else_is_refused(
    quantised: Path,
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
        assert engines.load(quantised, "cpu", "auto").name == "torchscript-cpu"
    assert "logits deviate from those in float32" in caplog.text
    for runtime in ("int8", "openvino"):
        with pytest.raises(EngineError, match="logits deviate"):
            engines.load(quantised, "cpu", runtime)


def test_a_model_that_is_too_coarse_in_the_fastest_precision_is_computed_in_float32(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Coarse(Compiled):
        def __init__(self, file: Path, precision: str | None = None):
            super().__init__(file, precision)
            self._factor = np.float32(1 if precision == "f32" else 1000)

        def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
            return super().__call__(images) * self._factor

    monkeypatch.setattr(engines, "Compiled", Coarse)
    with caplog.at_level(logging.WARNING):
        assert engines.load(model, "cpu", "openvino").name == "openvino-f32"
    assert caplog.text.count("logits deviate from those in float32") == 1


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
    monkeypatch.setattr(engines, "_REDUCED_PRECISION", tolerance)
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert engines.load(model, "cpu", "auto").name == name
    assert engines.load(model, "cpu", "torchscript").name == "torchscript-cpu"


def test_where_the_gpu_cannot_be_used_the_cpu_serves(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with caplog.at_level(logging.WARNING):
        assert engines.load(model, "auto", "auto").name.startswith("openvino")
    assert "computed on the CPU instead" in caplog.text
    with pytest.raises(EngineError, match="torchscript cannot compute"):
        engines.load(model, "cuda", "auto")


def test_without_openvino_torchscript_serves(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert engines.load(model, "cpu", "auto").name == "torchscript-cpu"
    with pytest.raises(EngineError, match="openvino cannot compute"):
        engines.load(model, "cpu", "openvino")
