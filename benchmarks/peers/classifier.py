"""What the peers share: the model, the engine that runs it, and the way from an image to an answer.

Each peer adds only its own serving path around `decode`, `Classifier` and the settings below, which
`benchmarks/serving.py` hands over as environment variables:

    CLASSIFIER_MODEL    folder of a version in the model store: model.pt and card.json
    CLASSIFIER_ENGINE   torchscript (what the peers' documentation shows), or OpenVINO (what our service uses) in a
                        precision: openvino-bf16
    CLASSIFIER_PORT     of the loopback address
    CLASSIFIER_CORES    processors that it may use
    CLASSIFIER_WORKERS  processes that compute, each with its share of the processors; by default what is best

Of each peer's settings those are taken that answer most requests a second over 32 connections, on two cores.
"""

import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Waiting threads of a batch would otherwise spin, and take the processor from those that still compute.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

MODEL = Path(os.environ["CLASSIFIER_MODEL"])
ENGINE, _, PRECISION = os.environ.get("CLASSIFIER_ENGINE", "torchscript").partition("-")
PORT = int(os.environ.get("CLASSIFIER_PORT", "8000"))
CORES = int(os.environ.get("CLASSIFIER_CORES", os.cpu_count() or 1))
# Measured: TorchScript gains little from a second thread, so it gets a process per core; OpenVINO does best as one.
WORKERS = int(os.environ.get("CLASSIFIER_WORKERS", CORES if ENGINE == "torchscript" else 1))
THREADS = max(1, CORES // WORKERS)
MAX_BATCH = 32

SIZE = 32
TOP_K = 5
_WARMUP_SIZES = (1, 2, 4, 8, 16, 32)

Images = NDArray[np.uint8]
Answer = dict[str, Any]


def decode(data: bytes) -> Images:
    """The central square of an encoded image: uint8 [3, 32, 32]."""
    return pixels(Image.open(io.BytesIO(data)))


def pixels(image: Image.Image) -> Images:
    """The central square of an opened image: uint8 [3, 32, 32]."""
    image.draft("RGB", (2 * SIZE, 2 * SIZE))  # a JPEG is decoded at an eighth, a quarter or half of its size
    image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return np.asarray(image).transpose(2, 0, 1)


class Classifier:
    """A loaded and warm model. To be called by one thread at a time."""

    def __init__(self) -> None:
        self.labels: list[str] = json.loads((MODEL / "card.json").read_text())["classes"]
        self._logits = {"torchscript": _torchscript, "openvino": _openvino}[ENGINE](MODEL / "model.pt", THREADS)
        for size in _WARMUP_SIZES:
            self(list(np.zeros((size, 3, SIZE, SIZE), np.uint8)))

    def __call__(self, images: Sequence[Images]) -> list[Answer]:
        """The five most probable classes of every image [3, 32, 32], best first."""
        logits = self._logits(np.stack(images))
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        probabilities = exponentials / exponentials.sum(1, keepdims=True)
        order = np.argsort(-probabilities, axis=1)[:, :TOP_K]
        return [
            {"classes": [{"label": self.labels[k], "probability": float(row[k])} for k in best]}
            for row, best in zip(probabilities, order, strict=True)
        ]


def _torchscript(path: Path, threads: int) -> Callable[[Images], NDArray[np.float32]]:
    """In bfloat16 where the processor computes faster in it, and with channels last, as PyTorch's tuning guide advises.

    With channels last one thread computes 113 instead of 80 images a second of `resnet18`, and as many of `resnet`; two
    together 758 instead of 665 of `resnet`.
    """
    torch.set_num_threads(threads)
    module = torch.jit.freeze(torch.jit.load(str(path)))  # which our service does as well
    fast = bool(torch.cpu.get_capabilities().get("avx512_bf16"))

    def logits(images: Images) -> NDArray[np.float32]:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=fast):
            laid_out = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)
            computed: NDArray[np.float32] = module(laid_out).float().numpy()
        return computed

    return logits


def _openvino(path: Path, threads: int) -> Callable[[Images], NDArray[np.float32]]:
    """The same conversion and hints as in `training/openvino_ir.py`."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # it would report to its maker
    import openvino

    shape = openvino.PartialShape([-1, 3, SIZE, SIZE])
    converted = openvino.convert_model(torch.jit.load(str(path)), input=(shape, openvino.Type.u8))
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads} | (
        {"INFERENCE_PRECISION_HINT": PRECISION} if PRECISION else {}
    )
    request = openvino.Core().compile_model(converted, "CPU", config).create_infer_request()

    def logits(images: Images) -> NDArray[np.float32]:
        computed: NDArray[np.float32] = request.infer({0: images}, share_inputs=True)[0]
        return computed

    return logits
