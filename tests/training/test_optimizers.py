"""Test Muon against its definition by singular values, and its SGD part against the SGD of PyTorch."""

import pytest
import torch
from torch import Tensor, nn

from training.networks import build
from training.optimizers import Muon, make_optimizer, orthogonalize, set_learning_rate
from training.recipes import make_recipe


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(3, 32, 288), (2, 288, 32), (1, 64, 64)])
def test_orthogonal_keeps_the_singular_vectors_and_evens_out_the_values(shape: tuple[int, ...]) -> None:
    matrices = noise(*shape) * torch.tensor([1e-4, 1.0, 1e3])[: shape[0], None, None]
    result = orthogonalize(matrices)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    values = u.mT @ result @ v.mT  # diagonal if the singular vectors are unchanged
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert (values - torch.diag_embed(diagonal)).abs().max() < 1e-3
    assert diagonal.max() < 1.3
    assert diagonal.median() > 0.6


def test_half_precision_finds_the_same_directions() -> None:
    u, _, v = torch.linalg.svd(noise(2, 32, 288), full_matrices=False)
    matrices = u * torch.logspace(0, -4, 32) @ v  # singular values from 1 to 1e-4, as in momentum
    exact = orthogonalize(matrices)
    with torch.autocast("cpu", torch.bfloat16):
        result = orthogonalize(matrices)
    assert result.dtype is torch.float32
    assert not torch.equal(result, exact)
    assert nn.functional.cosine_similarity(result.flatten(1), exact.flatten(1)).min() > 0.99


def test_a_filter_moves_along_its_orthogonal_momentum() -> None:
    """The test computes two steps for one convolution weight in plain PyTorch."""
    start, first, second = noise(3, 8, 4, 3, 3)
    weight = nn.Parameter(start.clone())
    optimizer = Muon([weight], [], lr=0.1, momentum=0.9, weight_decay=0.5)
    expected = start.clone()
    momentum = torch.zeros_like(start)
    for gradient in (first, second):
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + gradient
        direction = orthogonalize((gradient + 0.9 * momentum).reshape(1, 8, 36)).reshape(8, 4, 3, 3)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * direction
    torch.testing.assert_close(weight.data, expected)


def test_filters_of_one_shape_do_not_mix() -> None:
    weights = [nn.Parameter(noise(8, 4, 3, 3).roll(shift, 0)) for shift in (0, 3)]
    alone = [nn.Parameter(weight.data.clone()) for weight in weights]
    for weight in (*weights, *alone):
        weight.grad = weight.data.square()
    Muon(weights, [], lr=0.1, momentum=0.9, weight_decay=0.0).step()
    for weight, single in zip(weights, alone, strict=True):
        Muon([single], [], lr=0.1, momentum=0.9, weight_decay=0.0).step()
        torch.testing.assert_close(weight.data, single.data)


def test_everything_else_trains_by_sgd() -> None:
    ours, theirs = (nn.Parameter(noise(10, 5)) for _ in range(2))
    muon = Muon([], [ours], lr=0.02, momentum=0.9, weight_decay=0.1)
    set_learning_rate(muon, 0.02)
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    for step in range(3):
        for parameter, optimizer in ((ours, muon), (theirs, sgd)):
            parameter.grad = noise(10, 5) + step
            optimizer.step()
    torch.testing.assert_close(ours.data, theirs.data)


def test_all_convolutions_but_the_first_are_orthogonalised_and_all_parameters_are_trained() -> None:
    classifier = build(make_recipe("resnet", {"width": 8}))
    optimizer = make_optimizer(make_recipe("resnet", {"width": 8}), classifier)
    filters, others = ({id(each) for each in group["params"]} for group in optimizer.param_groups)
    named = dict(classifier.named_parameters())
    assert filters == {id(each) for name, each in named.items() if each.ndim == 4 and "stem" not in name}
    assert filters | others == {id(each) for each in named.values()}
    assert not filters & others


def test_parameters_without_gradient_stay_as_they_are() -> None:
    frozen = [nn.Parameter(noise(4, 2, 3, 3)), nn.Parameter(noise(5))]
    before = [parameter.clone() for parameter in frozen]
    Muon(frozen[:1], frozen[1:], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    assert all(torch.equal(one, other) for one, other in zip(frozen, before, strict=True))


@pytest.mark.parametrize("name", ["adam", "sgd", "muon"])
def test_the_schedule_reaches_every_group_at_its_scale(name: str) -> None:
    chosen = make_recipe("resnet", {"width": 8, "optimizer": name})
    optimizer = make_optimizer(chosen, build(chosen))
    set_learning_rate(optimizer, 0.01)
    expected = [0.01, 0.05] if name == "muon" else [0.01]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)
