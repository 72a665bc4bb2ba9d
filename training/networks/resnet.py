"""Part 1: the residual network for 32x32 images, in two forms.

Both share one plan: a stem, four blocks (channels 32, 64, 128, 256; strides 1, 2, 2, 2; 2, 4, 4, 2 residual
units), max-pooling and a linear layer.

- `SharedResNet` is the network as its author wrote it: all units of a block use the same weights.
- `ResNet` gives every unit its own weights and is a plain residual network (He et al. 2015, arXiv:1512.03385).

In: normalised float images [N, 3, 32, 32].  Out: logits [N, 100].
"""

from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 32
STRIDES = (1, 2, 2, 2)
UNITS = (2, 4, 4, 2)

Statistics = Literal["per-use", "shared"]
Shortcuts = Literal["random", "identity"]


class SharedBatchNorm(nn.Module):
    """One batch normalisation (scale and shift) used at several depths of a network.

    Activations differ from depth to depth, so one set of running statistics fits none of them and evaluation mode
    breaks. `statistics="per-use"` keeps running statistics for every use; the function computed in training mode
    is the same for both settings.

    Args:
        channels: C of the activations [N, C, H, W].
        uses: how often the layer is applied in one forward pass.
        statistics: "per-use", or "shared" for the literal single set.
    """

    running_mean: Tensor  # float [sets, C]: one set per use, or one for all
    running_var: Tensor

    def __init__(self, channels: int, uses: int, statistics: Statistics, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.momentum = momentum
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.sets = uses if statistics == "per-use" else 1
        self.register_buffer("running_mean", torch.zeros(self.sets, channels))
        self.register_buffer("running_var", torch.ones(self.sets, channels))

    def forward(self, x: Tensor, use: int) -> Tensor:
        """Normalise `x` [N, C, H, W] as the `use`-th application of this layer, counted from 0."""
        row = min(use, self.sets - 1)
        return F.batch_norm(
            x,
            self.running_mean[row],
            self.running_var[row],
            self.weight,
            self.bias,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
        )


class SharedBlock(nn.Module):
    """Residual units that all use one set of weights.

    Args:
        shortcuts: initial weights of the shortcut of all units but the first: PyTorch's random ones, or the identity,
            with which each unit starts by passing its input on.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        units: int,
        statistics: Statistics,
        shortcuts: Shortcuts = "random",
    ):
        super().__init__()
        self.units = units
        self.projects = in_channels != channels
        self.conv_init = nn.Conv2d(in_channels, channels, 3, stride, padding=1)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = SharedBatchNorm(channels, 2 * units, statistics)
        # The author's block owns this layer even where it is not applied (first block); it counts as parameters.
        self.shortcut_init = nn.Conv2d(in_channels, channels, 1, stride)
        self.shortcut = nn.Conv2d(channels, channels, 1)
        if shortcuts == "identity":
            nn.init.dirac_(self.shortcut.weight)
            nn.init.zeros_(cast(Tensor, self.shortcut.bias))

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn(self.conv_init(x), 0))
        residual = self.bn(self.conv(residual), 1)
        x = F.relu(residual + (self.shortcut_init(x) if self.projects else x))
        for unit in range(1, self.units):
            residual = F.relu(self.bn(self.conv(x), 2 * unit))
            residual = self.bn(self.conv(residual), 2 * unit + 1)
            x = F.relu(residual + self.shortcut(x))
        return x


class SharedResNet(nn.Module):
    """The author's network: 1,340,260 parameters at the default width.

    Args:
        classes: number of logits.
        width: channels of the first block; each further block doubles them.
        dropout: probability of dropping an activation after the stem.
        statistics: see `SharedBatchNorm`.
        shortcuts: see `SharedBlock`.
    """

    def __init__(
        self,
        classes: int = 100,
        width: int = WIDTH,
        dropout: float = 0.25,
        statistics: Statistics = "per-use",
        shortcuts: Shortcuts = "random",
    ):
        super().__init__()
        channels = _channels(width)
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(dropout)
        )
        self.blocks = nn.Sequential(
            *(
                SharedBlock(inputs, outputs, stride, units, statistics, shortcuts)
                for (inputs, outputs), stride, units in zip(pairwise(channels), STRIDES, UNITS, strict=True)
            )
        )
        self.fc = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.blocks(self.stem(x)), 4)
        logits: Tensor = self.fc(x.flatten(1))
        return logits


def _channels(width: int) -> tuple[int, ...]:
    """Channels before the first block and after each."""
    return (width, width, 2 * width, 4 * width, 8 * width)


class Unit(nn.Module):
    """One residual unit that owns its weights (He et al. 2015, basic block; its projection is not normalised)."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.bn2.weight)  # the unit starts as its shortcut (Goyal et al. 2017, arXiv:1706.02677)
        self.shortcut = (
            nn.Identity() if in_channels == channels else nn.Conv2d(in_channels, channels, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)), inplace=True)
        residual = self.bn2(self.conv2(residual))
        return F.relu(residual.add_(self.shortcut(x)), inplace=True)


class ResNet(nn.Module):
    """The same plan with every unit owning its weights: 3,558,660 parameters at the default width.

    Args:
        classes: number of logits.
        width: channels of the first block; each further block doubles them.
        dropout: probability of dropping an activation after the stem.
    """

    def __init__(self, classes: int = 100, width: int = WIDTH, dropout: float = 0.0):
        super().__init__()
        channels = _channels(width)
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
        )
        self.blocks = nn.Sequential(
            *(
                Unit(inputs if first else outputs, outputs, stride if first else 1)
                for (inputs, outputs), stride, units in zip(pairwise(channels), STRIDES, UNITS, strict=True)
                for first in (unit == 0 for unit in range(units))
            )
        )
        self.fc = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.blocks(self.stem(x)), 4)
        logits: Tensor = self.fc(x.flatten(1))
        return logits
