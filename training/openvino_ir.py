"""This module runs exported models on a CPU with OpenVINO, in floating point or quantized to int8.

Input: `model.pt`, and for int8 a few hundred training images.
Output: `int8.xml` and `int8.bin` beside it, and `Compiled` networks that map uint8 images [N, 3, 32, 32] to float32
logits [N, classes].
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

from training import torchscript

INT8 = "int8.xml"
"""File name of the quantized model. Its weights are in a `.bin` file of the same name."""

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # disables telemetry to Intel


class Compiled:
    """A network compiled for this CPU, in its fastest precision by default. It is not thread-safe.

    Args:
        file: An exported `model.pt`, which is converted, or an `int8.xml`.
        precision: An OpenVINO precision such as f32, instead of the fastest.
    """

    def __init__(self, file: Path, precision: str | None = None):
        from openvino import Core

        network = _converted(file) if file.suffix == ".pt" else Core().read_model(file)
        hints = {"PERFORMANCE_HINT": "LATENCY"} | ({"INFERENCE_PRECISION_HINT": precision} if precision else {})
        compiled = Core().compile_model(network, "CPU", hints)
        self.precision: str = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        """Precision of the layers that are not quantized: f32, bf16 or f16."""
        self._request = compiled.create_infer_request()

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self._request.infer({0: images}, share_inputs=True)[0]
        return logits

    def on_tensors(self, images: Tensor) -> Tensor:
        """Compute logits with tensors on the CPU instead of arrays, as `evaluate.predict` requires."""
        return torch.from_numpy(self(np.ascontiguousarray(images.numpy())))


def quantise(model: Path, images: Tensor, in_float: Collection[int] = ()) -> Path:
    """Quantize weights and activations to int8 after training (Jacob et al. 2018, arXiv:1712.05877), with NNCF.

    Args:
        model: An exported `model.pt`. The quantized model is written beside it.
        images: uint8 [N, 32, 32, 3], training images for calibrating the ranges of activations.
        in_float: Indices of convolutions that stay in floating point, counted from 0 at the input.

    Returns:
        The path of the written `int8.xml`.
    """
    import nncf
    import openvino
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    network = _converted(model)
    convolutions = [node for node in network.get_ordered_ops() if node.get_type_name() == "Convolution"]
    spared = [convolutions[position].get_friendly_name() for position in in_float]
    samples = list(images.permute(0, 3, 1, 2).contiguous().numpy()[:, None])
    nncf.set_log_level(logging.ERROR)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # NNCF prints progress bars
        network = nncf.quantize(
            network,
            nncf.Dataset(samples),
            subset_size=len(samples),
            fast_bias_correction=False,
            ignored_scope=nncf.IgnoredScope(names=spared),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                activations_range_estimator_params=RangeEstimatorParametersSet.HISTOGRAM
            ),
        )
    file = model.with_name(INT8)
    openvino.save_model(network, file)
    return file


def remove(file: Path) -> None:
    """Delete the two files of a quantized model."""
    file.unlink()
    file.with_suffix(".bin").unlink()


def _converted(model: Path) -> Any:
    import openvino
    from openvino import PartialShape, Type

    return openvino.convert_model(torchscript.load(model), input=(PartialShape([-1, 3, 32, 32]), Type.u8))
