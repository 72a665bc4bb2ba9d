"""This package computes the logits of exported models with TorchScript, CUDA graphs, OpenVINO or torch.export.

    model.pt, int8.xml --selection.load--> Engine: uint8 images [N, 3, 32, 32] --> float32 logits [N, classes]

`engine` defines the interface. `torchscript`, `cuda`, `openvino` and `torch_export` implement it. `selection` is the
only module that chooses one of them.

This module itself imports no library, so that settings can name devices and runtimes without loading PyTorch.
"""

from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
Form = Literal["pt2", "onnx"]
"""A form of a model for other programs, which an export writes beside `model.pt` on request."""
Runtime = Literal["auto", "int8", "openvino", "torchscript", Form]
