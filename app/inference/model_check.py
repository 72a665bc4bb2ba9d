"""Check that a loaded model fits its card."""

import numpy as np

from training.runtimes.engine import Engine, example_images
from training.store import CARD, ModelCard, StoreError

_EXAMPLES = 2  # images on which a model is checked


def check_fit(card: ModelCard, engine: Engine) -> None:
    """Check that a model computes one finite logit per image and class of its card.

    Raises:
        StoreError: The shape of the logits does not match the card's classes, or a logit is not finite.
    """
    logits = engine(example_images(_EXAMPLES).numpy())
    if logits.shape != (_EXAMPLES, len(card.classes)):
        raise StoreError(
            f"{card.name} version {card.version} computes logits of shape {list(logits.shape)} for {_EXAMPLES} images, "
            f"but its {CARD} names {len(card.classes)} classes; publish it again with the card of this model"
        )
    if not np.isfinite(logits).all():
        raise StoreError(f"{card.name} version {card.version} computes logits that are not finite; publish it again")
