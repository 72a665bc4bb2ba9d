"""Runtimes that compute logits: one call signature, uint8 batch in, float32 logits out.

In: an exported `model.pt`.  Out: an `Engine`, warmed up, and compared with PyTorch in float32.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.settings import Device, Runtime
from training import torchscript
from training.cuda_graph import WARMUP_CALLS, Recorded
from training.openvino_ir import INT8, Compiled

log = logging.getLogger(__name__)

# OpenVINO prepares itself for each size of batch, TorchScript in the course of its first calls.
_CPU_SIZES: tuple[int, ...] = (1, 2, 4, 8, 16)

# Of batches on a GPU, which takes hardly longer for 32 images than for one.
_GPU_SIZES: tuple[int, ...] = (1, 8, 32, 64, 128, 256)

_EXAMPLES = 16  # images with which engines are compared

# By how much logits may deviate from those in float32, see `deviation`. With the shipped models they do by 0.8 to 1.4 %
# in bfloat16, and by 6 to 15 % in int8, whose accuracy is measured when a model is quantised.
_ROUNDING = 0.001
_REDUCED_PRECISION = 0.03
_QUANTISED = 0.3

_SUFFIXES = {torch.float32: "", torch.float16: "-f16", torch.bfloat16: "-bf16"}

# Without these instructions int8 is hardly faster than float32.
_INT8_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8")


class Engine(Protocol):
    """Computes logits. Called by one thread at a time."""

    name: str
    tolerance: float
    """The largest `deviation` from TorchScript's logits in float32."""
    sizes: tuple[int, ...]
    """Of batches with which it is warmed up, and compared."""

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [N, 3, 32, 32] to float32 [N, classes]."""
        ...


class EngineError(RuntimeError):
    """A runtime cannot be used for a model."""


class TorchScriptEngine:
    """PyTorch's own runtime on the CPU.

    Args:
        dtype: of the activations: float32 or bfloat16.
    """

    sizes = _CPU_SIZES

    def __init__(self, model: Path, dtype: torch.dtype = torch.float32):
        self.name = "torchscript-cpu" + _SUFFIXES[dtype]
        self.tolerance = _ROUNDING if dtype is torch.float32 else _REDUCED_PRECISION
        self._module = torchscript.load(model)
        self._dtype = dtype

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with _computing("cpu", self._dtype):
            logits: NDArray[np.float32] = self._module(_laid_out(torch.from_numpy(images), self._dtype)).float().numpy()
        return logits


class CudaEngine:
    """PyTorch's runtime on a GPU, which computes batches of a few sizes, each recorded as a CUDA graph.

    A batch is filled up to the next size, a larger one computed in parts. Images and logits pass through pinned memory,
    which the GPU reads and writes by itself in the course of the graph.

    Args:
        dtype: of the activations: a half precision or float32.
    """

    sizes = _GPU_SIZES
    tolerance = _REDUCED_PRECISION  # NVIDIA's convolve even float32 in TF32

    def __init__(self, model: Path, dtype: torch.dtype = torch.float16):
        self.name = "torchscript-cuda" + _SUFFIXES[dtype]
        logits_of = partial(_logits_on_gpu, torchscript.load(model, "cuda"), dtype)
        self._images = torch.zeros(max(_GPU_SIZES), 3, 32, 32, dtype=torch.uint8, pin_memory=True)
        self._logits = torch.empty(len(self._images), logits_of(self._images[:1]).shape[1], pin_memory=True)
        pool = torch.cuda.graph_pool_handle()  # common to all, as they run one after the other

        def recorded(size: int) -> Recorded[Tensor]:
            images, logits = self._images[:size], self._logits[:size]
            return Recorded(lambda: logits.copy_(logits_of(images), non_blocking=True), pool)

        self._graphs = {size: recorded(size) for size in sorted(_GPU_SIZES, reverse=True)}
        for size in self._graphs:
            for _ in range(WARMUP_CALLS + 1):
                self(self._images[:size].numpy())

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits = np.empty((len(images), self._logits.shape[1]), np.float32)
        for start in range(0, len(images), len(self._images)):
            part = slice(start, start + len(self._images))
            self._compute(images[part], logits[part])
        return logits

    def _compute(self, images: NDArray[np.uint8], logits: NDArray[np.float32]) -> None:
        """Fill in the logits of at most as many images as the largest size has."""
        count = len(images)
        self._images.numpy()[:count] = images
        with torch.cuda.stream(_serving_stream()):
            self._graphs[min(size for size in _GPU_SIZES if size >= count)]()
        _serving_stream().synchronize()
        logits[:] = self._logits.numpy()[:count]


@cache
def _serving_stream() -> torch.cuda.Stream:
    """Of all engines, as their graphs may share libraries' memory. It goes before what trains on the same GPU."""
    return torch.cuda.Stream(priority=-1)


def _logits_on_gpu(module: Callable[[Tensor], Tensor], dtype: torch.dtype, images: Tensor) -> Tensor:
    """float32 logits, on the GPU, of uint8 images in pinned memory."""
    with _computing("cuda", dtype):
        return module(_laid_out(images.to("cuda", non_blocking=True), dtype)).float()


def _laid_out(images: Tensor, dtype: torch.dtype) -> Tensor:
    """As convolutions want them that compute in a half precision, and hand on what they compute: channels last."""
    return images if dtype is torch.float32 else images.contiguous(memory_format=torch.channels_last)


@contextmanager
def _computing(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Nothing is learnt, and activations are of this type."""
    with torch.inference_mode(), torch.autocast(device, dtype, enabled=dtype is not torch.float32):
        yield


class OpenVinoEngine:
    """OpenVINO on the CPU.

    Args:
        file: `model.pt` or `int8.xml`.
        precision: of what is not quantised, see `Compiled`.
    """

    sizes = _CPU_SIZES

    def __init__(self, file: Path, precision: str | None = None):
        self._compiled = Compiled(file, precision)
        precision = "int8" if file.name == INT8 else self._compiled.precision
        self.name = f"openvino-{precision}"
        self.tolerance = {"f32": _ROUNDING, "int8": _QUANTISED}.get(precision, _REDUCED_PRECISION)

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._compiled(images)


def load(model: Path, device: Device, runtime: Runtime) -> Engine:
    """The fastest runtime for a model on a device, warmed up.

    Args:
        model: an exported `model.pt`.
        device: "auto" is CUDA where there is one that can be used.
        runtime: "auto" tries on the CPU, until one computes what the model does: its int8 form, if it has one and the
            processor has instructions for that; "openvino"; TorchScript. These take float32 where the precision they
            are fastest in is too coarse for the model. "torchscript" computes on the CPU always in float32, to the
            last bit what offline evaluation does.

    Raises:
        EngineError: the runtime that was asked for cannot be used.
    """
    if device == "auto":
        if torch.cuda.is_available() and runtime in ("auto", "torchscript"):  # OpenVINO's are for the CPU
            try:
                return load(model, "cuda", runtime)
            except EngineError:  # another process may have all its memory
                log.warning("%s is computed on the CPU instead", model)
        device = "cpu"
    int8 = model.with_name(INT8)
    candidates: tuple[Runtime, ...] = (runtime,)
    if runtime == "auto":
        candidates = ("openvino", "torchscript") if device == "cpu" else ("torchscript",)
        if device == "cpu" and int8.exists() and _computes_int8():
            candidates = ("int8", *candidates)
    on_gpu = (lambda: CudaEngine(model), lambda: CudaEngine(model, torch.float32))
    on_cpu: tuple[Callable[[], Engine], ...] = (lambda: TorchScriptEngine(model),)
    if runtime == "auto" and torchscript.computes_bfloat16():
        on_cpu = (lambda: TorchScriptEngine(model, torch.bfloat16), *on_cpu)
    makers: dict[Runtime, tuple[Callable[[], Engine], ...]] = {
        "int8": (lambda: OpenVinoEngine(int8),),
        "openvino": (lambda: OpenVinoEngine(model), lambda: OpenVinoEngine(model, "f32")),
        "torchscript": on_gpu if device == "cuda" else on_cpu,
    }
    failures = []
    for candidate in candidates:
        for make in makers[candidate]:
            try:
                return _ready(make, model)
            except Exception as error:  # whatever a foreign runtime may raise
                failures.append(f"{candidate} cannot compute {model}: {error}")
                log.warning(failures[-1])
                if not isinstance(error, EngineError):
                    break  # no precision would help
    raise EngineError("; ".join(failures))


def _computes_int8() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(instructions) for instructions in _INT8_INSTRUCTIONS)


def _ready(make: Callable[[], Engine], model: Path) -> Engine:
    """A warm engine that computes what the model does.

    Raises:
        EngineError: it does not.
    """
    engine = make()
    images = torchscript.example_images(_EXAMPLES).numpy()
    expected = TorchScriptEngine(model)(images)
    if not np.isfinite(expected).all():
        raise EngineError("the model computes logits that are not finite")
    for size in engine.sizes:
        rows = np.arange(size) % _EXAMPLES
        deviates = deviation(engine(images[rows]), expected[rows])
        if not deviates <= engine.tolerance:
            raise EngineError(f"{engine.name}: logits deviate from those in float32 by {deviates:.2%}")
    return engine


def deviation(logits: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """How far logits [N, classes] are from those expected, as a share of what these tell: 1 where they tell nothing.

    Only differences between classes count, as in probabilities. Answers of little certainty may not deviate by more.
    """
    centred, right = (each - each.mean(1, keepdims=True) for each in (logits, expected))
    return float(np.linalg.norm(centred - right) / np.linalg.norm(right))
