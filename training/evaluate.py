"""Evaluation computes the logits of a whole split and, from them, accuracy, loss and calibration."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from training.store import Evaluation, FamiliarityScore, FamiliarityThreshold

CALIBRATION_BINS = 15
FAMILIAR = 0.95
"""Fraction of the held-out images that the threshold of familiar images keeps."""
BATCH_SIZES = {"cpu": 100, "cuda": 500}
"""Batch size without gradients, by device type."""
MIN_TEMPERATURE = 0.05  # predictions without errors would drive it to zero
_BISECTIONS = 40


def predict(model: Callable[[Tensor], Tensor], images: Tensor, batch_size: int | None = None) -> Tensor:
    """Compute the logits of all images.

    Args:
        model: Function from uint8 [B, 3, 32, 32] to logits [B, classes], in evaluation mode.
        images: uint8 [N, 32, 32, 3] on the model's device.
        batch_size: Images per batch. The default is a fast size for the device, see `BATCH_SIZES`.

    Returns:
        float32 [N, classes] on the CPU.
    """
    batch_size = batch_size or BATCH_SIZES[images.device.type]
    with torch.inference_mode():
        return torch.cat([model(batch.permute(0, 3, 1, 2)).float() for batch in images.split(batch_size)]).cpu()


def evaluate(logits: Tensor, labels: Tensor) -> Evaluation:
    """Compute all measures of one split.

    Args:
        logits: float [N, classes].
        labels: int64 [N].
    """
    top5 = _top5(logits)
    correct = top5 == labels[:, None]
    confusion = _count_pairs(labels, top5[:, 0], logits.shape[1]).tolist()
    return Evaluation(
        images=len(labels),
        top1=correct[:, 0].double().mean().item(),
        top5=correct.any(1).double().mean().item(),
        loss=F.cross_entropy(logits.double(), labels).item(),
        ece=expected_calibration_error(logits, labels),
        per_class=[row[label] / images if (images := sum(row)) else None for label, row in enumerate(confusion)],
    )


def count_confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Count the images of each true and predicted class.

    Args:
        logits: float [N, classes].
        labels: int64 [N].

    Returns:
        int64 [classes, classes]. Rows are true classes, columns are predicted classes.
    """
    return _count_pairs(labels, _top5(logits)[:, 0], logits.shape[1])


def _count_pairs(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def _top5(logits: Tensor) -> Tensor:
    """Return the five most probable classes of each image, best first: int64 [N, 5], or [N, classes] if fewer."""
    return logits.topk(min(5, logits.shape[1])).indices


@dataclass(frozen=True)
class CalibrationBins:
    """The data of a reliability diagram: predictions in bins of equal width in confidence. Empty bins have zeros.

    Attributes:
        images: float64 [bins], number of predictions in each bin.
        confidence: float64 [bins], mean confidence of these predictions.
        accuracy: float64 [bins], fraction of these predictions that is correct.
    """

    images: Tensor
    confidence: Tensor
    accuracy: Tensor


def compute_calibration_bins(logits: Tensor, labels: Tensor) -> CalibrationBins:
    """Sort predictions into `CALIBRATION_BINS` bins of confidence.

    Args:
        logits: float [N, classes].
        labels: int64 [N].
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    bins = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)

    def sum_per_bin(values: Tensor) -> Tensor:
        return torch.zeros(CALIBRATION_BINS, dtype=torch.float64).index_add_(0, bins, values)

    images = sum_per_bin(torch.ones_like(confidence))
    divisor = images.clamp(min=1)  # leaves empty bins at zero
    correct = (predicted == labels).double()
    return CalibrationBins(images, sum_per_bin(confidence) / divisor, sum_per_bin(correct) / divisor)


def expected_calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Compute the expected calibration error (Guo et al. 2017, arXiv:1706.04599), 0-1.

    It is the mean gap between confidence and accuracy over bins of equal width in confidence, weighted by bin size.
    """
    bins = compute_calibration_bins(logits, labels)
    return (bins.images * (bins.accuracy - bins.confidence).abs()).sum().item() / len(labels)


def fit_familiarity(logits: Tensor, score: FamiliarityScore = "energy") -> FamiliarityThreshold:
    """Fit the score below which an image is probably none of the classes, see `FamiliarityThreshold`.

    Args:
        logits: float [N, classes], calibrated logits of held-out images. For "agreement" the mean of both members'.
        score: Name of the score.
    """
    scores = logits.double().logsumexp(1)
    threshold = scores.quantile(1 - FAMILIAR).item()
    kept = (scores >= threshold).double().mean().item()
    return FamiliarityThreshold(score=score, threshold=threshold, kept=kept, images=len(scores))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Fit the temperature at which the mean confidence of the predictions equals their accuracy.

    The method is that of Clarté et al. 2023, arXiv:2303.02644. On held-out images it calibrates at least as well as the
    temperature that minimizes cross-entropy (Guo et al. 2017); research/calibration.py measures both.

    Args:
        logits: float [N, classes], uncalibrated logits of validation images.
        labels: int64 [N].

    Returns:
        The divisor of the logits, between `MIN_TEMPERATURE` and its inverse.
    """
    accuracy = (logits.argmax(1) == labels).double().mean()
    lower, upper = math.log(MIN_TEMPERATURE), -math.log(MIN_TEMPERATURE)
    for _ in range(_BISECTIONS):  # confidence falls with the temperature
        middle = (lower + upper) / 2
        confidence = (logits.double() / math.exp(middle)).softmax(1).amax(1).mean()
        lower, upper = (middle, upper) if confidence > accuracy else (lower, middle)
    return math.exp((lower + upper) / 2)
