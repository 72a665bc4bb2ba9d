"""Measures a classifier: logits of a whole split in, accuracy, loss and calibration out."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from training.store import Evaluation

CALIBRATION_BINS = 15
BATCH_SIZES = {"cpu": 100, "cuda": 500}
"""Images computed together where nothing is learnt, by device."""
MIN_TEMPERATURE = 0.05  # faultless predictions would have none at all
_BISECTIONS = 40


def predict(model: Callable[[Tensor], Tensor], images: Tensor, batch_size: int | None = None) -> Tensor:
    """Logits of all images.

    Args:
        model: uint8 [B, 3, 32, 32] to logits [B, classes]; must be in evaluation mode.
        images: uint8 [N, 32, 32, 3] on the model's device.
        batch_size: by default what computes them fast on that device.

    Returns:
        float32 [N, classes] on the CPU.
    """
    batch_size = batch_size or BATCH_SIZES[images.device.type]
    with torch.inference_mode():
        return torch.cat([model(batch.permute(0, 3, 1, 2)).float() for batch in images.split(batch_size)]).cpu()


def evaluate(logits: Tensor, labels: Tensor) -> Evaluation:
    """All measures of one split.

    Args:
        logits: float [N, classes].
        labels: int64 [N].
    """
    classes = logits.shape[1]
    ranked = logits.topk(min(5, classes)).indices
    correct = ranked == labels[:, None]
    hits = torch.bincount(labels[correct[:, 0]], minlength=classes)
    totals = torch.bincount(labels, minlength=classes)
    return Evaluation(
        images=len(labels),
        top1=correct[:, 0].double().mean().item(),
        top5=correct.any(1).double().mean().item(),
        loss=F.cross_entropy(logits.double(), labels).item(),
        ece=expected_calibration_error(logits, labels),
        per_class=(hits / totals.clamp(min=1)).tolist(),
    )


@dataclass(frozen=True)
class CalibrationBins:
    """Predictions in equal-width bins of confidence; a reliability diagram. 0 in empty bins.

    Attributes:
        images: float64 [bins], how many predictions fall into each.
        confidence: float64 [bins], their mean confidence.
        accuracy: float64 [bins], the share of them that is right.
    """

    images: Tensor
    confidence: Tensor
    accuracy: Tensor


def calibration_bins(logits: Tensor, labels: Tensor) -> CalibrationBins:
    """The reliability of predictions: float logits [N, classes], int64 labels [N]."""
    confidence, predicted = logits.double().softmax(1).max(1)
    bins = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)

    def total(values: Tensor) -> Tensor:
        return torch.zeros(CALIBRATION_BINS, dtype=torch.float64).index_add_(0, bins, values)

    images = total(torch.ones_like(confidence))
    filled = images.clamp(min=1)
    return CalibrationBins(images, total(confidence) / filled, total((predicted == labels).double()) / filled)


def expected_calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Mean gap between confidence and accuracy over equal-width bins of confidence, weighted by bin size."""
    bins = calibration_bins(logits, labels)
    return (bins.images * (bins.accuracy - bins.confidence).abs()).sum().item() / len(labels)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature at which predictions are as confident, on the mean, as they are right.

    Clarté et al. 2023, arXiv:2303.02644. On images held out it calibrates as well as the temperature of least
    cross-entropy (Guo et al. 2017) or better: benchmarks/calibration.py.

    Args:
        logits: float [N, classes] of validation images, uncalibrated.
        labels: int64 [N].
    """
    accuracy = (logits.argmax(1) == labels).double().mean()
    lower, upper = math.log(MIN_TEMPERATURE), -math.log(MIN_TEMPERATURE)
    for _ in range(_BISECTIONS):  # confidence falls with the temperature
        middle = (lower + upper) / 2
        confidence = (logits.double() / math.exp(middle)).softmax(1).amax(1).mean()
        lower, upper = (middle, upper) if confidence > accuracy else (lower, middle)
    return math.exp((lower + upper) / 2)
