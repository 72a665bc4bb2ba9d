"""Runtimes that compute logits: one call signature, uint8 batch in, float32 logits out.

In: an exported `model.pt`.  Out: an `Engine`, warmed up.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from training import torchscript

# TorchScript optimises a graph in the course of its first calls.
_WARMUP_CALLS = 3


class Engine(Protocol):
    """Computes logits. Called by one thread at a time."""

    name: str

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [N, 3, 32, 32] to float32 [N, classes]."""
        ...


class TorchScriptEngine:
    """PyTorch's own runtime, on any device."""

    def __init__(self, model: Path, device: torch.device):
        self.name = f"torchscript-{device.type}"
        self.device = device
        self.module = torchscript.load(model, device)

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = self.module(torch.from_numpy(images).to(self.device)).cpu().numpy()
        return logits


def load(model: Path, device: str) -> Engine:
    """The fastest runtime for a model on a device, warmed up.

    Args:
        model: an exported `model.pt`.
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = TorchScriptEngine(model, torch.device(device))
    images = torchscript.example_images(8).numpy()
    for _ in range(_WARMUP_CALLS):
        engine(images[:1])
        engine(images)
    return engine
