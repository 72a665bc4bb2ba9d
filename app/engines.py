"""Load runtimes (TorchScript, CUDA graphs, OpenVINO) that compute logits. All share one call signature.

In: an exported `model.pt`.  Out: an `Engine` that is warmed up and verified against PyTorch in float32.
An engine takes a uint8 batch [N, 3, 32, 32] and returns float32 logits [N, classes].
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

# Batch sizes for warm-up on the CPU. OpenVINO compiles for each batch size, TorchScript optimizes in its first calls.
_CPU_SIZES: tuple[int, ...] = (1, 2, 4, 8, 16)

# Batch sizes of the CUDA graphs. A GPU takes hardly longer for 32 images than for one.
_GPU_SIZES: tuple[int, ...] = (1, 8, 32, 64, 128, 256)

_EXAMPLES = 16  # images on which an engine is compared with PyTorch

# Largest accepted `deviation` of logits from PyTorch in float32. The shipped models deviate by 0.8 to 1.4 % in bfloat16
# and by 6 to 15 % in int8. The accuracy of an int8 model is measured when it is quantized.
_ROUNDING = 0.001
_REDUCED_PRECISION = 0.03
_QUANTISED = 0.3

_SUFFIXES = {torch.float32: "", torch.float16: "-f16", torch.bfloat16: "-bf16"}

# int8 is hardly faster than float32 on processors that have none of these instructions.
_INT8_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8")


class Engine(Protocol):
    """A runtime with a loaded model. One thread at a time may call it."""

    name: str
    tolerance: float
    """Largest accepted `deviation` from the logits of TorchScript in float32."""
    sizes: tuple[int, ...]
    """Batch sizes for warm-up and verification."""

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Compute logits.

        Args:
            images: uint8 [N, 3, 32, 32].

        Returns:
            float32 [N, classes].
        """
        ...


class EngineError(RuntimeError):
    """Error for a runtime that cannot compute a model."""


class TorchScriptEngine:
    """TorchScript on the CPU.

    Args:
        model: An exported `model.pt`.
        dtype: Data type of the activations, float32 or bfloat16.
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
    """TorchScript on a GPU, with one CUDA graph for each of a few batch sizes.

    A batch runs on the graph of the next larger size. A batch larger than the largest size is computed in parts. Images
    and logits pass through pinned memory, and the copies from and to the GPU are part of the graph.

    Args:
        model: An exported `model.pt`.
        dtype: Data type of the activations, a half precision or float32.
    """

    sizes = _GPU_SIZES
    tolerance = _REDUCED_PRECISION  # NVIDIA GPUs compute float32 convolutions in TF32

    def __init__(self, model: Path, dtype: torch.dtype = torch.float16):
        self.name = "torchscript-cuda" + _SUFFIXES[dtype]
        logits_of = partial(_logits_on_gpu, torchscript.load(model, "cuda"), dtype)
        self._images = torch.zeros(max(_GPU_SIZES), 3, 32, 32, dtype=torch.uint8, pin_memory=True)
        self._logits = torch.empty(len(self._images), logits_of(self._images[:1]).shape[1], pin_memory=True)
        pool = torch.cuda.graph_pool_handle()  # graphs share memory because one runs at a time

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
        """Write the logits of one batch, which is at most as large as the largest graph, into `logits`."""
        count = len(images)
        self._images.numpy()[:count] = images
        with torch.cuda.stream(_serving_stream()):
            self._graphs[min(size for size in _GPU_SIZES if size >= count)]()
        _serving_stream().synchronize()
        logits[:] = self._logits.numpy()[:count]


@cache
def _serving_stream() -> torch.cuda.Stream:
    """Return the CUDA stream that all engines share, because their graphs may share library workspaces.

    Its high priority lets serving preempt training on the same GPU.
    """
    return torch.cuda.Stream(priority=-1)


def _logits_on_gpu(module: Callable[[Tensor], Tensor], dtype: torch.dtype, images: Tensor) -> Tensor:
    """Compute float32 logits on the GPU from uint8 images in pinned memory."""
    with _computing("cuda", dtype):
        return module(_laid_out(images.to("cuda", non_blocking=True), dtype)).float()


def _laid_out(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert half-precision inputs to channels-last memory format, in which convolutions are faster.

    Convolutions keep the format in their outputs. float32 inputs are not converted.
    """
    return images if dtype is torch.float32 else images.contiguous(memory_format=torch.channels_last)


@contextmanager
def _computing(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Enter inference mode, with autocast to `dtype` unless that is float32."""
    with torch.inference_mode(), torch.autocast(device, dtype, enabled=dtype is not torch.float32):
        yield


class OpenVinoEngine:
    """OpenVINO on the CPU.

    Args:
        file: `model.pt` or `int8.xml`.
        precision: Precision of the operations that are not quantized, see `Compiled`.
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
    """Load the fastest runtime for a model on a device, and warm it up.

    Args:
        model: An exported `model.pt`.
        device: "auto" selects CUDA if a usable GPU exists, else the CPU.
        runtime: "auto" on the CPU tries three runtimes and takes the first whose logits match the model: int8, if the
            model has an int8 form and the processor has int8 instructions, then OpenVINO, then TorchScript. OpenVINO
            and TorchScript fall back to float32 if their fastest precision deviates too much. "torchscript" on the CPU
            always computes in float32, so its logits are bit-identical to offline evaluation.

    Raises:
        EngineError: No candidate runtime can compute the model.
    """
    if device == "auto":
        if torch.cuda.is_available() and runtime in ("auto", "torchscript"):  # OpenVINO engines run on the CPU only
            try:
                return load(model, "cuda", runtime)
            except EngineError:  # another process may hold all GPU memory
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
            except Exception as error:  # a third-party runtime may raise any exception
                failures.append(f"{candidate} cannot compute {model}: {error}")
                log.warning(failures[-1])
                if not isinstance(error, EngineError):
                    break  # another precision would fail as well
    raise EngineError("; ".join(failures))


def _computes_int8() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(instructions) for instructions in _INT8_INSTRUCTIONS)


def _ready(make: Callable[[], Engine], model: Path) -> Engine:
    """Make an engine, warm it up, and verify its logits at each batch size.

    Raises:
        EngineError: The logits deviate from those of TorchScript in float32 by more than the engine's tolerance, or the
            model computes logits that are not finite.
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
    """Return the relative L2 error of logits, after the mean over classes is subtracted from each row.

    Softmax depends only on differences between classes, hence the subtraction. The error is relative, so the same
    tolerance holds for a model with small logits, whose predictions are uncertain.

    Args:
        logits: float32 [N, classes].
        expected: Reference logits, float32 [N, classes].

    Returns:
        0 for equal logits, 1 for logits that are constant over the classes.
    """
    centred, right = (each - each.mean(1, keepdims=True) for each in (logits, expected))
    return float(np.linalg.norm(centred - right) / np.linalg.norm(right))
