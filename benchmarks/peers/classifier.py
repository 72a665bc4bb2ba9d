"""Code that the peers share: the model, the engine that runs it, and the path from an image to an answer.

Each peer adds only its own serving path around `decode`, `Classifier` and the settings below. `benchmarks/serving.py`
passes the settings as environment variables:

    CLASSIFIER_MODEL    folder of a version in the model store: model.pt and card.json
    CLASSIFIER_ENGINE   torchscript (as in the peers' documentation), or OpenVINO (as in our service) in a
                        precision: openvino-bf16
    CLASSIFIER_PORT     port on the loopback address
    CLASSIFIER_CORES    processors that the server may use
    CLASSIFIER_WORKERS  processes that compute, each with its share of the processors; the default is the fastest

Each peer has the settings that answer the most requests per second over 32 connections on two cores.
"""

import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# By default, waiting threads of a batch spin and take processor time from the threads that still compute.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

MODEL = Path(os.environ["CLASSIFIER_MODEL"])
ENGINE, _, PRECISION = os.environ.get("CLASSIFIER_ENGINE", "torchscript").partition("-")
PORT = int(os.environ.get("CLASSIFIER_PORT", "8000"))
CORES = int(os.environ.get("CLASSIFIER_CORES", os.cpu_count() or 1))
# In measurements TorchScript gains little from a second thread, so it gets one process per core. OpenVINO is fastest
# as one process.
WORKERS = int(os.environ.get("CLASSIFIER_WORKERS", CORES if ENGINE == "torchscript" else 1))
THREADS = max(1, CORES // WORKERS)
MAX_BATCH = 32

SIZE = 32
TOP_K = 5
_WARMUP_SIZES = (1, 2, 4, 8, 16, 32)

Images = NDArray[np.uint8]
Answer = dict[str, Any]


def decode(data: bytes) -> Images:
    """Return the central square of an encoded image as uint8 [3, 32, 32]."""
    return pixels(Image.open(io.BytesIO(data)))


def pixels(image: Image.Image) -> Images:
    """Return the central square of an opened image as uint8 [3, 32, 32]."""
    image.draft("RGB", (2 * SIZE, 2 * SIZE))  # decodes a JPEG at an eighth, a quarter or half of its size
    image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return np.asarray(image).transpose(2, 0, 1)


class Classifier:
    """A loaded and warm model. Only one thread may call it at a time."""

    def __init__(self) -> None:
        self.labels: list[str] = json.loads((MODEL / "card.json").read_text())["classes"]
        self._logits = {"torchscript": _torchscript, "openvino": _openvino}[ENGINE](MODEL / "model.pt", THREADS)
        for size in _WARMUP_SIZES:
            self(list(np.zeros((size, 3, SIZE, SIZE), np.uint8)))

    def __call__(self, images: Sequence[Images]) -> list[Answer]:
        """Return the five most probable classes of every image [3, 32, 32], best first."""
        logits = self._logits(np.stack(images))
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        probabilities = exponentials / exponentials.sum(1, keepdims=True)
        order = np.argsort(-probabilities, axis=1)[:, :TOP_K]
        return [
            {"classes": [{"label": self.labels[k], "probability": float(row[k])} for k in best]}
            for row, best in zip(probabilities, order, strict=True)
        ]


def _torchscript(path: Path, threads: int) -> Callable[[Images], NDArray[np.float32]]:
    """Load a TorchScript model that computes in bfloat16, if that is faster here, and in channels-last memory format.

    PyTorch's tuning guide advises channels last. With it, one thread computes 113 instead of 80 images per second of
    `resnet18`, and equally many of `resnet`. Two threads together compute 758 instead of 665 of `resnet`.
    """
    torch.set_num_threads(threads)
    module = torch.jit.freeze(torch.jit.load(str(path)))  # our service does the same
    fast = bool(torch.cpu.get_capabilities().get("avx512_bf16"))

    def logits(images: Images) -> NDArray[np.float32]:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=fast):
            laid_out = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)
            computed: NDArray[np.float32] = module(laid_out).float().numpy()
        return computed

    return logits


def _openvino(path: Path, threads: int) -> Callable[[Images], NDArray[np.float32]]:
    """Compile a model with the same conversion and hints as `training/runtimes/openvino.py`."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # disables telemetry
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
