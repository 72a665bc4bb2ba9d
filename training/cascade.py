"""Fit a cascade of two published versions and publish it.

A cascade answers with a fast first member where that is confident. It sends the other images on to a second member, and
answers with a weighted mean of both members' calibrated probabilities.

Input: two versions in the model store, and training images that both have held out.
Output: `models/cascade/<version>/` with `cascade.json` and a card, made live if the promotion rule allows it.

Few images are held out from both members, often 1,000. Their counted accuracy has a standard error above a point, so
none of the three values is chosen by counting correct answers:

- The weights minimize the cross-entropy of the calibrated mean, over a coarse grid.
- The temperature makes the mean's confidence equal its accuracy, as for any model. It is fitted on all held-out images,
  not only on the few that are sent on.
- The threshold sends on as few images as possible while the expected accuracy is at most `TOLERANCE` below that of the
  mean. The expected loss of accuracy by the first member's answer to an image is the mean's probability of its own best
  class minus its probability of the first member's best class. No label occurs in it, it is never negative, and it is 0
  where both agree. `research/cascade.py` compares this with counting.
"""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from training.dataset import Dataset, Split, hold_out
from training.evaluate import evaluate, expected_calibration_error, fit_familiarity, fit_temperature, predict
from training.provenance import collect_provenance
from training.run import Publication
from training.runtimes import selection
from training.runtimes.cascade import answer, average, compute_confidence, find_sent_on, mix
from training.runtimes.engine import Engine
from training.store import (
    CASCADE,
    Cascade,
    CascadeReport,
    Evaluation,
    FamiliarityThreshold,
    ModelCard,
    PinnedMember,
    Promotion,
    Store,
    StoreError,
)

NAME = "cascade"
"""Name of the model in the store."""

TOLERANCE = 0.003
"""Largest expected loss of accuracy against the mean of both members. It is the loss that int8 may cost as well."""

MIN_IMAGES = 100
"""Smallest number of held-out images on which a cascade is fitted."""

WEIGHTS = tuple(((20 - step) / 20, step / 20) for step in range(1, 20))
"""Weights of both members that are tried."""


class Fit(NamedTuple):
    """The values of a cascade, and the share of the images of the fit that are sent on."""

    weights: tuple[float, float]
    temperature: float
    threshold: float
    sent_on: float


def fit(first: Tensor, second: Tensor, labels: Tensor, tolerance: float = TOLERANCE) -> Fit:
    """Fit the weights, the temperature and the threshold of a cascade by the method in the module's docstring.

    Args:
        first: Calibrated logits of the first member on held-out images, float32 [N, classes].
        second: Calibrated logits of the second member on the same images, float32 [N, classes].
        labels: int64 [N].
        tolerance: Largest expected loss of accuracy against the mean of both members, 0-1.
    """
    calibrated = {weights: _calibrate(first, second, labels, weights) for weights in WEIGHTS}
    weights = min(calibrated, key=lambda each: F.cross_entropy(calibrated[each][1], labels).item())
    temperature, logits = calibrated[weights]
    mean = logits.softmax(1)
    expected_loss = mean.amax(1) - mean.gather(1, first.argmax(1, keepdim=True))[:, 0]
    confidence, order = torch.from_numpy(compute_confidence(first.numpy())).sort(descending=True)
    answered = int((expected_loss[order].cumsum(0) <= tolerance * len(labels)).sum())
    bounds = [1.0, *confidence.tolist(), 0.0]
    return Fit(weights, temperature, (bounds[answered] + bounds[answered + 1]) / 2, 1 - answered / len(labels))


def _calibrate(first: Tensor, second: Tensor, labels: Tensor, weights: tuple[float, float]) -> tuple[float, Tensor]:
    """Return the temperature of the weighted mean, and its calibrated logits, float64 [N, classes]."""
    logits = torch.from_numpy(mix(first.numpy(), second.numpy(), weights)).double()
    temperature = fit_temperature(logits, labels)
    return temperature, logits / temperature


def publish(
    store: Store, dataset: Dataset, members: Sequence[str], promotion: Promotion = "if-better", notes: str = ""
) -> Publication:
    """Fit a cascade on the images that both members have held out, measure it on the test set, and publish it.

    The engines are those that serve on this machine.

    Args:
        store: The model store.
        dataset: The data set of both members.
        members: The first and the second member, such as resnet or resnet/4.
        promotion: Rule for making the version live, see `Store.promote_if`.
        notes: Free text for the model card.

    Raises:
        StoreError: A member does not exist or is damaged, was trained on another data set, or has too few held-out
            images in common with the other one.
        EngineError: No runtime can compute a member.
    """
    started = time.perf_counter()
    cards = [store.source_card(member) for member in members]
    held_out = find_held_out(cards, dataset)
    engines = [selection.load_version(store, card) for card in cards]
    first, second = (predict_split(engine, held_out) for engine in engines)
    fitted = fit(first, second, torch.from_numpy(held_out.labels))
    energy, agreement = fit_thresholds(first, second)
    pinned = [PinnedMember(name=card.name, version=card.version, files=card.files) for card in cards]
    cascade = Cascade(
        members=(pinned[0], pinned[1]),
        threshold=fitted.threshold,
        weights=fitted.weights,
        temperature=fitted.temperature,
    )
    test = _measure(cascade, engines, dataset.test)
    card = ModelCard(
        name=NAME,
        version=0,
        created=datetime.now(UTC).replace(microsecond=0),
        recipe={"name": NAME, "tolerance": TOLERANCE, "validation_images": len(held_out)},
        classes=list(dataset.classes),
        superclasses=list(dataset.superclasses),
        parameters=sum(card.parameters for card in cards),
        seed=0,
        data=dataset.fingerprint,
        temperature=cascade.temperature,
        test=test.evaluation,
        test_ece_uncalibrated=test.ece_uncalibrated,
        familiarity=energy,
        full_familiarity=agreement,
        cascade=CascadeReport(
            members=[str(member) for member in pinned],
            engines=[engine.name for engine in engines],
            images=len(held_out),
            sent_on=fitted.sent_on,
            test_sent_on=test.sent_on,
        ),
        curve=[],
        training_seconds=time.perf_counter() - started,
        **collect_provenance(),
        notes=notes,
        files={},
    )
    with store.draft(NAME) as draft:
        (draft / CASCADE).write_text(cascade.model_dump_json(indent=1) + "\n")
        card = store.publish(draft, card)
    return Publication(model=NAME, version=card.version, live=store.promote_if(card, promotion), test=card.test)


def predict_members(store: Store, card: ModelCard, split: Split) -> list[Tensor]:
    """Compute the logits of both members of a published cascade, float32 [N, classes] each.

    Raises:
        StoreError: The cascade or a member is damaged.
        EngineError: No runtime can compute a member.
    """
    store.verify(card)
    members = [store.member_card(member) for member in store.cascade(card).members]
    return [predict_split(selection.load_version(store, member), split) for member in members]


def refit(store: Store, dataset: Dataset, promoted: Publication, promotion: Promotion) -> Publication | None:
    """Fit the live cascade again if a version that has just been made live replaces one of its members.

    Args:
        store: The model store.
        dataset: The data set of the members.
        promoted: The publication of the new member.
        promotion: Rule for making the new cascade live.

    Returns:
        The publication of the new cascade, or None if no live cascade has such a member.

    Raises:
        StoreError, EngineError: The errors of `publish`. The live cascade does not change.
    """
    version = store.live(NAME)
    if version is None or not promoted.live:
        return None
    names = [member.name for member in store.cascade(store.card(NAME, version)).members]
    if promoted.model not in names:
        return None
    notes = f"Fitted again after {promoted.model}/{promoted.version} had gone live."
    return publish(store, dataset, names, promotion, notes)


def fit_thresholds(first: Tensor, second: Tensor) -> tuple[FamiliarityThreshold, FamiliarityThreshold]:
    """Fit the thresholds of familiar images: for the energy of the first member, and for the agreement of both.

    Args:
        first: Calibrated logits of the first member on held-out images, float32 [N, classes].
        second: Calibrated logits of the second member on the same images, float32 [N, classes].
    """
    mean = torch.from_numpy(average(first.numpy(), second.numpy()))
    return fit_familiarity(first), fit_familiarity(mean, "agreement")


def find_held_out(cards: Sequence[ModelCard], dataset: Dataset) -> Split:
    """Return the training images that all versions have held out.

    All recipes and seeds hold out the same images, and a smaller split is a subset of a larger one, see `hold_out`.
    Teachers and predecessors of a version have held out at least as many, see `Store.verify_source`.

    Raises:
        StoreError: A version was trained on another data set, or there are fewer than `MIN_IMAGES` such images.
    """
    for card in cards:
        if card.data != dataset.fingerprint:
            raise StoreError(f"{card.name}/{card.version} was trained on another data set than this one; change --data")
    smallest = min(cards, key=lambda card: card.held_out)
    if smallest.held_out < MIN_IMAGES:
        raise StoreError(
            f"{smallest.name}/{smallest.version} has held out {smallest.held_out} images from its training, and a "
            f"cascade needs {MIN_IMAGES} that both members have held out; train it with validation_images=2000"
        )
    return hold_out(dataset.train, smallest.held_out)[1]


class _Measures(NamedTuple):
    evaluation: Evaluation
    ece_uncalibrated: float
    sent_on: float


def _measure(cascade: Cascade, engines: Sequence[Engine], split: Split) -> _Measures:
    labels = torch.from_numpy(split.labels)
    first = predict_split(engines[0], split)
    rows = find_sent_on(cascade, first.numpy())
    logits, uncalibrated = first, first
    if len(rows):
        second = predict_split(engines[1], split[rows])
        logits, uncalibrated = (
            torch.from_numpy(answer(each, first.numpy(), rows, second.numpy()))
            for each in (cascade, cascade.model_copy(update={"temperature": 1.0}))
        )
    return _Measures(evaluate(logits, labels), expected_calibration_error(uncalibrated, labels), len(rows) / len(split))


def predict_split(engine: Engine, split: Split) -> Tensor:
    """Compute the logits of a split, float32 [N, classes]."""
    return predict(lambda images: torch.from_numpy(engine(images.contiguous().numpy())), torch.from_numpy(split.images))
