"""Runtimes that compute logits: one call signature, uint8 batch in, float32 logits out.

In: an exported `model.pt`.  Out: an `Engine`, warmed up, and compared with PyTorch in float32.
"""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from training import torchscript

log = logging.getLogger(__name__)

Device = Literal["auto", "cpu", "cuda"]
Runtime = Literal["auto", "openvino", "torchscript"]

# OpenVINO prepares itself for each size of batch, TorchScript in the course of its first calls.
_WARMUP_SIZES = (1, 2, 4, 8, 16)

# Probabilities may differ by this much from those in float32.
_ROUNDING = 1e-4
_REDUCED_PRECISION = 0.02


class Engine(Protocol):
    """Computes logits. Called by one thread at a time."""

    name: str
    tolerance: float
    """By how much probabilities may differ from TorchScript's in float32."""

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [N, 3, 32, 32] to float32 [N, classes]."""
        ...


class EngineError(RuntimeError):
    """A runtime cannot be used for a model."""


class TorchScriptEngine:
    """PyTorch's own runtime, on any device."""

    tolerance = _ROUNDING

    def __init__(self, model: Path, device: torch.device):
        self.name = f"torchscript-{device.type}"
        self.device = device
        self.module = torchscript.load(model, device)

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = self.module(torch.from_numpy(images).to(self.device)).cpu().numpy()
        return logits


class OpenVinoEngine:
    """OpenVINO on the CPU, in the precision in which the processor is fastest; made from `model.pt` at every load."""

    def __init__(self, model: Path):
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # it would report to its maker
        import openvino
        from openvino import Core, PartialShape, Type

        converted = openvino.convert_model(torchscript.load(model), input=(PartialShape([-1, 3, 32, 32]), Type.u8))
        compiled = Core().compile_model(converted, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self.name = f"openvino-{precision}"
        self.tolerance = _ROUNDING if precision == "f32" else _REDUCED_PRECISION
        self._request = compiled.create_infer_request()

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self._request.infer({0: images}, share_inputs=True)[0]
        return logits


def load(model: Path, device: Device, runtime: Runtime) -> Engine:
    """The fastest runtime for a model on a device, warmed up.

    Args:
        model: an exported `model.pt`.
        device: "auto" is CUDA where there is one.
        runtime: "auto" is OpenVINO on the CPU, and TorchScript where that is missing or computes something else.

    Raises:
        EngineError: the runtime that was asked for cannot be used.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if runtime == "openvino" or (runtime == "auto" and device == "cpu"):
        try:
            return _ready(lambda: OpenVinoEngine(model), model)
        except Exception as error:  # whatever a foreign runtime may raise
            if runtime == "openvino":
                raise EngineError(f"OpenVINO cannot serve {model}: {error}") from error
            log.warning("OpenVINO cannot serve %s, TorchScript does: %s", model, error)
    return _ready(lambda: TorchScriptEngine(model, torch.device(device)), model)


def _ready(make: Callable[[], Engine], model: Path) -> Engine:
    """A warm engine that computes what the model does.

    Raises:
        EngineError: it does not.
    """
    engine = make()
    for size in _WARMUP_SIZES:
        images = torchscript.example_images(size).numpy()
        logits = engine(images)
    expected = TorchScriptEngine(model, torch.device("cpu"))(images)
    difference = np.abs(_probabilities(logits) - _probabilities(expected)).max().item()
    if not difference <= engine.tolerance:
        raise EngineError(f"{engine.name}: probabilities differ from float32 by up to {difference:.2g}")
    return engine


def _probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    return torch.from_numpy(logits).softmax(1).numpy()
