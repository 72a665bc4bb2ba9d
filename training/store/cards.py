"""The metadata of versions: the model card, and the content of a cascade's file.

`training` writes them and `app` reads them. Each is a JSON file in the folder of its version.
"""

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, FiniteFloat, PositiveFloat, model_validator

from training.text import quote

CARD = "card.json"
MODEL = "model.pt"
CASCADE = "cascade.json"

FamiliarityScore = Literal["energy", "agreement"]
Promotion = Literal["if-better", "always", "never"]
"""Rule that decides whether a new version goes live, see `Store.promote_if`."""
Rate = Annotated[float, Field(ge=0, le=1)]

_ROUNDING = 1e-6


class Evaluation(BaseModel, use_attribute_docstrings=True):
    """Measures over one split. Rates are in 0-1."""

    images: int
    """Number of images."""
    top1: Rate
    """Fraction of the images whose most probable class is right."""
    top5: Rate
    """Fraction of the images whose class is among the five most probable ones."""
    loss: FiniteFloat
    """Mean cross-entropy in nats."""
    ece: Rate
    """Expected calibration error over 15 equal bins of confidence (Guo et al. 2017, arXiv:1706.04599)."""
    per_class: list[Rate | None]
    """Top-1 accuracy of each class; None for a class without images in the split."""


class QuantizationReport(BaseModel, use_attribute_docstrings=True):
    """The accuracy cost of quantization to int8."""

    accepted: bool
    """True if the quantized files are published beside the exported one."""
    images: int
    """Number of images in the comparison. They are held out from training, or training images if the recipe holds none
    out."""
    lost_top1: float
    """Top-1 accuracy on these images before quantization minus after, as a fraction; negative if it rises."""
    float_first_layer: bool = False
    """True if the first layer stays in floating point, because int8 in all layers lost too much accuracy."""
    test: Evaluation | None
    """Measures of the quantized model on the full test set, if it was accepted."""


class PinnedMember(BaseModel, use_attribute_docstrings=True):
    """A version that a cascade depends on."""

    name: str
    version: int
    files: dict[str, str]
    """sha256 of every file beside the member's card, by file name."""

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


class Cascade(BaseModel, use_attribute_docstrings=True):
    """The content of `cascade.json`. `training.runtimes.cascade` computes the answers."""

    members: tuple[PinnedMember, PinnedMember]
    """The member that sees every image, and the member that also sees the images that are sent on."""
    threshold: Rate
    """An image is sent on if the probability of the first member's best class is below this value."""
    weights: tuple[PositiveFloat, PositiveFloat]
    """Weights of the members' calibrated probabilities in the answer to an image that is sent on. Their sum is 1."""
    temperature: PositiveFloat
    """Divisor of the logarithm of the weighted mean. It calibrates the answer."""

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if abs(sum(self.weights) - 1) > _ROUNDING:
            raise ValueError(f"the weights {self.weights} have the sum {sum(self.weights)}, not 1")
        return self


class CascadeReport(BaseModel, use_attribute_docstrings=True):
    """The fit of a cascade, and the share of images that need both members."""

    members: list[str]
    """The pinned versions, such as resnet/4."""
    engines: list[str]
    """Names of the engines that computed the members for the fit and the test evaluation."""
    images: int
    """Number of images in the fit. They are held out from the training of both members."""
    sent_on: Rate
    """Share of these images that are sent on to the second member."""
    test_sent_on: Rate
    """Share of the test images that are sent on to the second member."""


class FamiliarityThreshold(BaseModel, use_attribute_docstrings=True):
    """The score below which an image is probably none of the classes."""

    score: FamiliarityScore = "energy"
    """Score of an image. `energy` is the logarithm of the sum of the exponentials of its calibrated logits, which is
    the negative energy of Liu et al. 2020, arXiv:2010.03759. `agreement` is that of the mean of both members'
    calibrated logits, which is high only where both members favor the same class."""
    threshold: FiniteFloat
    """Lowest score of a familiar image."""
    kept: Rate
    """Fraction of the held-out images whose score is at least the threshold."""
    images: int
    """Number of held-out images."""


class ExtraData(BaseModel, use_attribute_docstrings=True):
    """Training images that are not of the data set, such as corrections of users."""

    images: int
    """Number of these images."""
    sha256: str
    """sha256 of the npz file that had them."""


class EpochSummary(BaseModel, use_attribute_docstrings=True):
    """One point of the training curve."""

    epoch: int
    """Number of the epoch, counted from 1."""
    train_loss: float
    """Mean training loss of the epoch."""
    train_accuracy: float
    """Top-1 accuracy on the augmented training images, 0-1."""
    split: str
    """Evaluated split: "validation" if the recipe holds images out, otherwise "test"."""
    loss: float
    """Mean cross-entropy of the evaluated split in nats."""
    top1: float
    """Top-1 accuracy of the evaluated split, 0-1."""
    top5: float
    """Top-5 accuracy of the evaluated split, 0-1."""
    seconds: float
    """Wall time of the epoch, including its evaluation."""


class ModelCard(BaseModel, use_attribute_docstrings=True):
    """The metadata of one version of a model."""

    name: str
    """Name of the model."""
    version: int
    """Number of the version."""
    created: datetime
    """Time of the export."""
    recipe: dict[str, Any]
    """Recipe of the run, by its fields."""
    classes: list[str]
    """Labels of the classes, in the order of the logits."""
    superclasses: list[str]
    """Superclass of each class, in the order of `classes`."""
    parameters: int
    """Number of weights and biases."""
    seed: int
    """Seed of the run."""
    data: str
    """Fingerprint of the data set: sha256 over its images, labels and class names."""
    temperature: float
    """Calibration temperature, fitted on validation images; 1 if the recipe holds none out."""
    test: Evaluation
    """Measures of the exported file on the full test set, with calibrated logits."""
    test_ece_uncalibrated: Rate
    """Expected calibration error on the test set before calibration."""
    int8: QuantizationReport | None = None
    """The quantized model for OpenVINO; None if the version has none."""
    cascade: CascadeReport | None = None
    """The fit of a cascade; None for a version with a model of its own."""
    familiarity: FamiliarityThreshold | None = None
    """The threshold of familiar images; None if the recipe holds no images out, and in cards of earlier releases."""
    full_familiarity: FamiliarityThreshold | None = None
    """The same for the agreement of both members of a cascade; None for other models."""
    extra_data: ExtraData | None = None
    """Further training images; None if there were none."""
    curve: list[EpochSummary]
    """Measures of every epoch."""
    training_seconds: float
    """Wall time of all epochs."""
    device: str
    """Device that trained."""
    libraries: dict[str, str]
    """Versions of the libraries that trained, by name."""
    commit: str | None
    """Git commit of the code that trained the model, if known."""
    notes: str = ""
    """Free text."""
    files: dict[str, str]
    """sha256 of every file beside the card, by file name."""

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if not self.classes:
            raise ValueError("classes is empty")
        if len(set(self.classes)) < len(self.classes):
            twice = next(label for label in self.classes if self.classes.count(label) > 1)
            raise ValueError(f"classes names {quote(twice)} twice")
        for field, count in (("superclasses", len(self.superclasses)), ("test.per_class", len(self.test.per_class))):
            if count != len(self.classes):
                raise ValueError(f"{field} has {count} entries for {len(self.classes)} classes")
        return self

    @property
    def held_out(self) -> int:
        """The number of training images that the recipe held out for validation, which the model has never seen."""
        return int(self.recipe.get("validation_images", 0))

    @property
    def rank(self) -> tuple[bool, float]:
        """The key by which the default model is the greatest: a cascade before others, then the accuracy."""
        return CASCADE in self.files, self.test.top1

    def to_bytes(self) -> bytes:
        """Return the content of the card's file."""
        return f"{self.model_dump_json(indent=1)}\n".encode()
