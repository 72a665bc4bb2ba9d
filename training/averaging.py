"""An exponential moving mean of a network's weights, which often generalizes better than the weights themselves.

Polyak & Juditsky 1992; with a decay, as in Tarvainen & Valpola 2017, arXiv:1703.01780. In: a network whose weights
change in place.  Out: the same network, which holds the mean within `applied()`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """The mean of all floating-point weights and running statistics of a network; it begins with those of now.

    Args:
        network: trained in place, so that its tensors stay where they are.
        decay: share of the old mean in the new one, 0-1.
    """

    def __init__(self, network: nn.Module, decay: float):
        self._decay = decay
        self._weights = [value for value in network.state_dict().values() if value.is_floating_point()]
        self._means = [value.clone() for value in self._weights]

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of now into the mean."""
        torch._foreach_lerp_(self._means, self._weights, 1 - self._decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network holds the mean, and its own weights again afterwards."""
        own = [value.clone() for value in self._weights]
        self._overwrite(self._means)
        try:
            yield
        finally:
            self._overwrite(own)

    @torch.no_grad()
    def _overwrite(self, values: list[Tensor]) -> None:
        for weight, value in zip(self._weights, values, strict=True):
            weight.copy_(value)
