"""This module computes exported models on a CPU with OpenVINO, in floating point or quantized to int8.

Input: `model.pt`, and for int8 a few hundred training images.
Output: `int8.xml` and `int8.bin` beside it, and an `OpenVinoEngine`.
"""

import logging
import os
import sys
from collections.abc import Collection
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.runtimes import torchscript
from training.runtimes.engine import CPU_BATCH_SIZES, MAX_DEVIATION, Engine

INT8 = "int8.xml"
"""File name of the quantized model. Its weights are in a `.bin` file of the same name."""

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # disables telemetry to Intel


# int8 is hardly faster than float32 on processors that have none of these instructions.
_INT8_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8")


def computes_int8() -> bool:
    """Return whether the processor has int8 instructions."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(instructions) for instructions in _INT8_INSTRUCTIONS)


class OpenVinoEngine(Engine):
    """A model compiled by OpenVINO for this CPU, in its fastest precision by default. It is not thread-safe.

    Args:
        file: An exported `model.pt`, which is converted, an `int8.xml` or a `model.onnx`.
        precision: OpenVINO precision of the layers that are not quantized, such as f32, instead of the fastest.
        threads: Number of threads, instead of one for each processor core.
    """

    sizes = CPU_BATCH_SIZES

    def __init__(self, file: Path, precision: str | None = None, threads: int | None = None):
        from openvino import Core

        model = _convert(file) if file.suffix == ".pt" else Core().read_model(file)
        hints: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if precision:
            hints["INFERENCE_PRECISION_HINT"] = precision
        if threads:
            hints["INFERENCE_NUM_THREADS"] = threads
        compiled = Core().compile_model(model, "CPU", hints)
        self._request = compiled.create_infer_request()
        self.precision: str = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        """Precision of the layers that are not quantized: f32, bf16 or f16."""
        quantized = file.name == INT8
        kind = "onnx" if file.suffix == ".onnx" else "openvino"
        self.name = f"{kind}-{'int8' if quantized else self.precision}"
        self.tolerance = MAX_DEVIATION["int8" if quantized else "float32" if self.precision == "f32" else "half"]

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Compute logits, see `Engine`."""
        logits: NDArray[np.float32] = self._request.infer({0: images}, share_inputs=True)[0]
        return logits


def quantize(model: Path, images: Tensor, float_layers: Collection[int] = ()) -> Path:
    """Quantize weights and activations to int8 after training (Jacob et al. 2018, arXiv:1712.05877), with NNCF.

    Args:
        model: An exported `model.pt`. The quantized model is written beside it.
        images: uint8 [N, 32, 32, 3], training images for calibrating the ranges of activations.
        float_layers: Indices of convolutions that stay in floating point, counted from 0 at the input.

    Returns:
        The path of the written `int8.xml`.
    """
    import nncf
    import openvino
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    network = _convert(model)
    convolutions = [node for node in network.get_ordered_ops() if node.get_type_name() == "Convolution"]
    ignored = [convolutions[position].get_friendly_name() for position in float_layers]
    samples = list(images.permute(0, 3, 1, 2).contiguous().numpy()[:, None])
    nncf.set_log_level(logging.ERROR)
    with Path(os.devnull).open("w") as devnull, redirect_stdout(devnull):  # NNCF prints progress bars
        network = nncf.quantize(
            network,
            nncf.Dataset(samples),
            subset_size=len(samples),
            fast_bias_correction=False,
            ignored_scope=nncf.IgnoredScope(names=ignored),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                activations_range_estimator_params=RangeEstimatorParametersSet.HISTOGRAM
            ),
        )
    file = model.with_name(INT8)
    openvino.save_model(network, file)
    return file


def delete_quantized(file: Path) -> None:
    """Delete the two files of a quantized model."""
    file.unlink()
    file.with_suffix(".bin").unlink()


def _convert(model: Path) -> Any:
    import openvino
    from openvino import PartialShape, Type

    return openvino.convert_model(torchscript.load(model), input=(PartialShape([-1, 3, 32, 32]), Type.u8))
