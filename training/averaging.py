"""`WeightAverage` keeps an exponential moving average of a network's weights.

The average often generalizes better than the weights themselves. The method is averaging (Polyak & Juditsky 1992) with
a decay, as in Tarvainen & Valpola 2017, arXiv:1703.01780.

Input: a network whose weights change in place.
Output: the same network, with the averaged weights inside `apply()`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """The moving average of all floating-point weights and running statistics of a network.

    The average starts with the current weights.

    Args:
        network: Network that is trained in place, so that its tensors keep their addresses.
        decay: Share of the old average in the new one, 0-1.
    """

    def __init__(self, network: nn.Module, decay: float):
        self._decay = decay
        self._weights = [value for value in network.state_dict().values() if value.is_floating_point()]
        self._averages = [value.clone() for value in self._weights]

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current weights."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self._decay)

    @contextmanager
    def apply(self) -> Iterator[None]:
        """Put the averaged weights into the network, and restore the trained weights at exit."""
        trained = [value.clone() for value in self._weights]
        self._overwrite(self._averages)
        try:
            yield
        finally:
            self._overwrite(trained)

    @torch.no_grad()
    def _overwrite(self, values: list[Tensor]) -> None:
        for weight, value in zip(self._weights, values, strict=True):
            weight.copy_(value)
