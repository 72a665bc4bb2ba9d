"""Measures a classifier: logits of a whole split in, accuracy, loss and calibration out."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from training.store import Evaluation

CALIBRATION_BINS = 15
MIN_TEMPERATURE = 0.05  # faultless predictions would have none at all


def predict(model: Callable[[Tensor], Tensor], images: Tensor, batch_size: int = 500) -> Tensor:
    """Logits of all images.

    Args:
        model: uint8 [B, 3, 32, 32] to logits [B, classes]; must be in evaluation mode.
        images: uint8 [N, 32, 32, 3] on the model's device.

    Returns:
        float32 [N, classes] on the CPU.
    """
    with torch.inference_mode():
        return torch.cat([model(batch.permute(0, 3, 1, 2)).float().cpu() for batch in images.split(batch_size)])


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


def expected_calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Mean gap between confidence and accuracy over equal-width bins of confidence, weighted by bin size."""
    confidence, predicted = logits.double().softmax(1).max(1)
    bins = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    gaps = torch.zeros(CALIBRATION_BINS, dtype=torch.float64)
    gaps.index_add_(0, bins, (predicted == labels).double() - confidence)
    return gaps.abs().sum().item() / len(labels)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature that minimises the cross-entropy of logits / temperature (Guo et al. 2017).

    Args:
        logits: float [N, classes] of validation images, uncalibrated.
        labels: int64 [N].
    """
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits.double() / log_temperature.exp(), labels)
        value.backward()
        return value

    optimizer.step(loss)
    return min(max(log_temperature.exp().item(), MIN_TEMPERATURE), 1 / MIN_TEMPERATURE)
