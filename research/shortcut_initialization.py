"""Measure the effect of the initialization of the 1x1 shortcuts on the shared-weight network.

The author's shortcuts are plain convolutions, so no unit passes its input on at the start. The program trains
`resnet-seed` at half width for a few epochs on 45,000 images and evaluates it on the other 5,000 training images. It
compares three initializations: PyTorch's default (the recipe), all convolutions after He et al. 2015, and the shortcuts
as the identity.

    python research/shortcut_initialization.py [EPOCHS]

Result: validation top-1 after two epochs is 17.9 % (default), 17.2 % (He), 20.7 % (identity).
Table: docs/results.md.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from training import loop
from training.dataset import load_dataset
from training.networks import Classifier, build
from training.networks.resnet import SharedBlock
from training.recipes import Recipe, make_recipe
from training.resources import default_device
from training.run import Run


def default(_: nn.Module) -> None:
    """Keep PyTorch's initialization."""


def he(classifier: nn.Module) -> None:
    """Initialize all convolutions with variance 2 / fan-in and no bias (He et al. 2015)."""
    for layer in classifier.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, layer.bias))


def identity(classifier: nn.Module) -> None:
    """Initialize the shortcuts of all units except the first of a block to the identity."""
    for block in classifier.modules():
        if isinstance(block, SharedBlock):
            nn.init.dirac_(block.shortcut.weight)
            nn.init.zeros_(cast(Tensor, block.shortcut.bias))


def main(epochs: int) -> None:
    fields = {"normalization": "dataset", "batch_norm_statistics": "per-use", "eval_mode_after": 0}
    chosen = make_recipe("resnet-seed", fields | {"epochs": epochs, "width": 16, "validation_images": 5000})
    dataset = load_dataset()
    print("| initialization | epoch | train loss | train top-1 | validation top-1 |\n| --- | --- | --- | --- | --- |")
    for initialize in (default, he, identity):
        loop.build = _builder(initialize)  # type: ignore[assignment, attr-defined]
        with tempfile.TemporaryDirectory() as folder:
            run = Run(Path(folder, "run"))
            run.create(chosen)
            for event in loop.train(chosen, dataset, run, default_device()):
                if isinstance(event, loop.Epoch):
                    print(
                        f"| {initialize.__name__} | {event.epoch} | {event.train_loss:.3f} | "
                        f"{event.train_accuracy:.1%} | {event.top1:.1%} |",
                        flush=True,
                    )


def _builder(initialize: Callable[[nn.Module], None]) -> Callable[[Recipe, int], Classifier]:
    def build_initialized(recipe: Recipe, classes: int) -> Classifier:
        classifier = build(recipe, classes)
        with torch.no_grad():
            initialize(classifier)
        return classifier

    return build_initialized


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
