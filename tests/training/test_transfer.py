"""Test transfer learning, part 2: accepted weights, refused weights, and trainable stages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

from training.networks import IMAGENET_MEAN, IMAGENET_STD, TransferResNet18, build
from training.networks.transfer import STAGES, WeightsError
from training.recipes import make_recipe

pytestmark = pytest.mark.slow

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def pretrained() -> State:
    """A ResNet-18 state dict in which every tensor differs from its initial value."""
    random = torch.Generator().manual_seed(0)
    state = resnet18().state_dict()
    for name, value in state.items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2.0, generator=random)
        elif value.dim() == 1:
            value.normal_(0.5, 0.1, generator=random)
    return dict(state)


@pytest.fixture(scope="module")
def weights(pretrained: State, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(pretrained, path)
    return str(path)


def stage_of(name: str) -> str:
    layer = name.removeprefix("backbone.").split(".")[0]
    return "stem" if layer in {"conv1", "bn1"} else layer


def changed_stages(before: State, after: State) -> set[str]:
    return {stage_of(name) for name, value in before.items() if not torch.equal(value, after[name])}


def snapshot(network: nn.Module) -> State:
    return {name: value.clone() for name, value in network.state_dict().items()}


def backward(network: nn.Module) -> set[str]:
    """Run one backward pass in training mode and return the stages that get gradients."""
    network.train()
    network(torch.randn(4, 3, 32, 32)).square().mean().backward()
    return {stage_of(name) for name, parameter in network.named_parameters() if parameter.grad is not None}


def test_only_the_chosen_stages_get_gradients_and_move_their_statistics(weights: str) -> None:
    network = TransferResNet18(100, weights, trainable=("layer4", "fc"))
    before = snapshot(network)
    assert backward(network) == {"layer4", "fc"}
    assert changed_stages(before, snapshot(network)) == {"layer4"}
    assert not torch.equal(before["backbone.layer4.1.bn2.running_mean"], network.backbone.layer4[1].bn2.running_mean)


def test_another_choice_of_stages_holds_from_then_on() -> None:
    network = TransferResNet18(100, "none", trainable=("fc",))
    assert backward(network) == {"fc"}
    network.set_trainable(STAGES)
    assert all(layer.training for layer in network.modules())
    before = snapshot(network)
    assert backward(network) == set(STAGES)
    assert changed_stages(before, snapshot(network)) == set(STAGES) - {"fc"}


def test_frozen_stages_compute_the_same_in_training_as_in_evaluation(weights: str) -> None:
    network = TransferResNet18(100, weights, trainable=("fc",))
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(network.train()(x), network.eval()(x))


def test_all_but_the_new_fc_comes_from_the_file(weights: str, pretrained: State) -> None:
    backbone = TransferResNet18(100, weights, trainable=("fc",)).backbone.state_dict()
    assert backbone["fc.weight"].shape == (100, 512)
    for name, value in pretrained.items():
        if not name.startswith("fc."):
            assert torch.equal(backbone[name], value), name


def test_float16_weights_are_cast(pretrained: State, tmp_path: Path) -> None:
    half = {name: value.half() if value.is_floating_point() else value for name, value in pretrained.items()}
    torch.save(half, tmp_path / "half.pth")
    backbone = TransferResNet18(100, str(tmp_path / "half.pth"), trainable=("fc",)).backbone
    assert backbone.layer3[0].conv1.weight.dtype is torch.float32
    assert torch.equal(backbone.layer3[0].conv1.weight, half["layer3.0.conv1.weight"].float())


def test_weights_without_batch_counters_are_accepted_as_torch_itself_does(pretrained: State, tmp_path: Path) -> None:
    """Files from before torch 0.4.1 lack batch counters, including the files of torchvision."""
    torch.save({name: value for name, value in pretrained.items() if value.dim()}, tmp_path / "old.pth")
    resnet18().load_state_dict(torch.load(tmp_path / "old.pth"))
    backbone = TransferResNet18(100, str(tmp_path / "old.pth"), trainable=("fc",)).backbone
    assert torch.equal(backbone.bn1.running_mean, pretrained["bn1.running_mean"])


def test_a_reinitialized_stage_differs_from_the_file_and_all_others_do_not(weights: str, pretrained: State) -> None:
    backbone = TransferResNet18(100, weights, STAGES, reinitialize=("layer4",)).backbone.state_dict()
    kept = {name: value for name, value in pretrained.items() if not name.startswith("fc.")}
    assert changed_stages(kept, backbone) == {"layer4"}
    for name, value in kept.items():
        if name.startswith("layer4.") and value.dim():
            assert not torch.equal(backbone[name], value), name


def without(state: State) -> State:
    return {name: value for name, value in state.items() if name != "layer2.0.bn1.weight"}


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (without, "missing layer2.0.bn1.weight"),
        (lambda state: state | {"layer5.weight": torch.zeros(1)}, "unexpected layer5.weight"),
        (lambda state: state | {"fc.bias": torch.zeros(10)}, r"fc.bias has shape \(10,\), expected \(1000,\)"),
        (lambda state: list(state.values()), "does not contain a state dict"),
        (lambda state: {"state_dict": state}, "does not contain a state dict"),
        (lambda state: {name: value for name, value in state.items() if "layer" not in name}, "and [0-9]+ more"),
        (lambda _: {"conv1.weight": Path("anything")}, "cannot be read as a state dict"),
    ],
)
def test_a_file_that_does_not_fit_is_an_error_naming_it_and_the_fault(
    damage: Callable[[State], Any], fault: str, pretrained: State, tmp_path: Path
) -> None:
    torch.save(damage(pretrained), tmp_path / "misfit.pth")
    with pytest.raises(WeightsError, match=rf"misfit\.pth.*{fault}"):
        TransferResNet18(100, str(tmp_path / "misfit.pth"), trainable=("fc",))


class Intruder:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_a_file_with_code_in_it_is_refused_and_the_code_does_not_run(tmp_path: Path) -> None:
    torch.save({"conv1.weight": Intruder(tmp_path / "trace")}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match=r"evil\.pth cannot be read"):
        TransferResNet18(100, str(tmp_path / "evil.pth"), trainable=("fc",))
    assert not (tmp_path / "trace").exists()


def test_a_truncated_file_is_an_error_naming_it(weights: str, tmp_path: Path) -> None:
    (tmp_path / "cut.pth").write_bytes(Path(weights).read_bytes()[:100_000])
    with pytest.raises(WeightsError, match=r"cut\.pth cannot be read"):
        TransferResNet18(100, str(tmp_path / "cut.pth"), trainable=("fc",))


def test_a_missing_file_is_an_error_naming_it() -> None:
    with pytest.raises(WeightsError, match=r"/nowhere/resnet18\.pth does not exist"):
        TransferResNet18(100, "/nowhere/resnet18.pth", trainable=("fc",))


def test_imagenet_weights_without_a_network_is_an_error_naming_the_other_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # a folder without cached weights
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no server listens on this port
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(WeightsError, match=r"could not be downloaded.*weights=/path/to/resnet18\.pth"):
        TransferResNet18(100, "imagenet", trainable=("fc",))


def test_images_are_normalised_and_upsampled_on_the_way_in() -> None:
    classifier = build(make_recipe("resnet18", {"weights": "none", "image_size": 64}))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    expected = F.interpolate((images / 255 - mean) / std, (64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(classifier.preprocess(images), expected, rtol=1e-4, atol=1e-5)
