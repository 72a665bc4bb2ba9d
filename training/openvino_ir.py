"""The forms of an exported model that OpenVINO computes on a CPU: as it is, or quantised to int8.

In: `model.pt`, and for int8 a few hundred training images.  Out: `int8.xml` and `int8.bin` beside it, and `Compiled`
networks, uint8 [N, 3, 32, 32] in, float32 logits [N, classes] out.
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
"""The quantised form; its weights are in a `.bin` file of the same name."""

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # it would report to its maker


class Compiled:
    """A network in the precision in which this processor is fastest. Called by one thread at a time.

    Args:
        file: an exported `model.pt`, which is converted, or an `int8.xml`.
        precision: f32 or another of OpenVINO's, instead of the fastest.
    """

    def __init__(self, file: Path, precision: str | None = None):
        from openvino import Core

        network = _converted(file) if file.suffix == ".pt" else Core().read_model(file)
        hints = {"PERFORMANCE_HINT": "LATENCY"} | ({"INFERENCE_PRECISION_HINT": precision} if precision else {})
        compiled = Core().compile_model(network, "CPU", hints)
        self.precision: str = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        """Of what is not quantised: f32, bf16 or f16."""
        self._request = compiled.create_infer_request()

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self._request.infer({0: images}, share_inputs=True)[0]
        return logits

    def on_tensors(self, images: Tensor) -> Tensor:
        """The same, as `evaluate.predict` calls a model."""
        return torch.from_numpy(self(np.ascontiguousarray(images.numpy())))


def quantise(model: Path, images: Tensor, in_float: Collection[int] = ()) -> Path:
    """Quantise weights and activations to int8 after training (Jacob et al. 2018, arXiv:1712.05877), with NNCF.

    Args:
        model: an exported `model.pt`; the quantised form is written beside it.
        images: uint8 [N, 32, 32, 3], training images that show which values activations take.
        in_float: convolutions that stay in floating point, counted from 0 at the input.

    Returns:
        The written `int8.xml`.
    """
    import nncf
    import openvino
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    network = _converted(model)
    convolutions = [node for node in network.get_ordered_ops() if node.get_type_name() == "Convolution"]
    spared = [convolutions[position].get_friendly_name() for position in in_float]
    samples = list(images.permute(0, 3, 1, 2).contiguous().numpy()[:, None])
    nncf.set_log_level(logging.ERROR)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # it draws progress bars
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
    """Delete a quantised form."""
    file.unlink()
    file.with_suffix(".bin").unlink()


def _converted(model: Path) -> Any:
    import openvino
    from openvino import PartialShape, Type

    return openvino.convert_model(torchscript.load(model), input=(PartialShape([-1, 3, 32, 32]), Type.u8))
