"""The exported form of a classifier: TorchScript, uint8 [N, 3, 32, 32] in, float32 logits [N, classes] out.

PyTorch has deprecated TorchScript in favour of torch.export. Everything that touches torch.jit is in this module, so
that a successor replaces these few functions and nothing else.

Run as a program, it computes the logits of a file in a process that knows nothing of the network's definition:
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
    """The exported file does not compute what the network computes."""


class _StoredInHalf(nn.Module):
    """A parametrisation: a weight that is kept in float16 and computed with in float32."""

    def forward(self, stored: Tensor) -> Tensor:
        return stored.float()


def _matrices(classifier: nn.Module) -> list[tuple[nn.Module, str]]:
    """Modules and names of the weights that take most of a file; vectors stay in float32."""
    return [
        (module, name)
        for module in classifier.modules()
        for name, weight in module.named_parameters(recurse=False)
        if weight.dim() > 1
    ]


def round_weights(classifier: nn.Module) -> None:
    """Round weights, in place, to what an exported file holds: matrices in float16."""
    for module, name in _matrices(classifier):
        weight = module.get_parameter(name)
        weight.data.copy_(weight.data.half())


def save(classifier: nn.Module, path: Path) -> None:
    """Trace a classifier in evaluation mode, and check the written file in a fresh process.

    Args:
        classifier: uint8 [N, 3, 32, 32] to logits [N, classes], on the CPU; see `round_weights`.
        path: the file to write.

    Raises:
        OSError: the file cannot be written.
        ExportError: the reloaded file's logits differ from eager mode's by more than `TOLERANCE`.
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
        traced = torch.jit.trace(stored, (images,), check_trace=False)  # checked below, after a reload
        # By way of memory: PyTorch ends the process if it cannot write to a file.
        content = io.BytesIO()
        torch.jit.save(traced, content)
    path.write_bytes(content.getbuffer())
    difference = (_logits_in_fresh_process(path, images) - expected).abs().max().item()
    if not difference <= TOLERANCE:
        raise ExportError(
            f"{path}: logits differ from eager mode by up to {difference:g}; at most {TOLERANCE} is rounding"
        )


def computes_bfloat16() -> bool:
    """Whether PyTorch is faster in bfloat16 than in float32 on this processor."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(instructions) for instructions in ("avx512_bf16", "amx_bf16", "bf16"))


def load(path: Path, device: torch.device | str = "cpu") -> torch.jit.ScriptModule:
    """The classifier in an exported file, in evaluation mode."""
    with _deprecation_ignored():
        module: torch.jit.ScriptModule = torch.jit.load(str(path), map_location=device)
        if hasattr(module, "training"):
            # Weights become float32 for good, and stay as trained (no folding), so the graph computes bit for bit what
            # eager mode does.
            module = torch.jit.freeze(module, optimize_numerics=False)
    return module


def load_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of the classifier in an exported file, in float32; empty if the file holds only its graph."""
    with _deprecation_ignored():
        stored = torch.jit.load(str(path), map_location="cpu").state_dict()
    return {
        name.replace("parametrizations.", "").removesuffix(".original"): weight.float() if weight.dim() else weight
        for name, weight in stored.items()
    }


def example_images(count: int) -> Tensor:
    """Fixed uint8 images [count, 3, 32, 32] for tracing, parity checks and warm-up: smooth, not white noise."""
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
