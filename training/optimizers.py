"""`make_optimizer` makes the optimizer of a recipe: Adam, SGD or Muon.

PyTorch's own Muon supports matrices only. The `Muon` of this module treats convolution filters as matrices. It reaches
the accuracy of SGD in fewer epochs, and adds a few percent to the time of a step; docs/results.md has the comparison.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from training.recipes import Recipe

# The quintic Newton-Schulz iteration brings singular values near 1 (Jordan et al. 2024). Three iterations instead of
# their five leave the smallest singular values smaller.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 3
# Parameters other than filters train by SGD, at this multiple of the recipe's learning rate.
_OTHERS_RATE_SCALE = 5.0
_OTHERS_WEIGHT_DECAY = 5e-4


def make_optimizer(recipe: Recipe, module: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer of a recipe over all parameters of a module.

    Parameters of frozen stages get no gradient, so the optimizer does not change them. Every parameter group has a
    `rate_scale` that multiplies the schedule's learning rate. On a GPU the learning rate is a tensor in GPU memory, so
    that a recorded step (`TrainStep`) reads the value from `set_learning_rate`.
    """
    parameters = list(module.parameters())
    on_gpu = parameters[0].is_cuda
    match recipe.optimizer:
        case "adam":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                parameters,
                recipe.learning_rate,
                weight_decay=recipe.weight_decay,
                fused=on_gpu or None,
                capturable=on_gpu,
            )
        case "sgd":
            optimizer = torch.optim.SGD(
                parameters,
                recipe.learning_rate,
                momentum=recipe.momentum,
                weight_decay=recipe.weight_decay,
                nesterov=recipe.momentum > 0,
                fused=on_gpu or None,
            )
        case "muon":
            first, *filters = (parameter for parameter in parameters if parameter.ndim == 4)
            others = [first, *(parameter for parameter in parameters if parameter.ndim != 4)]
            optimizer = Muon(filters, others, recipe.learning_rate, recipe.momentum, recipe.weight_decay)
    for group in optimizer.param_groups:
        group.setdefault("rate_scale", 1.0)
        if on_gpu:
            group["lr"] = torch.tensor(group["lr"], device=parameters[0].device)
    _initialize_momenta(optimizer)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Apply the schedule's learning rate to every parameter group, in place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate * group["rate_scale"])
        else:
            group["lr"] = rate * group["rate_scale"]


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load the saved state of an optimizer from any device, but keep the parameter-group settings of this device."""
    optimizer.load_state_dict(saved | {"param_groups": optimizer.state_dict()["param_groups"]})
    _initialize_momenta(optimizer)


def _initialize_momenta(optimizer: torch.optim.Optimizer) -> None:
    """Initialize the momentum buffers of fused SGD for all parameters.

    Fused SGD fails if some stages get their first gradient later than others.
    """
    for group in optimizer.param_groups:
        if group.get("fused") and group.get("nesterov"):
            for parameter in group["params"]:
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


class Muon(torch.optim.Optimizer):
    """The Muon optimizer, which orthogonalizes the momentum of each filter matrix before the step.

    Steps therefore have equal length in every direction. The method is that of Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon/, with decoupled weight decay and Nesterov momentum.

    Args:
        filters: Convolution weights [O, I, H, W], treated as matrices [O, I*H*W].
        others: All other parameters (first convolution, normalization, biases, classifier), trained by SGD.
        lr: Learning rate of the filters. The other parameters use `_OTHERS_RATE_SCALE` times this rate.
        momentum: Momentum coefficient of all parameters.
        weight_decay: Decoupled weight decay of the filters.
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
                "rate_scale": _OTHERS_RATE_SCALE,
            },
        ]
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient, and return the loss of `closure`, if given."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [parameter.grad for parameter in parameters]
            if group["orthogonal"]:
                steps = _compute_orthogonal_steps(self._update_momenta(parameters, gradients, group))
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            else:
                decayed = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
                steps = self._update_momenta(parameters, decayed, group)
            torch._foreach_mul_(steps, group["lr"])
            torch._foreach_sub_(parameters, steps)
        return loss

    def _update_momenta(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Update the momenta and return the Nesterov steps: gradient plus `momentum` times the updated momentum."""
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        return list(torch._foreach_add(gradients, momenta, alpha=group["momentum"]))


def _compute_orthogonal_steps(updates: list[Tensor]) -> list[Tensor]:
    """Orthogonalize updates of filters [O, I, H, W] as matrices [O, H*W*I], in one batch per shape.

    A step is scaled by the square root of O / (H*W*I) if that is greater than 1. Input channels are the last factor of
    the columns, as in memory; the order of columns does not affect the result.
    """
    steps = list(updates)
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for number, update in enumerate(updates):
        by_shape[update.shape].append(number)
    for (rows, *columns), numbers in by_shape.items():
        filters = torch.stack([updates[number].movedim(1, 3) for number in numbers])
        scale = max(1, rows / math.prod(columns)) ** 0.5
        orthogonal = orthogonalize(filters.flatten(2)).mul(scale).contiguous().view(filters.shape).movedim(4, 2)
        for number, step in zip(numbers, orthogonal, strict=True):
            steps[number] = step
    return steps


def orthogonalize(matrices: Tensor) -> Tensor:
    """Orthogonalize matrices [N, R, C]: keep the singular vectors and bring the singular values to the order of 1.

    The smallest singular values remain smaller. Each iteration multiplies X by Q = aI + bG + cG^2, where G = XX^T.
    Q commutes with G, so G becomes QGQ, and X is needed only at the end. Only two products then involve the longer side
    of the matrices, instead of two in each iteration. Half precision, as in autocast, is sufficient: Jordan et al. use
    it.
    """
    a, b, c = _COEFFICIENTS
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram = x @ x.mT

    def evaluate_polynomial(gram: Tensor) -> Tensor:
        q = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        q.diagonal(dim1=1, dim2=2).add_(a)
        return q

    product = q = evaluate_polynomial(gram)
    for _ in range(_ITERATIONS - 1):
        gram = q @ gram @ q
        q = evaluate_polynomial(gram)
        product = q @ product
    result: Tensor = (product @ x).to(matrices.dtype)
    return result if wide is matrices else result.mT
