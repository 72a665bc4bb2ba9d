"""A run trains in one or two phases. `Phase` is the source of a phase's batches and the split of the network.

While stages are frozen, the trunk computes their features and the head trains on them. The features are computed once
if they can be cached. In the fine-tuning phase (`finetune_epochs`) all stages train on images.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from training import augment
from training.features import prepare
from training.networks import Classifier, TransferResNet18
from training.phase_report import PhaseReport
from training.recipes import Recipe


@dataclass(frozen=True)
class Phase:
    """A phase of training: its batches, the frozen trunk and the trained head.

    Attributes:
        batches: Function of a seeded generator and an epoch number. It yields pairs of a batch [B, C, H, W], uint8
            images or cached features, and the indices int64 [B] of its images in the training split.
        evaluation: Images or features [M, H, W, C] that are evaluated after every epoch.
        trunk: Function from a batch to the inputs of `head`: the images themselves or, if stages are frozen, their
            features. Mixup and CutMix combine these inputs.
        head: Function from these inputs to logits [B, classes].
    """

    batches: Callable[[torch.Generator, int], Iterator[tuple[Tensor, Tensor]]]
    evaluation: Tensor
    trunk: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]

    def compute_logits(self, batch: Tensor) -> Tensor:
        """Compute the logits [B, classes] of a batch [B, C, H, W]."""
        return self.head(self.trunk(batch))


def make_phase(
    recipe: Recipe, epoch: int, classifier: Classifier, images: Tensor, evaluation: Tensor, dtype: torch.dtype
) -> Generator[PhaseReport, None, Phase]:
    """Make the phase that begins with an epoch, and make its stages of the network trainable.

    Args:
        recipe: Recipe of the run.
        epoch: Number of the epoch, counted from 1.
        classifier: Classifier of the run, changed in place.
        images: uint8 [N, 32, 32, 3], the training split on the classifier's device.
        evaluation: uint8 [M, 32, 32, 3], the split that is evaluated after every epoch.
        dtype: Data type in which the frozen stages compute.

    Yields:
        Progress of computing features.
    """
    network = classifier.network
    if isinstance(network, TransferResNet18) and epoch > recipe.epochs:
        network.set_trainable(recipe.trainable_in(epoch))
        recipe = recipe.model_copy(update={"crop_padding": recipe.finetune_crop_padding})
    if not isinstance(network, TransferResNet18) or not network.frozen_stages:
        return Phase(partial(augment.batches, images, recipe), evaluation, lambda batch: batch, classifier)

    features = yield from prepare(recipe, classifier, images, evaluation, dtype)
    if features is None:

        def compute_features(batch: Tensor) -> Tensor:
            return network.forward_features(classifier.preprocess(batch))

        return Phase(partial(augment.batches, images, recipe), evaluation, compute_features, network.forward_head)

    def load_features(batch: Tensor) -> Tensor:
        return batch.to(images.device).float()

    return Phase(partial(features.batches, recipe), features.evaluation, load_features, network.forward_head)
