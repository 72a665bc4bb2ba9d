"""Predict in this process, without a server: `load("resnet18").predict("photo.jpg")`.

The same decoding and engine as in the service, and the same results as those of `app.client`.
"""

from pathlib import Path
from typing import overload

import numpy as np

from app.client import Explanation, Image, PredictedClass, Prediction, ServiceError, encode_image
from app.exceptions import Problem
from app.inference import explanation
from app.inference.batching import BatchOutput, Images
from app.inference.images.encoded import EncodedImage
from app.settings import Settings
from training.runtimes import Device, Runtime, selection
from training.runtimes.cascade import CascadeEngine
from training.runtimes.engine import Engine
from training.store import ModelCard, open_store

_BATCH = 64


class LocalModel:
    """A loaded model version. One thread at a time may use it.

    Args:
        card: Card of the version.
        engine: Its engine.
        settings: Limits of an image.
    """

    def __init__(self, card: ModelCard, engine: Engine, settings: Settings):
        self.card = card
        self.engine = engine
        self._limits = settings.max_image_bytes, settings.max_image_pixels

    @overload
    def predict(self, images: list[Image] | tuple[Image, ...], *, top_k: int = 5) -> list[Prediction]: ...
    @overload
    def predict(self, images: Image, *, top_k: int = 5) -> Prediction: ...
    def predict(
        self, images: Image | list[Image] | tuple[Image, ...], *, top_k: int = 5
    ) -> Prediction | list[Prediction]:
        """Classify one image, or a list of images, see `app.client.Client.predict`.

        Raises:
            ServiceError: An image cannot be decoded. It has the status and the detail of the service's response.
            OSError: A file cannot be read.
        """
        if not isinstance(images, list | tuple):
            return self._predict([images], top_k)[0]
        chunks = (list(images[start : start + _BATCH]) for start in range(0, len(images), _BATCH))
        return [prediction for chunk in chunks for prediction in self._predict(chunk, top_k)]

    def _predict(self, images: list[Image], top_k: int) -> list[Prediction]:
        names, pixels, warnings = zip(*map(self._decode, images), strict=True)
        output = self._compute(np.array(pixels))
        order, probabilities = output.ranking
        threshold = self.card.familiarity.threshold if self.card.familiarity else None
        return [
            Prediction(
                classes=tuple(
                    PredictedClass(each, self.card.classes[each], self.card.superclasses[each], float(probability))
                    for each, probability in zip(best[:top_k].tolist(), row, strict=False)
                ),
                model=self.card.name,
                version=self.card.version,
                file=name,
                familiar=None if threshold is None else score >= threshold,
                familiarity=score,
                warnings=tuple(of_image),
            )
            for name, best, row, score, of_image in zip(
                names, order, probabilities, output.familiarity.tolist(), warnings, strict=True
            )
        ]

    def _compute(self, images: Images) -> BatchOutput:
        if not isinstance(self.engine, CascadeEngine):
            return BatchOutput(self.engine(images))
        logits, first = self.engine.compute(images)
        return BatchOutput(logits, familiarity=BatchOutput(first).familiarity)

    def explain(self, image: Image, *, label: str | None = None) -> Explanation:
        """Explain a class, see `app.client.Client.explain`.

        Raises:
            ServiceError: The image cannot be decoded.
            BadRequest: The model has no class with this label.
            OSError: The file cannot be read.
        """
        name, pixels, warnings = self._decode(image)
        masked = explanation.occlude(pixels)
        chunks = np.split(masked, range(_BATCH, len(masked), _BATCH))
        probabilities = np.concatenate([BatchOutput(self.engine(chunk)).probabilities for chunk in chunks])
        class_id = int(probabilities[0].argmax()) if label is None else explanation.find_class(label, self.card)
        importance = explanation.importance_map(probabilities[:, class_id])
        return Explanation(
            model=self.card.name,
            version=self.card.version,
            class_id=class_id,
            label=self.card.classes[class_id],
            superclass=self.card.superclasses[class_id],
            probability=float(probabilities[0, class_id]),
            map=tuple(map(tuple, importance.round(explanation.DECIMALS).tolist())),
            file=name,
            warnings=tuple(warnings),
        )

    def _decode(self, image: Image) -> tuple[str | None, Images, list[str]]:
        """Return the file name, the pixels, uint8 [3, 32, 32], and the warnings of an image."""
        name, content = encode_image(image)
        try:
            encoded = EncodedImage(content, *self._limits)
            return name, encoded.decode(), encoded.warnings
        except Problem as error:
            detail = f"{name}: {error.detail}" if name else error.detail
            raise ServiceError(int(error.status), detail, title=error.status.phrase) from error


def load(
    version: str | None = None, models: str | Path | None = None, device: Device = "auto", runtime: Runtime = "auto"
) -> LocalModel:
    """Load a model version.

    Args:
        version: NAME for the live version, or NAME/VERSION, such as "resnet18/5". Default:
            CIFAR100_DEFAULT_MODEL, or else a live cascade or the live version with the highest accuracy.
        models: Model store. Default: CIFAR100_MODELS, or else the folder `models`.
        device: "auto" selects a GPU if there is one.
        runtime: "auto" selects the fastest one that computes the model right.

    Raises:
        StoreError: There is no such version, or it is damaged.
    """
    settings = Settings()
    store = open_store(settings.models if models is None else models)
    version = version or settings.default_model
    card = store.card(*store.parse(version)) if version else store.default_card()
    return LocalModel(card, selection.load_version(store, card, device, runtime), settings)
