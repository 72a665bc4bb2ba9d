"""Makes a recipe's optimizer, and holds the one that PyTorch does not have for convolutions.

PyTorch's own Muon takes matrices only; this one takes convolution filters as the matrices they are. It reaches the
accuracy of SGD in fewer epochs, at a few percent of a step's time; docs/results.md has the comparison.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from training.recipes import Recipe

# Quintic iteration that brings all singular values near 1 (Jordan et al. 2024).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 3
# What is no filter trains by SGD at a multiple of the recipe's learning rate.
_OTHERS_RATE = 5.0
_OTHERS_WEIGHT_DECAY = 5e-4


def make_optimizer(recipe: Recipe, module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over all parameters: those of frozen stages get no gradient and stay as they are.

    Every parameter group has a `rate_scale`, by which the schedule's learning rate is multiplied.
    """
    parameters = list(module.parameters())
    match recipe.optimizer:
        case "adam":
            optimizer: torch.optim.Optimizer = torch.optim.Adam(
                parameters, recipe.learning_rate, weight_decay=recipe.weight_decay
            )
        case "sgd":
            optimizer = torch.optim.SGD(
                parameters,
                recipe.learning_rate,
                momentum=recipe.momentum,
                weight_decay=recipe.weight_decay,
                nesterov=recipe.momentum > 0,
            )
        case "muon":
            first, *filters = (parameter for parameter in parameters if parameter.ndim == 4)
            others = [first, *(parameter for parameter in parameters if parameter.ndim != 4)]
            optimizer = Muon(filters, others, recipe.learning_rate, recipe.momentum, recipe.weight_decay)
    for group in optimizer.param_groups:
        group.setdefault("rate_scale", 1.0)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Apply the schedule's learning rate to every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_scale"]


class Muon(torch.optim.Optimizer):
    """Steps of equal length in every direction: the momentum of each filter matrix is made orthogonal first.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, with decoupled weight decay. Nesterov momentum.

    Args:
        filters: convolution weights [O, I, H, W], taken as matrices [O, I*H*W].
        others: everything else (first convolution, normalisation, biases, classifier): trained by SGD.
        lr: of the filters; a multiple of it for the others.
        weight_decay: of the filters, decoupled.
    """

    def __init__(
        self, filters: list[nn.Parameter], others: list[nn.Parameter], lr: float, momentum: float, weight_decay: float
    ):
        groups = [
            {"params": filters, "orthogonal": True, "weight_decay": weight_decay, "rate_scale": 1.0},
            {
                "params": others,
                "orthogonal": False,
                "weight_decay": _OTHERS_WEIGHT_DECAY,
                "rate_scale": _OTHERS_RATE,
            },
        ]
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        filters, others = self.param_groups
        decay = 1 - filters["lr"] * filters["weight_decay"]
        by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for parameter in filters["params"]:
            if parameter.grad is not None:
                update = self._momentum(parameter, parameter.grad, filters)
                by_shape[parameter.shape].append((parameter, update.flatten(1)))
        for shape, pairs in by_shape.items():
            rate = filters["lr"] * max(1, shape[0] / shape[1:].numel()) ** 0.5
            updates = orthogonal(torch.stack([update for _, update in pairs]))
            for (parameter, _), update in zip(pairs, updates, strict=True):
                parameter.mul_(decay).add_(update.view(shape), alpha=-rate)
        for parameter in others["params"]:
            if parameter.grad is not None:
                gradient = parameter.grad.add(parameter, alpha=others["weight_decay"])
                parameter.add_(self._momentum(parameter, gradient, others), alpha=-others["lr"])
        return loss

    def _momentum(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Nesterov's update: the gradient plus the momentum that already contains it."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].mul_(group["momentum"]).add_(gradient)
        return gradient.add(state["momentum"], alpha=group["momentum"])


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [N, R, C] with the same singular vectors and all singular values of the order of 1.

    Each iteration multiplies X by Q = aI + bG + cG^2, where G = XX^T. Q commutes with G, so G becomes QGQ, and X need
    not be known until the end: only two products have the matrices' longer side, instead of two in each iteration.
    Half precision, as in autocast, is enough: Jordan et al. use it.
    """
    a, b, c = _COEFFICIENTS
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram = x @ x.mT
    identity = torch.eye(gram.shape[1], device=gram.device)

    def polynomial(gram: Tensor) -> Tensor:
        q: Tensor = a * identity + b * gram + c * gram @ gram
        return q

    product = q = polynomial(gram)
    for _ in range(_ITERATIONS - 1):
        gram = q @ gram @ q
        q = polynomial(gram)
        product = q @ product
    result: Tensor = (product @ x).to(matrices.dtype)
    return result if wide is matrices else result.mT
