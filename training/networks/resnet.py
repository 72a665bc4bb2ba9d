"""Part 1 is a residual network for 32x32 images, in two forms.

Both have the same layout: a stem, four blocks (channels 32, 64, 128, 256; strides 1, 2, 2, 2; 2, 4, 4, 2 residual
units), max-pooling and a linear layer.

- `SharedResNet` is the author's original network: all units of a block use the same weights.
- `ResNet` gives every unit its own weights and is a plain residual network (He et al. 2015, arXiv:1512.03385).

Input: normalized float images [N, 3, 32, 32].
Output: logits [N, 100].
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
    """A batch normalization (one scale and shift) that is applied at several depths of a network.

    Activations differ from depth to depth, so one set of running statistics fits none of them and evaluation mode
    breaks. `statistics="per-use"` keeps separate running statistics for every use. Both settings compute the same
    function in training mode.

    Args:
        channels: C of the activations [N, C, H, W].
        uses: Number of applications of the layer in one forward pass.
        statistics: "per-use", or "shared" for a single set as in the author's network.
        momentum: Weight of the batch statistics in the update of the running statistics.
        eps: Constant added to the variance.
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
        """Normalize `x` [N, C, H, W] as the `use`-th application of this layer, counted from 0."""
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
    """A block of residual units that all use one set of weights.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Stride of the first convolution.
        units: Number of residual units.
        statistics: Running statistics, see `SharedBatchNorm`.
        shortcuts: Initial weights of the shortcut convolution of all units except the first: "random" (PyTorch's
            default), or "identity", with which each shortcut initially passes its input on.
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
        # The author's first block has this layer too, although it does not apply it; it counts as parameters.
        self.shortcut_init = nn.Conv2d(in_channels, channels, 1, stride)
        self.shortcut = nn.Conv2d(channels, channels, 1)
        if shortcuts == "identity":
            nn.init.dirac_(self.shortcut.weight)
            nn.init.zeros_(cast(Tensor, self.shortcut.bias))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block's output [N, channels, H / stride, W / stride] of `x` [N, in_channels, H, W]."""
        residual = F.relu(self.bn(self.conv_init(x), 0))
        residual = self.bn(self.conv(residual), 1)
        x = F.relu(residual + (self.shortcut_init(x) if self.projects else x))
        for unit in range(1, self.units):
            residual = F.relu(self.bn(self.conv(x), 2 * unit))
            residual = self.bn(self.conv(residual), 2 * unit + 1)
            x = F.relu(residual + self.shortcut(x))
        return x


class SharedResNet(nn.Module):
    """The author's network, with 1,340,260 parameters at the default width.

    Args:
        classes: Number of logits.
        width: Channels of the first block. Each further block doubles them.
        dropout: Dropout probability after the stem.
        statistics: Running statistics, see `SharedBatchNorm`.
        shortcuts: Initial weights of shortcuts, see `SharedBlock`.
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
        """Compute logits [N, classes] of normalized images [N, 3, 32, 32]."""
        x = F.max_pool2d(self.blocks(self.stem(x)), 4)
        logits: Tensor = self.fc(x.flatten(1))
        return logits


def _channels(width: int) -> tuple[int, ...]:
    """Return the channels before the first block and after each block."""
    return (width, width, 2 * width, 4 * width, 8 * width)


class ResidualUnit(nn.Module):
    """A residual unit with its own weights: the basic block of He et al. 2015, with an unnormalized projection."""

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
        """Compute the unit's output [N, channels, H / stride, W / stride] of `x` [N, in_channels, H, W]."""
        residual = F.relu(self.bn1(self.conv1(x)), inplace=True)
        residual = self.bn2(self.conv2(residual))
        return F.relu(residual.add_(self.shortcut(x)), inplace=True)


class ResNet(nn.Module):
    """The same layout with separate weights in every unit: 3,558,660 parameters at the default width.

    Args:
        classes: Number of logits.
        width: Channels of the first block. Each further block doubles them.
        dropout: Dropout probability after the stem.
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
                ResidualUnit(inputs if first else outputs, outputs, stride if first else 1)
                for (inputs, outputs), stride, units in zip(pairwise(channels), STRIDES, UNITS, strict=True)
                for first in (unit == 0 for unit in range(units))
            )
        )
        self.fc = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits [N, classes] of normalized images [N, 3, 32, 32]."""
        x = F.max_pool2d(self.blocks(self.stem(x)), 4)
        logits: Tensor = self.fc(x.flatten(1))
        return logits
