"""This package defines the networks; `build` makes the one that a recipe names."""

from training.networks.classifier import Classifier
from training.networks.resnet import ResNet, SharedResNet
from training.networks.transfer import TransferResNet18
from training.recipes import Recipe

# Mean and standard deviation per channel of the training images, for pixel values in 0-1.
CIFAR100_MEAN = (0.5071, 0.4865, 0.4409)
CIFAR100_STD = (0.2673, 0.2564, 0.2762)
HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_NORMALIZATIONS = {"dataset": (CIFAR100_MEAN, CIFAR100_STD), "half": (HALF, HALF)}


def build(recipe: Recipe, classes: int = 100) -> Classifier:
    """Build the classifier of a recipe, initialized by the global random generator and from pretrained weights.

    Weights of a predecessor in the model store are not loaded here, see `warm_start.load`.

    Raises:
        WeightsError: The recipe's pretrained weights cannot be used.
    """
    match recipe.network:
        case "shared-resnet":
            shared = SharedResNet(classes, recipe.width, recipe.dropout, recipe.batch_norm_statistics, recipe.shortcuts)
            return Classifier(shared, *_NORMALIZATIONS[recipe.normalization])
        case "resnet":
            own = ResNet(classes, recipe.width, recipe.dropout)
            return Classifier(own, *_NORMALIZATIONS[recipe.normalization])
        case "resnet18":
            weights = "none" if recipe.predecessor else recipe.weights
            transfer = TransferResNet18(classes, weights, recipe.trainable, recipe.reinitialize)
            return Classifier(transfer, IMAGENET_MEAN, IMAGENET_STD, recipe.image_size)


__all__ = ["Classifier", "ResNet", "SharedResNet", "TransferResNet18", "build"]
