"""This module exports classifiers as TorchScript and computes their logits.

An exported classifier maps uint8 images [N, 3, 32, 32] to float32 logits [N, classes].

PyTorch has deprecated TorchScript in favor of torch.export, see `torch_export`. All uses of torch.jit in this package
are in this module, so that a successor replaces only these few functions.

Run as a program, it computes the logits of a file in a process without the network's definition:
`python -m training.runtimes.torchscript MODEL IMAGES LOGITS`.
"""

import copy
import io
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from training.errors import ReportedError
from training.runtimes.engine import CPU_BATCH_SIZES, MAX_DEVIATION, Engine, example_images

MAX_DIFFERENCE = 1e-3
"""Largest accepted difference between the logits of an exported file and of eager mode.

Rounding may differ between eager mode and the frozen graph. Logits are of the order of 10."""

_SUFFIXES = {torch.float32: "", torch.float16: "-f16", torch.bfloat16: "-bf16"}


class ExportError(ReportedError, RuntimeError):
    """The logits of the exported file differ from those of the network."""


class _HalfStorage(nn.Module):
    """A parametrization that stores a weight in float16 and computes with it in float32."""

    def forward(self, stored: Tensor) -> Tensor:
        return stored.float()


def _matrix_weights(classifier: nn.Module) -> list[tuple[nn.Module, str]]:
    """List (module, name) of the weights with more than one dimension, which take most of a file.

    Vectors stay in float32.
    """
    return [
        (module, name)
        for module in classifier.modules()
        for name, weight in module.named_parameters(recurse=False)
        if weight.dim() > 1
    ]


def round_weights(classifier: nn.Module) -> None:
    """Round the matrix weights in place to float16 values, the precision of an exported file."""
    for module, name in _matrix_weights(classifier):
        weight = module.get_parameter(name)
        weight.data.copy_(weight.data.half())


def store_in_half(classifier: nn.Module) -> nn.Module:
    """Return a copy that stores the matrix weights in float16 and computes with them in float32."""
    stored = copy.deepcopy(classifier)
    with torch.no_grad():
        for module, name in _matrix_weights(stored):
            weight = module.get_parameter(name)
            weight.data = weight.data.half()
            register_parametrization(module, name, _HalfStorage().eval(), unsafe=True)
    return stored


def save(classifier: nn.Module, path: Path) -> None:
    """Trace a classifier in evaluation mode, write the file, and check it in a fresh process.

    Args:
        classifier: Module from uint8 [N, 3, 32, 32] to logits [N, classes], on the CPU, after `round_weights`.
        path: File to write.

    Raises:
        OSError: The file cannot be written.
        ExportError: The reloaded file's logits differ from those of eager mode by more than `MAX_DIFFERENCE`.
    """
    images = example_images(8)
    with torch.inference_mode():
        expected = classifier(images)
    with torch.no_grad(), ignore_deprecation():
        # the reloaded file is checked below
        traced = torch.jit.trace(store_in_half(classifier), (images,), check_trace=False)
        # Serialize in memory, because PyTorch aborts the process if it cannot write to a file.
        content = io.BytesIO()
        torch.jit.save(traced, content)
    path.write_bytes(content.getbuffer())
    difference = (_compute_in_fresh_process(path, images) - expected).abs().max().item()
    if not difference <= MAX_DIFFERENCE:
        raise ExportError(
            f"{path}: the logits of the exported file differ from those of eager mode by up to {difference:g}, and "
            f"rounding explains at most {MAX_DIFFERENCE}; check that the network computes the same in every call"
        )


def computes_bfloat16() -> bool:
    """Return whether the processor has bfloat16 instructions, with which PyTorch is faster than in float32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(instructions) for instructions in ("avx512_bf16", "amx_bf16", "bf16"))


def load(path: Path, device: torch.device | str = "cpu") -> torch.jit.ScriptModule:
    """Load the classifier of an exported file onto a device, in evaluation mode."""
    with ignore_deprecation(), path.open("rb") as file:  # PyTorch opens only paths that are valid UTF-8
        module: torch.jit.ScriptModule = torch.jit.load(file, map_location=device)
        if hasattr(module, "training"):
            # Freezing converts the weights to float32 once. Without folding they keep their trained values, so the
            # graph's results equal those of eager mode bit for bit.
            module = torch.jit.freeze(module, optimize_numerics=False)
    return module


def load_weights(path: Path) -> dict[str, Tensor]:
    """Load the state dict of an exported classifier in float32. It is empty if the file holds a graph only."""
    with ignore_deprecation(), path.open("rb") as file:
        stored = torch.jit.load(file, map_location="cpu").state_dict()
    return {
        name.replace("parametrizations.", "").removesuffix(".original"): weight.float() if weight.dim() else weight
        for name, weight in stored.items()
    }


def to_channels_last(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert the inputs of a half-precision model to channels-last memory format, in which convolutions are faster.

    Convolutions keep the format in their outputs. Inputs of a float32 model are not converted.
    """
    return images if dtype is torch.float32 else images.contiguous(memory_format=torch.channels_last)


class TorchScriptEngine(Engine):
    """TorchScript on the CPU or, without CUDA graphs, on a GPU.

    Args:
        model: An exported `model.pt`.
        device: Device that computes.
        dtype: Data type of the activations, float32 or a half precision.
    """

    sizes = CPU_BATCH_SIZES

    def __init__(self, model: Path, device: str = "cpu", dtype: torch.dtype = torch.float32):
        # NVIDIA GPUs compute float32 convolutions in TF32.
        exact = dtype is torch.float32 and device == "cpu"
        self.name = f"torchscript-{device}{_SUFFIXES[dtype]}"
        self.tolerance = MAX_DEVIATION["float32" if exact else "half"]
        self._module = load(model, device)
        self._device = device
        self._dtype = dtype

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Compute logits, see `Engine`."""
        with torch.inference_mode():
            inputs = to_channels_last(torch.from_numpy(images).to(self._device), self._dtype)
            logits: NDArray[np.float32] = self.compute_logits(inputs).cpu().numpy()
        return logits

    def compute_logits(self, images: Tensor) -> Tensor:
        """Compute logits, see `Engine.compute_logits`. The images keep their memory format."""
        autocast = torch.autocast(self._device, self._dtype, enabled=self._dtype is not torch.float32)
        with torch.no_grad(), autocast:
            logits: Tensor = self._module(images).float()
        return logits


def _compute_in_fresh_process(path: Path, images: Tensor) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder, "images.pt"), Path(folder, "logits.pt")
        torch.save(images, inputs)
        command = [sys.executable, "-m", __name__, str(path), str(inputs), str(outputs)]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode != 0:
            raise ExportError(f"{path} cannot be computed in a fresh process:\n{process.stderr}")
        logits: Tensor = torch.load(outputs, weights_only=True)
    return logits


@contextmanager
def ignore_deprecation() -> Iterator[None]:
    """Ignore the warning that torch.jit is deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", FutureWarning)
        yield


if __name__ == "__main__":
    model, images_file, logits_file = sys.argv[1:]
    with torch.inference_mode():
        torch.save(load(Path(model))(torch.load(images_file, weights_only=True)), logits_file)
