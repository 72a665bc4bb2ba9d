"""An engine is a runtime with a loaded model. This module defines the interface and the accepted deviations.

Input: uint8 images [N, 3, 32, 32].
Output: float32 logits [N, classes].
"""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.errors import ReportedError

CPU_BATCH_SIZES: tuple[int, ...] = (1, 2, 4, 8, 16)
"""Batch sizes for warm-up on the CPU.

OpenVINO compiles for each batch size. TorchScript optimizes its graph in the first calls."""

MAX_DEVIATION = {"float32": 0.001, "half": 0.03, "int8": 0.3}
"""Largest accepted `deviation` of logits from TorchScript in float32, by precision.

The shipped models deviate by 0.8 to 1.4 % in bfloat16 and by 6 to 15 % in int8. The accuracy of an int8 model is
measured when it is quantized."""


class EngineError(ReportedError, RuntimeError):
    """A runtime cannot compute a model. The message gives the reason."""


class EngineNotReady(EngineError):
    """The engine is being started on another machine. Ask for it again."""


class Engine(Protocol):
    """A runtime with a loaded model. One thread at a time may call it."""

    name: str
    """Runtime, device and precision, such as openvino-int8."""
    tolerance: float
    """Largest accepted `deviation` from the logits of TorchScript in float32."""
    sizes: tuple[int, ...]
    """Batch sizes for warm-up and verification."""

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Compute the logits of images in host memory.

        Args:
            images: uint8 [N, 3, 32, 32].

        Returns:
            float32 [N, classes].
        """
        ...

    def compute_logits(self, images: Tensor) -> Tensor:
        """Compute the logits of images on the engine's device, without a copy to another device.

        Args:
            images: uint8 [N, 3, 32, 32].

        Returns:
            float32 [N, classes] on the same device.
        """
        return torch.from_numpy(self(np.ascontiguousarray(images.numpy())))


def deviation(logits: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the relative L2 error of logits, after the mean over classes is subtracted from each row.

    Softmax depends only on differences between classes, hence the subtraction. The error is relative, so the same
    tolerance holds for a model with small logits, whose predictions are uncertain.

    Args:
        logits: float32 [N, classes].
        expected: Reference logits, float32 [N, classes].

    Returns:
        0 for equal logits, 1 for logits that are constant over the classes.
    """
    centered, reference = (each - each.mean(1, keepdims=True) for each in (logits, expected))
    return float(np.linalg.norm(centered - reference) / np.linalg.norm(reference))


def example_images(count: int) -> Tensor:
    """Make fixed, smooth random uint8 images [count, 3, 32, 32] for tracing, parity checks and warm-up."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=random)
    smooth = nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear", align_corners=False)
    return (smooth * 255).to(torch.uint8)
