"""Test both networks of part 1 against plain functional transcriptions of their descriptions."""

from collections.abc import Iterator
from itertools import count
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.networks import CIFAR100_MEAN, CIFAR100_STD, ResNet, SharedResNet, build
from training.networks.resnet import SharedBatchNorm, SharedBlock, Statistics
from training.recipes import make_recipe

STRIDES = (1, 2, 2, 2)
REPEATS = (2, 4, 4, 2)

Network = TypeVar("Network", SharedResNet, ResNet)


def randomized(network: Network) -> Network:
    """Set all parameters and statistics to random values in float64, so that exact comparison is possible."""
    random = torch.Generator().manual_seed(1)
    network.double()
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2.0, generator=random)
        elif value.is_floating_point():
            scale = 0.2 if value.dim() < 4 else value[0].numel() ** -0.5
            value.normal_(0, scale, generator=random)
    return network


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Layers:
    """The layers of a state dict, applied by name."""

    def __init__(self, state: dict[str, Tensor], training: bool) -> None:
        self.state = state
        self.training = training

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, padding=weight.shape[-1] // 2)

    def bn(self, name: str, x: Tensor, row: int | None = None) -> Tensor:
        mean, variance = self.state[f"{name}.running_mean"].clone(), self.state[f"{name}.running_var"].clone()
        if row is not None:
            mean, variance = mean[row], variance[row]
        scale, shift = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.batch_norm(x, mean, variance, scale, shift, self.training)

    def head(self, x: Tensor) -> Tensor:
        return F.linear(F.max_pool2d(x, 4).flatten(1), self.state["fc.weight"], self.state["fc.bias"])


def authors_network(layers: Layers, x: Tensor, statistics: Statistics) -> Tensor:
    x = F.relu(layers.bn("stem.1", layers.conv("stem.0", x)))
    for block, (stride, repeats) in enumerate(zip(STRIDES, REPEATS, strict=True)):
        name = f"blocks.{block}"
        uses = count()

        def bn(x: Tensor, name: str = name, uses: Iterator[int] = uses) -> Tensor:
            use = next(uses)
            return layers.bn(f"{name}.bn", x, use if statistics == "per-use" else 0)

        residual = F.relu(bn(layers.conv(f"{name}.conv_init", x, stride)))
        residual = bn(layers.conv(f"{name}.conv", residual))
        channels_change = residual.shape[1] != x.shape[1]
        x = F.relu(residual + (layers.conv(f"{name}.shortcut_init", x, stride) if channels_change else x))
        for _ in range(repeats - 1):
            residual = F.relu(bn(layers.conv(f"{name}.conv", x)))
            residual = bn(layers.conv(f"{name}.conv", residual))
            x = F.relu(residual + layers.conv(f"{name}.shortcut", x))
    return layers.head(x)


def residual_network(layers: Layers, x: Tensor) -> Tensor:
    x = F.relu(layers.bn("stem.1", layers.conv("stem.0", x)))
    strides = [1, 1, 2, 1, 1, 1, 2, 1, 1, 1, 2, 1]
    for unit, stride in enumerate(strides):
        name = f"blocks.{unit}"
        residual = F.relu(layers.bn(f"{name}.bn1", layers.conv(f"{name}.conv1", x, stride)))
        residual = layers.bn(f"{name}.bn2", layers.conv(f"{name}.conv2", residual))
        channels_change = residual.shape[1] != x.shape[1]
        x = F.relu(residual + (layers.conv(f"{name}.shortcut", x, stride) if channels_change else x))
    return layers.head(x)


def test_a_unit_with_an_identity_shortcut_starts_by_adding_to_what_it_gets() -> None:
    block = SharedBlock(8, 8, 1, 2, "per-use", shortcuts="identity")
    nn.init.zeros_(block.bn.weight)
    x = images()[:, :1].expand(-1, 8, -1, -1).float()
    torch.testing.assert_close(block(x), F.relu(x))
    random = SharedBlock(8, 8, 1, 2, "per-use")
    nn.init.zeros_(random.bn.weight)
    assert not torch.allclose(random(x), F.relu(x))


def test_pixels_are_normalized_by_the_data_set_or_by_one_half() -> None:
    extremes = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 32, 32)
    by_half = build(make_recipe("resnet", {"normalization": "half"})).preprocess(extremes)
    torch.testing.assert_close(by_half, torch.tensor([-1.0, 1.0])[:, None, None, None].expand(2, 3, 32, 32))
    by_data_set = build(make_recipe("resnet")).preprocess(extremes)[:, :, 0, 0]
    torch.testing.assert_close(by_data_set[0], -torch.tensor(CIFAR100_MEAN) / torch.tensor(CIFAR100_STD))


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_the_authors_network_has_the_authors_number_of_parameters() -> None:
    assert parameters(build(make_recipe("resnet-seed"))) == 1_340_260


def test_the_network_with_own_weights_has_the_documented_number_of_parameters() -> None:
    assert parameters(build(make_recipe("resnet"))) == 3_558_660


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("statistics", ["per-use", "shared"])
def test_the_authors_network_is_its_description(statistics: Statistics, training: bool) -> None:
    network = randomized(SharedResNet(width=8, dropout=0.0, statistics=statistics)).train(training)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    expected = authors_network(Layers(state, training), images(), statistics)
    torch.testing.assert_close(network(images()), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_the_network_with_own_weights_is_the_same_plan(training: bool) -> None:
    network = randomized(ResNet(width=8)).train(training)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    torch.testing.assert_close(network(images()), residual_network(Layers(state, training), images()))


def test_dropout_after_the_stem_acts_in_training_only() -> None:
    network = randomized(SharedResNet(width=8, dropout=0.25))
    assert not torch.equal(network(images()), network(images()))
    network.eval()
    assert torch.equal(network(images()), network(images()))


def test_both_kinds_of_statistics_are_the_same_function_in_training() -> None:
    per_use = randomized(SharedResNet(width=8, dropout=0.0, statistics="per-use"))
    shared = SharedResNet(width=8, dropout=0.0, statistics="shared").double()
    for mine, theirs in zip(shared.parameters(), per_use.parameters(), strict=True):
        mine.data.copy_(theirs)
    assert torch.equal(per_use(images()), shared(images()))


def disagreement_of_evaluation_with_training(statistics: Statistics) -> float:
    """Return how far logits in evaluation mode differ from logits in training mode, as a relative norm.

    Momentum 1 sets the running statistics to those of the same batch of 16 images.
    """
    network = randomized(SharedResNet(width=8, dropout=0.0, statistics=statistics))
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d | SharedBatchNorm):
            layer.momentum = 1.0
    with torch.no_grad():
        trained, evaluated = network(images(16)), network.eval()(images(16))
    return float((evaluated - trained).norm() / trained.norm())


def test_statistics_per_use_let_evaluation_agree_with_training_where_shared_ones_do_not() -> None:
    assert disagreement_of_evaluation_with_training("per-use") < 0.05
    assert disagreement_of_evaluation_with_training("shared") > 0.5


def test_every_unit_owns_its_weights() -> None:
    network = ResNet(width=8)
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(convolutions) == 1 + 2 * sum(REPEATS) + 3
    assert len(norms) == 1 + 2 * sum(REPEATS)
    weights = [layer.weight for layer in convolutions] + [layer.weight for layer in norms]
    assert len({weight.data_ptr() for weight in weights}) == len(convolutions) + len(norms)
