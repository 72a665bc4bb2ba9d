"""Starting from the weights of a published version: training goes on where another run has ended.

In: a version in the model store.  Out: its weights in a classifier of the same network, or an error that says why not.
"""

from training import torchscript
from training.data import Dataset
from training.networks import Classifier
from training.recipes import RecipeError
from training.store import Store, StoreError


def load(classifier: Classifier, version: str, validation_images: int, store: Store, dataset: Dataset) -> None:
    """Take over the weights of a published version, all but its calibration temperature.

    Args:
        classifier: of the same network; it is changed in place.
        version: such as resnet/3.
        validation_images: that the run holds out of the data set's training images.

    Raises:
        StoreError: the version does not exist, is damaged, or is of another network or other classes.
        RecipeError: it has been trained on images that the run holds out.
    """
    card = store.card(*store.parse(version))
    held_out = card.recipe.get("validation_images", 0)
    if card.data == dataset.fingerprint and validation_images > held_out:
        raise RecipeError(
            f"{version} has been trained on all but {held_out} images, so validation_images={validation_images} would "
            f"validate on images that it knows; give at most {held_out}"
        )
    weights = torchscript.load_weights(store.model_file(version, dataset.classes))
    try:
        classifier.load_state_dict(weights | {"temperature": classifier.temperature})
    except RuntimeError as error:
        raise StoreError(f"{version} is of another network or width, or was exported as a graph only") from error
