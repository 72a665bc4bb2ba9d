"""This module exports classifiers with torch.export, the successor of TorchScript, and as ONNX.

Input: a classifier.
Output: `model.pt2` or `model.onnx` beside `model.pt`, with the same input and output, and a `TorchExportEngine`.
OpenVINO computes `model.onnx`.
"""

import io
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from training.runtimes import Form
from training.runtimes.engine import CPU_BATCH_SIZES, MAX_DEVIATION, Engine, example_images
from training.runtimes.torchscript import store_in_half

OPSET = 20
"""Version of the ONNX operators."""


def save(classifier: nn.Module, file: Path, form: Form) -> None:
    """Write a form of a classifier, for batches of any size.

    Args:
        classifier: Module in evaluation mode from uint8 [N, 3, 32, 32] to logits [N, classes], on the CPU, after
            `torchscript.round_weights`.
        file: File to write.
        form: Format of the file.

    Raises:
        OSError: The file cannot be written.
    """
    images = (example_images(2),)  # a batch of one image would make 1 the only size
    with torch.no_grad():
        program = torch.export.export(
            store_in_half(classifier), images, dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    if form == "pt2":
        content = io.BytesIO()  # PyTorch opens only paths that are valid UTF-8
        torch.export.save(program, content)
        file.write_bytes(content.getbuffer())
    else:
        converted = torch.onnx.export(
            program,
            images,
            input_names=["pixels"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),
            opset_version=OPSET,
            verbose=False,
        )
        assert converted  # noqa: S101  it is None only if a file name is given
        converted.save(file)


class TorchExportEngine(Engine):
    """PyTorch on the CPU in float32, with a program of torch.export.

    Args:
        file: A `model.pt2`.
    """

    name = "pt2-cpu"
    tolerance = MAX_DEVIATION["float32"]
    sizes = CPU_BATCH_SIZES

    def __init__(self, file: Path):
        with file.open("rb") as content:
            self._module = torch.export.load(content).module()

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Compute logits, see `Engine`."""
        with torch.inference_mode():
            logits: NDArray[np.float32] = self._module(torch.from_numpy(images)).numpy()
        return logits
