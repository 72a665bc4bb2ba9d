"""Makes a recipe's optimizer, and holds the one that PyTorch does not have for convolutions.

PyTorch's own Muon takes matrices only; this one takes convolution filters as the matrices they are. It reaches the
accuracy of SGD in fewer epochs, at a few percent of a step's time; docs/results.md has the comparison.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from training.recipes import Recipe

# Quintic iteration that brings singular values near 1 (Jordan et al. 2024); three iterations instead of their five
# leave the smallest ones smaller.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 3
# What is no filter trains by SGD at a multiple of the recipe's learning rate.
_OTHERS_RATE = 5.0
_OTHERS_WEIGHT_DECAY = 5e-4


def make_optimizer(recipe: Recipe, module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over all parameters: those of frozen stages get no gradient and stay as they are.

    Every parameter group has a `rate_scale`, by which the schedule's learning rate is multiplied. On a GPU the rate is
    a tensor there, so that a recorded step (`cuda_graph`) reads what `set_learning_rate` has written.
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
    _begin_momenta(optimizer)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Apply the schedule's learning rate to every group."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate * group["rate_scale"])
        else:
            group["lr"] = rate * group["rate_scale"]


def load_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Take over what an optimizer has learnt, on whatever device that was; its settings are those of this device."""
    optimizer.load_state_dict(saved | {"param_groups": optimizer.state_dict()["param_groups"]})
    _begin_momenta(optimizer)


def _begin_momenta(optimizer: torch.optim.Optimizer) -> None:
    """PyTorch's fused SGD cannot begin with the gradients of some stages and go on with those of all."""
    for group in optimizer.param_groups:
        if group.get("fused") and group.get("nesterov"):
            for parameter in group["params"]:
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


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
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [parameter.grad for parameter in parameters]
            if group["orthogonal"]:
                steps = _orthogonal_steps(self._nesterov(parameters, gradients, group))
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            else:
                decayed = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
                steps = self._nesterov(parameters, decayed, group)
            torch._foreach_mul_(steps, group["lr"])
            torch._foreach_sub_(parameters, steps)
        return loss

    def _nesterov(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Gradients plus the momentum that already contains them."""
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        return list(torch._foreach_add(gradients, momenta, alpha=group["momentum"]))


def _orthogonal_steps(updates: list[Tensor]) -> list[Tensor]:
    """Filters [O, I, H, W] as matrices [O, H*W*I] made orthogonal, all of a shape at once; longer ones if O is larger.

    Channels are last, as they lie in memory; the order of a matrix's columns makes no difference.
    """
    steps = list(updates)
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for number, update in enumerate(updates):
        by_shape[update.shape].append(number)
    for (rows, *columns), numbers in by_shape.items():
        filters = torch.stack([updates[number].movedim(1, 3) for number in numbers])
        scale = max(1, rows / math.prod(columns)) ** 0.5
        orthogonals = orthogonal(filters.flatten(2)).mul(scale).contiguous().view(filters.shape).movedim(4, 2)
        for number, step in zip(numbers, orthogonals, strict=True):
            steps[number] = step
    return steps


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [N, R, C] with the same singular vectors and singular values of the order of 1, but for the smallest.

    Each iteration multiplies X by Q = aI + bG + cG^2, where G = XX^T. Q commutes with G, so G becomes QGQ, and X need
    not be known until the end: only two products have the matrices' longer side, instead of two in each iteration.
    Half precision, as in autocast, is enough: Jordan et al. use it.
    """
    a, b, c = _COEFFICIENTS
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram = x @ x.mT

    def polynomial(gram: Tensor) -> Tensor:
        q = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        q.diagonal(dim1=1, dim2=2).add_(a)
        return q

    product = q = polynomial(gram)
    for _ in range(_ITERATIONS - 1):
        gram = q @ gram @ q
        q = polynomial(gram)
        product = q @ product
    result: Tensor = (product @ x).to(matrices.dtype)
    return result if wide is matrices else result.mT
