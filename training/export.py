"""From a finished run to a version in the model store: settle its statistics, calibrate, export, measure, publish.

In: a run folder with a checkpoint.  Out: `models/<name>/<version>/`, live if it is good enough.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training import openvino_ir, torchscript
from training.data import Dataset, Split, hold_out
from training.evaluate import evaluate, expected_calibration_error, fit_temperature, predict
from training.loop import splits, to_device
from training.networks import Classifier, build
from training.provenance import provenance
from training.recipes import Recipe
from training.run import Publication, Run, State
from training.store import MODEL, EpochSummary, ModelCard, Promotion, Quantised, Store, sha256

STATISTICS_IMAGES = 5120
STATISTICS_BATCH = 128
CALIBRATION_IMAGES = 300
JUDGED_IMAGES = 1000  # where a recipe holds none out
MOST_LOST = 0.003
CPU = torch.device("cpu")


def publish(
    run: Run, dataset: Dataset, store: Store, promotion: Promotion = "if-better", notes: str = ""
) -> Publication:
    """Export a run's last checkpoint, measure the exported file on the test set, and publish it.

    Args:
        run: at least one epoch must be finished.
        dataset: what the run was trained on.
        notes: free text for the card.

    Raises:
        RunError: the run has no checkpoint, or was trained on other data.
        ExportError: the exported file does not compute what the network computes.
    """
    recipe = run.recipe()
    begun = run.announced_publication()
    if begun and (card := store.find(recipe.model, begun)):  # the last attempt crashed just after publishing
        return _conclude(run, store, card, promotion)
    classifier, state = restore(run, recipe, dataset)
    torchscript.round_weights(classifier)
    training, _, validation = splits(recipe, dataset)
    if not recipe.trains_in_evaluation_mode(state["epoch"]):  # otherwise the weights were fitted to these statistics
        renew_statistics(classifier, sample(training, STATISTICS_IMAGES))
    if recipe.validation_images:
        images, labels = to_device(validation, CPU)
        classifier.temperature.fill_(fit_temperature(predict(classifier, images), labels))
    temperature = classifier.temperature.item()

    with store.draft(recipe.model) as draft:
        torchscript.save(classifier, draft / MODEL)
        images, labels = to_device(dataset.test, CPU)
        logits = predict(torchscript.load(draft / MODEL), images)
        int8 = quantise(draft / MODEL, recipe, dataset) if recipe.int8 else None
        curve = [EpochSummary.model_validate(metrics) for metrics in run.epochs() if metrics["epoch"] <= state["epoch"]]
        card = ModelCard(
            name=recipe.model,
            version=0,
            created=datetime.now(UTC).replace(microsecond=0),
            # Where the pretrained weights lay on this machine is nobody's business; which file it was is.
            recipe=recipe.model_dump() | {"weights": recipe.predecessor or Path(recipe.weights).name},
            classes=list(dataset.classes),
            superclasses=list(dataset.superclasses),
            parameters=sum(parameter.numel() for parameter in classifier.parameters()),
            seed=recipe.seed,
            data=dataset.fingerprint,
            temperature=temperature,
            test=evaluate(logits, labels),
            test_ece_uncalibrated=expected_calibration_error(logits * temperature, labels),
            int8=int8,
            curve=curve,
            training_seconds=sum(point.seconds for point in curve),
            **(state.get("provenance") or provenance()),  # which runs of earlier releases do not tell
            notes=notes,
            files={},
        )
        run.save_test_logits(logits, temperature)
        run.announce_publication(sha256(draft / MODEL))
        card = store.publish(draft, card)
    return _conclude(run, store, card, promotion)


def _conclude(run: Run, store: Store, card: ModelCard, promotion: Promotion) -> Publication:
    live = store.promote_if(card, promotion)
    epoch = card.curve[-1].epoch if card.curve else None
    published = Publication(model=card.name, version=card.version, live=live, test=card.test, epoch=epoch)
    run.record_publication(published)
    return published


def quantise(model: Path, recipe: Recipe, dataset: Dataset) -> Quantised:
    """Put an int8 form beside an exported file, unless it is less accurate on images held out from training.

    Each of these is judged in four views, mirrored and shifted, as a fall of a few tenths of a point would be lost in
    the noise otherwise. Where int8 throughout costs too much, the first layer goes back to floating point: upsampled
    images have little in their high frequencies, and filters that look there see the rounding of the pixels instead.
    """
    samples, judged = quantisation_images(recipe, dataset)
    images, labels = to_device(judged, CPU)
    before = _top1_in_views(openvino_ir.Compiled(model), images, labels)
    for float_first_layer in (False, True):
        file = openvino_ir.quantise(model, samples, in_float=[0] if float_first_layer else [])
        int8 = openvino_ir.Compiled(file)
        lost = before - _top1_in_views(int8, images, labels)
        if accepted := lost <= MOST_LOST:
            break
    test = None
    if accepted:
        images, labels = to_device(dataset.test, CPU)
        test = evaluate(predict(int8.on_tensors, images), labels)
    else:
        openvino_ir.remove(file)
    return Quantised(
        accepted=accepted, images=len(judged), lost_top1=lost, float_first_layer=float_first_layer, test=test
    )


def quantisation_images(recipe: Recipe, dataset: Dataset) -> tuple[Tensor, Split]:
    """Training images to calibrate a quantised form with, uint8 [CALIBRATION_IMAGES, 32, 32, 3], and others to judge it
    by: those that the recipe holds out, if it does."""
    training, judged = hold_out(dataset.train, recipe.validation_images or min(JUDGED_IMAGES, len(dataset.train) // 2))
    return sample(training, CALIBRATION_IMAGES), judged


def sample(split: Split, count: int) -> Tensor:
    """The same `count` images of a split every time, in an order that mixes the classes: uint8 [count, 32, 32, 3]."""
    images, _ = to_device(split, CPU)
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]]


def renew_statistics(classifier: Classifier, images: Tensor) -> None:
    """Give batch normalisation the mean statistics of many batches of images as they are, with the final weights.

    While a network trains it keeps a running mean over the last few batches instead, of shifted images and of weights
    that still change (Wu & Johnson 2021, arXiv:2105.07576, section 3). Stages that did not train keep theirs.

    Args:
        classifier: in evaluation mode, changed in place; its weights stay.
        images: uint8 [N, 32, 32, 3] of the training split.
    """
    batches = [batch for batch in images.split(STATISTICS_BATCH) if len(batch) == STATISTICS_BATCH] or [images]
    classifier.train()
    trained: list[Any] = [each for each in classifier.modules() if hasattr(each, "running_mean") and each.training]
    classifier.eval()
    for module in trained:
        module.train()
    with torch.no_grad():
        for number, batch in enumerate(batches, start=1):
            for module in trained:
                module.momentum = 1 / number  # a running mean becomes that of all batches so far
            classifier(batch.permute(0, 3, 1, 2))
    classifier.eval()


def _top1_in_views(network: openvino_ir.Compiled, images: Tensor, labels: Tensor) -> float:
    views = [view.roll(shift, (1, 2)) for view in (images, images.flip(2)) for shift in ((0, 0), (2, 2))]
    hits = [(predict(network.on_tensors, view).argmax(1) == labels).double().mean() for view in views]
    return torch.stack(hits).mean().item()


def restore(run: Run, recipe: Recipe, dataset: Dataset) -> tuple[Classifier, State]:
    """The classifier of a run's last checkpoint, on the CPU in evaluation mode, and the whole checkpoint."""
    state = run.load(dataset.fingerprint)
    stages = recipe.trainable_in(state["epoch"])
    classifier = build(recipe.blank.model_copy(update={"trainable": stages}), len(dataset.classes))
    classifier.load_state_dict(state["classifier"])
    return classifier.eval(), state
