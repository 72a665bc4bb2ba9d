"""Starting from the weights of a published version: training goes on where another run has ended.

In: a version in the model store.  Out: its weights in a classifier of the same network, or an error that says why not.
"""

from training import torchscript
from training.data import Dataset
from training.networks import Classifier
from training.recipes import Recipe
from training.store import Store, StoreError


def load(classifier: Classifier, recipe: Recipe, store: Store, dataset: Dataset) -> None:
    """Take over the weights of the version that a recipe starts from, all but its calibration temperature.

    Args:
        classifier: of the recipe; it is changed in place.
        dataset: that it is trained on.

    Raises:
        StoreError: see `Store.learnable`; or the version has no weights of its own.
        RecipeError: the version is of another network.
    """
    version = recipe.weights
    recipe.require_fit(store.card(*store.parse(version)).recipe)
    file = store.learnable(version, dataset.classes, dataset.fingerprint, recipe.validation_images)
    weights = torchscript.load_weights(file)
    if not weights:
        raise StoreError(f"{version} was exported as a graph only: it can teach, but not be trained on")
    classifier.load_state_dict(weights | {"temperature": classifier.temperature})
