"""This module saves and loads classifiers as TorchScript.

An exported classifier maps uint8 images [N, 3, 32, 32] to float32 logits [N, classes].

PyTorch has deprecated TorchScript in favor of torch.export. All uses of torch.jit are in this module, so that a
successor replaces only these few functions.

Run as a program, it computes the logits of a file in a process without the network's definition:
`python -m training.torchscript MODEL IMAGES LOGITS`.
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

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

# Rounding may differ between eager mode and the frozen graph; logits are of the order of 10.
TOLERANCE = 1e-3


class ExportError(RuntimeError):
    """The logits of the exported file differ from those of the network."""


class _StoredInHalf(nn.Module):
    """A parametrization that stores a weight in float16 and computes with it in float32."""

    def forward(self, stored: Tensor) -> Tensor:
        return stored.float()


def _matrices(classifier: nn.Module) -> list[tuple[nn.Module, str]]:
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
    for module, name in _matrices(classifier):
        weight = module.get_parameter(name)
        weight.data.copy_(weight.data.half())


def save(classifier: nn.Module, path: Path) -> None:
    """Trace a classifier in evaluation mode, write the file, and check it in a fresh process.

    Args:
        classifier: Module from uint8 [N, 3, 32, 32] to logits [N, classes], on the CPU, after `round_weights`.
        path: File to write.

    Raises:
        OSError: The file cannot be written.
        ExportError: The reloaded file's logits differ from those of eager mode by more than `TOLERANCE`.
    """
    images = example_images(8)
    with torch.inference_mode():
        expected = classifier(images)
    with torch.no_grad(), _deprecation_ignored():
        stored = copy.deepcopy(classifier)
        for module, name in _matrices(stored):
            weight = module.get_parameter(name)
            weight.data = weight.data.half()
            register_parametrization(module, name, _StoredInHalf().eval(), unsafe=True)
        traced = torch.jit.trace(stored, (images,), check_trace=False)  # the reloaded file is checked below
        # Serialize in memory, because PyTorch aborts the process if it cannot write to a file.
        content = io.BytesIO()
        torch.jit.save(traced, content)
    path.write_bytes(content.getbuffer())
    difference = (_logits_in_fresh_process(path, images) - expected).abs().max().item()
    if not difference <= TOLERANCE:
        raise ExportError(
            f"{path}: logits differ from eager mode by up to {difference:g}; at most {TOLERANCE} is rounding"
        )


def computes_bfloat16() -> bool:
    """Return whether the processor has bfloat16 instructions, with which PyTorch is faster than in float32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(instructions) for instructions in ("avx512_bf16", "amx_bf16", "bf16"))


def load(path: Path, device: torch.device | str = "cpu") -> torch.jit.ScriptModule:
    """Load the classifier of an exported file onto a device, in evaluation mode."""
    with _deprecation_ignored():
        module: torch.jit.ScriptModule = torch.jit.load(str(path), map_location=device)
        if hasattr(module, "training"):
            # Freezing converts the weights to float32 once. Without folding they keep their trained values, so the
            # graph's results equal those of eager mode bit for bit.
            module = torch.jit.freeze(module, optimize_numerics=False)
    return module


def load_weights(path: Path) -> dict[str, Tensor]:
    """Load the state dict of an exported classifier in float32. It is empty if the file holds a graph only."""
    with _deprecation_ignored():
        stored = torch.jit.load(str(path), map_location="cpu").state_dict()
    return {
        name.replace("parametrizations.", "").removesuffix(".original"): weight.float() if weight.dim() else weight
        for name, weight in stored.items()
    }


def example_images(count: int) -> Tensor:
    """Make fixed, smooth random uint8 images [count, 3, 32, 32] for tracing, parity checks and warm-up."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=random)
    smooth = nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear", align_corners=False)
    return (smooth * 255).to(torch.uint8)


def _logits_in_fresh_process(path: Path, images: Tensor) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder, "images.pt"), Path(folder, "logits.pt")
        torch.save(images, inputs)
        command = [sys.executable, "-m", __name__, str(path), str(inputs), str(outputs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ExportError(f"{path} does not run in a fresh process:\n{done.stderr}")
        logits: Tensor = torch.load(outputs, weights_only=True)
    return logits


@contextmanager
def _deprecation_ignored() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", FutureWarning)
        yield


if __name__ == "__main__":
    model, images_file, logits_file = sys.argv[1:]
    with torch.inference_mode():
        torch.save(load(Path(model))(torch.load(images_file, weights_only=True)), logits_file)
