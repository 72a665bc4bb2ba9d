"""`load` chooses the runtime of an exported model, for the service, for evaluation and for teachers alike.

Input: `model.pt`, for some models with an `int8.xml`, `model.pt2` or `model.onnx` beside it, and a purpose.
Output: an `Engine`.

    purpose         on a GPU                                  on a CPU
    serving         CUDA graphs in float16, then float32;     int8, OpenVINO in its fastest precision, OpenVINO in
                    then those of the CPU                     float32, TorchScript in bfloat16, then float32
    evaluation      TorchScript in float32                    TorchScript in float32, or int8 on request
    teaching        TorchScript in float16                    OpenVINO in its fastest precision
    online-teaching TorchScript in float16                    int8 if there is one, else as teaching

Serving takes the first candidate whose logits match the model. The runtimes "pt2" and "onnx" serve on a CPU if they are
chosen by name. The other purposes have exactly one candidate without such a check: the accuracies and training targets
that they compute must not depend on a tolerance.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from training.runtimes import Device, Runtime
from training.runtimes.cascade import CascadeEngine
from training.runtimes.cuda import CudaGraphEngine
from training.runtimes.engine import Engine, EngineError, deviation, example_images
from training.runtimes.forms import FORM_FILES
from training.runtimes.openvino import INT8, OpenVinoEngine, computes_int8
from training.runtimes.torch_export import TorchExportEngine
from training.runtimes.torchscript import TorchScriptEngine, computes_bfloat16
from training.store import CASCADE, MODEL, Cascade, ModelCard, Store

log = logging.getLogger(__name__)

Purpose = Literal["serving", "evaluation", "teaching", "online-teaching"]
"""Use of the logits. An online teacher runs in every training step; other teachers run once before training."""

_EXAMPLES = 16  # images on which an engine is compared with TorchScript in float32


@dataclass(frozen=True)
class Candidate:
    """A runtime that may compute a model.

    Attributes:
        runtime: Name of the runtime, never "auto".
        device: Device that computes.
        dtype: Data type of the activations; None for the fastest of OpenVINO.
        graphs: True for CUDA graphs.
    """

    runtime: Runtime
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: torch.dtype | None = None
    graphs: bool = False

    def __str__(self) -> str:
        precision = "" if self.dtype is None else f" in {str(self.dtype).removeprefix('torch.')}"
        return f"{self.runtime} on {self.device}{precision}"

    def load(self, model: Path, threads: int | None = None) -> Engine:
        """Load a model.

        Args:
            model: An exported `model.pt`.
            threads: Number of threads of OpenVINO, instead of one for each processor core.

        Raises:
            Exception: Third-party runtimes raise exceptions of many types.
        """
        if self.runtime == "int8":
            return OpenVinoEngine(model.with_name(INT8), threads=threads)
        if self.runtime == "pt2":
            return TorchExportEngine(model.with_name(FORM_FILES["pt2"]))
        if self.runtime == "onnx":
            return OpenVinoEngine(model.with_name(FORM_FILES["onnx"]), "f32", threads)
        if self.runtime == "openvino":
            return OpenVinoEngine(model, "f32" if self.dtype is torch.float32 else None, threads)
        dtype = self.dtype or torch.float32
        return CudaGraphEngine(model, dtype) if self.graphs else TorchScriptEngine(model, self.device, dtype)


def load_version(store: Store, card: ModelCard, device: Device = "auto", runtime: Runtime = "auto") -> Engine:
    """Load the engine that serves a published version: of its model, or of both members of a cascade.

    Args:
        store: The model store.
        card: Card of the version.
        device: See `load`.
        runtime: See `load`.

    Raises:
        StoreError: The version or a member is damaged.
        EngineError: No runtime can compute it.
    """
    folder = store.verify(card)
    if CASCADE not in card.files:
        return load(folder / MODEL, device, runtime)
    return load_cascade(store, store.cascade(card), device, runtime)


def load_cascade(store: Store, cascade: Cascade, device: Device = "auto", runtime: Runtime = "auto") -> Engine:
    """Load the engines of both members of a cascade as one engine, see `load_version`."""
    first, second = (load_version(store, store.member_card(member), device, runtime) for member in cascade.members)
    return CascadeEngine(cascade, first, second)


def load(
    model: Path,
    device: Device,
    runtime: Runtime = "auto",
    purpose: Purpose = "serving",
    threads: int | None = None,
) -> Engine:
    """Load the first candidate that can compute a model. An engine for serving is warmed up and verified.

    Args:
        model: An exported `model.pt`.
        device: "auto" selects CUDA if a usable GPU exists, else the CPU.
        runtime: "auto", or a runtime to choose from the candidates of the purpose. For serving, "torchscript" on the
            CPU always computes in float32, so its logits are bit-identical to those of evaluation.
        purpose: Use of the logits.
        threads: Number of threads of OpenVINO, instead of one for each processor core.

    Raises:
        EngineError: No candidate can compute the model.
    """
    refusals: list[str] = []
    unusable: set[tuple[Runtime, str]] = set()
    for candidate in list_candidates(model, device, runtime, purpose):
        if (candidate.runtime, candidate.device) in unusable:
            continue
        try:
            engine = candidate.load(model, threads)
            if purpose == "serving":
                _verify(engine, model)
        except Exception as error:  # a third-party runtime may raise any exception
            refusals.append(f"{candidate} cannot compute {model}: {error}")
            log.warning(refusals[-1])
            if not isinstance(error, EngineError):  # another precision would fail as well
                unusable.add((candidate.runtime, candidate.device))
            continue
        if refusals:
            log.warning("%s is computed by %s instead", model, engine.name)
        return engine
    raise EngineError("; ".join(refusals) or f"no runtime fits runtime={runtime} on device={device} for {purpose}")


def list_candidates(model: Path, device: Device, runtime: Runtime, purpose: Purpose) -> list[Candidate]:
    """List the candidates for a model in order of preference. The arguments are those of `load`."""
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    has_int8 = model.with_name(INT8).exists()
    match purpose:
        case "serving":
            candidates = []
            if on_gpu:
                candidates += [
                    Candidate("torchscript", "cuda", dtype, graphs=True) for dtype in (torch.float16, torch.float32)
                ]
            if runtime in FORM_FILES:
                candidates = [Candidate(runtime, dtype=torch.float32)]
            elif device != "cuda" or runtime in ("int8", "openvino"):  # these run on the CPU only
                if runtime == "int8" or (has_int8 and computes_int8()):
                    candidates.append(Candidate("int8"))
                candidates += [Candidate("openvino"), Candidate("openvino", dtype=torch.float32)]
                if runtime == "auto" and computes_bfloat16():
                    candidates.append(Candidate("torchscript", dtype=torch.bfloat16))
                candidates.append(Candidate("torchscript", dtype=torch.float32))
        case "evaluation":
            candidates = [Candidate("torchscript", "cuda" if on_gpu else "cpu", torch.float32), Candidate("int8")]
        case "teaching" | "online-teaching" if on_gpu:
            candidates = [Candidate("torchscript", "cuda", torch.float16)]
        case _:
            candidates = [Candidate("openvino")]
            if purpose == "online-teaching" and has_int8:
                candidates.insert(0, Candidate("int8"))
    suitable = [each for each in candidates if runtime in ("auto", each.runtime)]
    return suitable if purpose == "serving" else suitable[:1]


def _verify(engine: Engine, model: Path) -> None:
    """Warm an engine up and compare its logits with TorchScript in float32, at each of its batch sizes.

    Raises:
        EngineError: The logits deviate by more than the engine's tolerance, or the model computes logits that are not
            finite.
    """
    images = example_images(_EXAMPLES).numpy()
    expected = TorchScriptEngine(model)(images)
    if not np.isfinite(expected).all():
        raise EngineError("the model computes logits that are not finite")
    for size in engine.sizes:
        rows = np.arange(size) % _EXAMPLES
        measured = deviation(engine(images[rows]), expected[rows])
        if not measured <= engine.tolerance:
            raise EngineError(
                f"the logits of {engine.name} deviate from those in float32 by {measured:.2%}, more than "
                f"{engine.tolerance:.1%}"
            )
