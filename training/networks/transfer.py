"""Part 2 fine-tunes torchvision's ResNet-18, pretrained on ImageNet, with a new fc layer and selectable frozen stages.

Input: normalized float images [N, 3, S, S].
Output: logits [N, classes].
"""

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from training.errors import ReportedError

STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "fc")
_STAGE_LAYERS = {"stem": ("conv1", "bn1")}


class WeightsError(ReportedError, ValueError):
    """The pretrained weights cannot be used. The message gives the reason and a remedy."""


class TransferResNet18(nn.Module):
    """A ResNet-18 with frozen and trainable stages. Frozen stages keep their weights and stay in evaluation mode.

    Args:
        classes: Number of logits. The fc layer is always new.
        weights: "none", "imagenet" (torchvision's IMAGENET1K_V1, downloaded) or the path of a state-dict file.
        trainable: Stages that train, a subset of `STAGES`.
        reinitialize: Stages that start from random weights instead of the pretrained ones.

    Raises:
        WeightsError: The pretrained weights cannot be used, see `load_weights`.
    """

    def __init__(self, classes: int, weights: str, trainable: Sequence[str], reinitialize: Sequence[str] = ()):
        super().__init__()
        from torchvision.models import resnet18  # takes seconds to import, and only this network needs it

        self.backbone = resnet18()
        random_states = {stage: [_copy_state(layer) for layer in self.get_layers(stage)] for stage in reinitialize}
        load_weights(self.backbone, weights)
        for stage, states in random_states.items():
            for layer, state in zip(self.get_layers(stage), states, strict=True):
                layer.load_state_dict(state)
        self.backbone.fc = nn.Linear(self.backbone.fc.in_features, classes)
        self.set_trainable(trainable)

    def set_trainable(self, stages: Sequence[str]) -> None:
        """Make exactly these stages trainable and freeze the others."""
        self.trainable = tuple(stages)
        for stage in STAGES:
            for layer in self.get_layers(stage):
                layer.requires_grad_(stage in stages)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the trainable stages. Frozen stages stay in evaluation mode."""
        super().train(mode)
        for stage in STAGES:
            for layer in self.get_layers(stage):
                layer.train(mode and stage in self.trainable)
        return self

    @property
    def frozen_stages(self) -> tuple[str, ...]:
        """The stages before the first trainable one. Their features of an image never change."""
        return tuple(takewhile(lambda stage: stage not in self.trainable, STAGES))

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the features of the frozen stages: normalized images [N, 3, S, S] to float [N, C, H, W]."""
        for stage in self.frozen_stages:
            x = self._forward_stage(stage, x)
        return x

    def forward_head(self, features: Tensor) -> Tensor:
        """Compute logits [N, classes] from the output of `forward_features`."""
        x = features
        for stage in STAGES[len(self.frozen_stages) :]:
            x = self._forward_stage(stage, x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits [N, classes] of normalized images [N, 3, S, S]."""
        return self.forward_head(self.forward_features(x))

    def _forward_stage(self, stage: str, x: Tensor) -> Tensor:
        net = self.backbone
        match stage:
            case "stem":
                x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
            case "fc":
                x = net.fc(net.avgpool(x).flatten(1))
            case layer:
                x = net.get_submodule(layer)(x)
        return x

    def get_layers(self, stage: str) -> list[nn.Module]:
        """Return the modules of a stage."""
        return [self.backbone.get_submodule(name) for name in _STAGE_LAYERS.get(stage, (stage,))]


def load_weights(backbone: nn.Module, weights: str) -> None:
    """Fill a torchvision ResNet-18 (1000 classes) with pretrained weights; float16 values are cast.

    Args:
        backbone: Network to fill in place.
        weights: "none" (does nothing), "imagenet" or the path of a state-dict file.

    Raises:
        WeightsError: The download failed, the file is missing or unreadable, or its keys or shapes do not match.
    """
    if weights == "none":
        return
    if weights == "imagenet":
        from torchvision.models import ResNet18_Weights

        try:
            state = ResNet18_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise WeightsError(
                f"the ImageNet weights could not be downloaded ({error}); "
                "give the path of a local state-dict file instead: weights=/path/to/resnet18.pth"
            ) from error
    else:
        state = _read_state_dict(Path(weights))
    expected = backbone.state_dict()
    # Files from before torch 0.4.1 lack the batch counters, which evaluation never reads.
    faults = [f"missing {key}" for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    faults += [f"unexpected {key}" for key in state if key not in expected]
    faults += [
        f"{key} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise WeightsError(f"{weights} is not a ResNet-18 state dict: {'; '.join(faults[:5])}{more}")
    backbone.load_state_dict(state, strict=False)


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise WeightsError(f"the weights file {path} does not exist; give the path of a ResNet-18 state-dict file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many unrelated types for a damaged file
        raise WeightsError(f"{path} cannot be read as a state dict: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} does not contain a state dict (a mapping from names to tensors)")
    return state


def _copy_state(layer: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in layer.state_dict().items()}
