"""A cascade: the first member answers where it is confident, a weighted mean of both members answers elsewhere.

Input: the calibrated logits of both members, float32 [N, classes].
Output: logits whose softmax is the answer, float32 [N, classes].

The service batches each member on its own (`app.inference.cascade`). `CascadeEngine` computes one after the other.
"""

import numpy as np
from numpy.typing import NDArray

from training.runtimes.engine import Engine
from training.store import Cascade

Logits = NDArray[np.float32]


def compute_confidence(logits: Logits) -> NDArray[np.float64]:
    """Return the probability of the most probable class of each row, float64 [N]."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    confidence: NDArray[np.float64] = 1 / exponentials.sum(1)
    return confidence


def find_sent_on(cascade: Cascade, first: Logits) -> NDArray[np.intp]:
    """Return the rows of the images that are sent on, given the first member's logits [N, classes]."""
    return np.flatnonzero(compute_confidence(first) < cascade.threshold)


def answer(cascade: Cascade, first: Logits, rows: NDArray[np.intp], second: Logits) -> Logits:
    """Return the logits of the cascade, [N, classes].

    Args:
        cascade: Weights and temperature.
        first: Logits of the first member for all images, [N, classes].
        rows: Rows of the images that are sent on, [M].
        second: Logits of the second member for these images, [M, classes].
    """
    logits = first.copy()
    logits[rows] = mix(first[rows], second, cascade.weights, cascade.temperature)
    return logits


def mix(first: Logits, second: Logits, weights: tuple[float, float], temperature: float = 1.0) -> Logits:
    """Return the logarithm of the weighted mean of two predictions, divided by a temperature.

    Args:
        first: Logits of the first member, [N, classes].
        second: Logits of the second member for the same images, [N, classes].
        weights: Weights of the members' probabilities, with the sum 1.
        temperature: Divisor of the logarithm.
    """
    logarithm = np.logaddexp(np.log(weights[0]) + _log_softmax(first), np.log(weights[1]) + _log_softmax(second))
    mixed: Logits = (logarithm / temperature).astype(np.float32)
    return mixed


def average(first: Logits, second: Logits) -> Logits:
    """Return the mean of both members' logits, [N, classes]. Its energy is the score `agreement` of an image."""
    return (first + second) / np.float32(2)


def join_names(first: str, second: str) -> str:
    """Return one name for the engines of both members."""
    return f"{first} + {second}"


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


class CascadeEngine(Engine):
    """The engines of both members as one engine. The second one gets only the images that are sent on to it.

    Args:
        cascade: Threshold, weights and temperature.
        first: Engine of the first member.
        second: Engine of the second member.
    """

    def __init__(self, cascade: Cascade, first: Engine, second: Engine):
        self.name = join_names(first.name, second.name)
        self.tolerance = max(first.tolerance, second.tolerance)
        self.sizes = first.sizes
        self._cascade = cascade
        self._first = first
        self._second = second

    def __call__(self, images: NDArray[np.uint8]) -> Logits:
        """Compute logits, see `Engine`."""
        return self.compute(images)[0]

    def compute(self, images: NDArray[np.uint8]) -> tuple[Logits, Logits]:
        """Compute the logits of the cascade and those of its first member, both [N, classes]."""
        first = self._first(images)
        rows = find_sent_on(self._cascade, first)
        if not len(rows):
            return first, first
        return answer(self._cascade, first, rows, self._second(images[rows])), first
