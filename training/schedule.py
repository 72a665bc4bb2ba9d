"""This module computes the learning rate of a recipe's schedule at any point of a run."""

import math

from training.recipes import Recipe

WARMUP_FRACTION = 0.25
"""Fraction of a one-cycle schedule in which the learning rate rises."""

_STEP_DIVISORS = ((10, 1), (15, 10), (25, 20), (math.inf, 50))  # (end epoch, divisor) pairs of the step schedule


def learning_rate(recipe: Recipe, progress: float) -> float:
    """Return the learning rate after `progress` epochs of a run; fractions count parts of an epoch."""
    if progress < recipe.epochs:
        peak, elapsed, epochs = recipe.learning_rate, progress, recipe.epochs
    else:
        peak, elapsed, epochs = recipe.finetune_learning_rate, progress - recipe.epochs, recipe.finetune_epochs
    done = elapsed / epochs
    match recipe.schedule:
        case "constant":
            return peak
        case "step":
            return peak / next(divisor for end, divisor in _STEP_DIVISORS if elapsed < end)
        case "cosine":
            return peak * (1 + math.cos(math.pi * done)) / 2
        case "one-cycle":
            return peak * min(done / WARMUP_FRACTION, (1 - done) / (1 - WARMUP_FRACTION))
