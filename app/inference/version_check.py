"""Check that a version computes what its card says, before the service loads it.

    folder with card and files --check_version--> engine and accuracy, or an error

A check computes the files of a stranger, so `app.inference.check_process` runs it in a process with limited resources.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.inference.check_process import CheckResult
from training.dataset import is_at_hand, load_dataset
from training.evaluate import predict
from training.runtimes import Runtime, selection, torchscript
from training.runtimes.engine import MAX_DEVIATION, Engine, EngineError, deviation, example_images
from training.runtimes.openvino import INT8
from training.store import CARD, CASCADE, MODEL, Cascade, ModelCard, Store

_BATCH = 16
_IMAGES = 1000  # test images on which the accuracy is measured
_STANDARD_ERRORS = 4
_MARGIN = 0.01  # an engine that serves may lose some tenths of a point


def check_version(folder: Path, store: Store, runtime: Runtime, source: str | None) -> CheckResult:
    """Check a version on the CPU.

    - `model.pt` maps uint8 [N, 3, 32, 32] to float32 [N, classes], and each image on its own.
    - The engine that serves it computes the logits of TorchScript in float32. So does the int8 form, whatever this
      processor prefers.
    - Its accuracy on test images is that of the card, if the data set of the card is at hand.

    Args:
        folder: Folder with the files of the version, among them its card.
        store: Model store with the members of a cascade.
        runtime: Runtime of the service.
        source: Data set of the service, see `load_dataset`.

    Raises:
        EngineError: The version does not compute what its card says.
        Exception: Third-party runtimes raise exceptions of many types.
    """
    card = ModelCard.model_validate_json((folder / CARD).read_bytes())
    if CASCADE in card.files:
        cascade = Cascade.model_validate_json((folder / CASCADE).read_bytes())
        engine = selection.load_cascade(store, cascade, "cpu", runtime)
    else:
        _require_contract(folder / MODEL, len(card.classes))
        engine = selection.load(folder / MODEL, "cpu", runtime)
        if INT8 in card.files:
            selection.load(folder / MODEL, "cpu", "int8")
    return _measure(engine, card, source)


def _require_contract(model: Path, classes: int) -> None:
    module, images = torchscript.load(model), example_images(_BATCH)
    with torch.inference_mode():
        logits: Any = module(images)
    found = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
    if found != f"torch.float32 {[_BATCH, classes]}":
        raise EngineError(
            f"{model.name} maps uint8 {[_BATCH, 3, 32, 32]} to {found.removeprefix('torch.')}; it must map them to "
            f"float32 {[_BATCH, classes]}"
        )
    with torch.inference_mode():
        alone = torch.cat([module(image) for image in images.split(1)])
    measured = deviation(alone.numpy(), logits.numpy())
    if not measured <= MAX_DEVIATION["float32"]:
        raise EngineError(f"the logits of an image deviate by {measured:.2%} between a batch and the image alone")


def _measure(engine: Engine, card: ModelCard, source: str | None) -> CheckResult:
    """Measure the accuracy on some test images, and compare it with that of the card."""
    dataset = load_dataset(source) if is_at_hand(source) else None
    if dataset is None or dataset.fingerprint != card.data:
        return CheckResult(engine=engine.name, images=0, top1=None)
    if list(dataset.classes) != card.classes:
        raise EngineError("the card names other classes than its data set")
    sample = dataset.test[np.random.default_rng(0).permutation(len(dataset.test))[:_IMAGES]]
    logits = predict(engine.compute_logits, torch.from_numpy(sample.images), _BATCH)
    top1 = float((logits.argmax(1).numpy() == sample.labels).mean())
    expected = card.test.top1
    allowed = _MARGIN + _STANDARD_ERRORS * math.sqrt(expected * (1 - expected) / len(sample))
    if abs(top1 - expected) > allowed:
        raise EngineError(
            f"its accuracy on {len(sample)} test images is {top1:.1%}, and its card says {expected:.1%}; upload it "
            "with its own card"
        )
    return CheckResult(engine=engine.name, images=len(sample), top1=top1)
