"""Test the evaluation measures against values computed by hand or with plain NumPy."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from training.evaluate import (
    count_confusion,
    evaluate,
    expected_calibration_error,
    fit_familiarity,
    fit_temperature,
    predict,
)


def logits_of(probabilities: list[list[float]]) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_accuracy_loss_and_classes_of_four_images_computed_by_hand() -> None:
    logits = logits_of(
        [
            [0.40, 0.20, 0.15, 0.10, 0.08, 0.05, 0.02],
            [0.40, 0.20, 0.15, 0.10, 0.08, 0.05, 0.02],
            [0.02, 0.05, 0.08, 0.10, 0.15, 0.20, 0.40],
            [0.02, 0.05, 0.08, 0.10, 0.15, 0.20, 0.40],
        ]
    )
    result = evaluate(logits, torch.tensor([0, 4, 1, 6]))  # the true classes rank 1st, 5th, 6th and 1st
    assert result.images == 4
    assert result.top1 == 0.5
    assert result.top5 == 0.75
    assert result.loss == pytest.approx(-(math.log(0.4) + math.log(0.08) + math.log(0.05) + math.log(0.4)) / 4)
    assert result.per_class == [1, 0, None, None, 0, None, 1]  # None: no image of the class


def test_the_rate_of_a_class_is_over_its_own_images() -> None:
    logits = torch.eye(3)[[0, 0, 1, 2]]
    assert evaluate(logits, torch.tensor([0, 0, 0, 2])).per_class == [2 / 3, None, 1]


def test_confusion_has_true_classes_as_rows() -> None:
    logits = torch.eye(3)[[0, 0, 1, 2]]
    assert count_confusion(logits, torch.tensor([0, 0, 0, 2])).tolist() == [[2, 1, 0], [0, 0, 0], [0, 0, 1]]


def test_calibration_error_computed_by_hand() -> None:
    # The bins are 1/15 wide: 0.54 and 0.59 fall into the ninth, 0.62 into the tenth, 0.68 into the eleventh, and 1 into
    # the last.
    logits = logits_of([[0.54, 0.46], [0.59, 0.41], [0.62, 0.38], [0.68, 0.32], [1.0, 0.0]])
    labels = torch.tensor([1, 0, 0, 1, 0])
    expected = (abs(0.54 + 0.59 - 1) + abs(0.62 - 1) + abs(0.68 - 0) + abs(1 - 1)) / 5
    assert expected_calibration_error(logits, labels) == pytest.approx(expected)


def test_all_measures_equal_plain_numpy() -> None:
    random = np.random.default_rng(0)
    logits, labels = random.normal(0, 3, (500, 20)), random.integers(0, 20, 500)
    logits[np.arange(500), labels] += 3
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    confidence, predicted = probabilities.max(1), probabilities.argmax(1)
    ece = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            ece += inside.mean() * abs((predicted == labels)[inside].mean() - confidence[inside].mean())
    result = evaluate(torch.from_numpy(logits), torch.from_numpy(labels))
    assert result.top1 == pytest.approx((predicted == labels).mean())
    better = (logits > logits[np.arange(500), labels][:, None]).sum(1)
    assert result.top5 == pytest.approx((better < 5).mean())
    assert result.loss == pytest.approx(-np.log(probabilities[np.arange(500), labels]).mean())
    assert result.ece == pytest.approx(ece)
    assert result.per_class == pytest.approx([(predicted == labels)[labels == each].mean() for each in range(20)])


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_the_fitted_temperature_undoes_a_known_scale(scale: float) -> None:
    random = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(5000, 100, generator=random)
    labels = torch.multinomial(logits.softmax(1), 1, generator=random)[:, 0]  # calibrated by construction
    assert fit_temperature(scale * logits, labels) == pytest.approx(scale, rel=0.03)


def test_the_threshold_of_familiar_images_keeps_95_percent() -> None:
    logits = torch.arange(100.0)[:, None] + torch.tensor([0.0, 1.0])  # the score of row n is n + log(1 + e)
    fitted = fit_familiarity(logits[torch.randperm(100)])
    assert fitted.threshold == pytest.approx(0.05 * 99 + math.log(1 + math.e))
    assert (fitted.kept, fitted.images) == (0.95, 100)


def test_the_temperature_of_faultless_predictions_stays_within_reason() -> None:
    logits = 0.1 * torch.eye(100)
    assert fit_temperature(logits, torch.arange(100)) > 1e-3


def test_predictions_come_in_the_order_of_the_images_whatever_the_batch_size() -> None:
    images = torch.randint(0, 256, (7, 32, 32, 3), dtype=torch.uint8)
    shapes = []

    def first_pixel(batch: Tensor) -> Tensor:
        shapes.append(tuple(batch.shape))
        return batch[:, :, 0, 0].bfloat16()

    logits = predict(first_pixel, images, batch_size=3)
    assert shapes == [(3, 3, 32, 32), (3, 3, 32, 32), (1, 3, 32, 32)]
    assert logits.dtype is torch.float32
    assert torch.equal(logits, images[:, 0, 0].float())
