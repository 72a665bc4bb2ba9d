"""`Classifier` is the whole path from pixels to logits in one module, for training, evaluation and export.

Input: uint8 images [N, 3, 32, 32].
Output: float logits [N, 100].

Casting, normalization, upsampling and the calibration temperature are part of the module, so preprocessing cannot
differ between training and serving.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Classifier(nn.Module):
    """A network with preprocessing before it and temperature scaling after it.

    Args:
        network: Module from normalized float images [N, 3, S, S] to logits [N, classes].
        mean: Mean per channel, for pixel values in 0-1.
        std: Standard deviation per channel, for pixel values in 0-1.
        image_size: S, the side in pixels to which the 32x32 images are upsampled (bilinear).
    """

    mean: Tensor  # [3, 1, 1], in units of 0-255
    std: Tensor
    temperature: Tensor  # scalar; logits are divided by it (Guo et al. 2017, arXiv:1706.04599)

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float], image_size: int = 32):
        super().__init__()
        self.network = network
        self.image_size = image_size
        self.register_buffer("mean", 255 * torch.tensor(mean).reshape(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).reshape(3, 1, 1))
        self.register_buffer("temperature", torch.tensor(1.0))

    def preprocess(self, images: Tensor) -> Tensor:
        """Convert uint8 [N, 3, 32, 32] to normalized float [N, 3, image_size, image_size]."""
        x = (images.to(self.mean.dtype) - self.mean) / self.std
        if self.image_size != 32:
            size = (self.image_size, self.image_size)
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        return x

    def forward(self, images: Tensor) -> Tensor:
        """Compute calibrated logits [N, classes] of uint8 images [N, 3, 32, 32]."""
        logits: Tensor = self.network(self.preprocess(images)) / self.temperature
        return logits
