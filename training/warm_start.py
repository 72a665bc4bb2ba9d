"""A warm start initializes a network with the weights of a published version.

Input: a version in the model store.
Output: its weights in a classifier with the same network, or an error that gives the reason why it is impossible.
"""

from training.dataset import Dataset
from training.networks import Classifier
from training.recipes import Recipe
from training.runtimes.torchscript import load_weights
from training.store import Store, StoreError


def load(classifier: Classifier, recipe: Recipe, store: Store, dataset: Dataset) -> None:
    """Load the weights of the recipe's predecessor into a classifier, except the calibration temperature.

    Args:
        classifier: Classifier of the recipe, changed in place.
        recipe: A recipe with a predecessor.
        store: Model store of the predecessor.
        dataset: Data set of the run.

    Raises:
        StoreError: The version cannot be used (see `Store.verify_source`), or it holds a graph without weights.
        RecipeError: The version has another network or normalization.
    """
    version = recipe.weights
    recipe.require_fit(store.source_card(version).recipe)
    file = store.verify_source(version, dataset.classes, dataset.fingerprint, recipe.validation_images)
    weights = load_weights(file)
    if not weights:
        raise StoreError(f"{version} was exported as a graph without weights; use it as teacher, or give another one")
    classifier.load_state_dict(weights | {"temperature": classifier.temperature})
