"""Export turns a run's checkpoint into a version in the model store.

It recomputes batch-normalization statistics, fits the calibration temperature, exports TorchScript and int8 files,
measures them on the test set and publishes them.

Input: a run folder with a checkpoint.
Output: `models/<name>/<version>/`, which is made live if the promotion rule allows it.
"""

from collections.abc import Collection, Generator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from training.dataset import Dataset, Split, hold_out
from training.evaluate import evaluate, expected_calibration_error, fit_familiarity, fit_temperature, predict
from training.files import sha256
from training.loop import make_splits, to_device
from training.networks import Classifier, build
from training.phase_report import PhaseReport, predict_with_reports, record_reports
from training.provenance import collect_provenance
from training.recipes import Recipe
from training.run import Publication, Run, State
from training.runtimes import Form, openvino, selection, torch_export, torchscript
from training.runtimes.forms import FORM_FILES, require_exporters
from training.runtimes.openvino import INT8, OpenVinoEngine
from training.store import (
    MODEL,
    EpochSummary,
    ExtraData,
    FamiliarityThreshold,
    ModelCard,
    Promotion,
    QuantizationReport,
    Store,
)

STATISTICS_IMAGES = 5120
STATISTICS_BATCH = 128
CALIBRATION_IMAGES = 300
COMPARISON_IMAGES = 1000  # used if the recipe holds no images out
MAX_ACCURACY_DROP = 0.003
CPU = torch.device("cpu")


def publish(
    run: Run, dataset: Dataset, store: Store, promotion: Promotion = "if-better", notes: str = ""
) -> Publication:
    """Export a run's last checkpoint as `export` does, and record the progress in the run's metrics."""
    steps = record_reports(export(run, dataset, store, promotion, notes), run)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return cast(Publication, stop.value)


def export(
    run: Run,
    dataset: Dataset,
    store: Store,
    promotion: Promotion = "if-better",
    notes: str = "",
    also: Collection[Form] = (),
) -> Generator[PhaseReport, None, Publication]:
    """Export a run's last checkpoint, measure the exported file on the test set, and publish it.

    Args:
        run: The run, with at least one finished epoch.
        dataset: The data set of the run.
        store: The model store that receives the version.
        promotion: Rule for making the version live, see `Store.promote_if`.
        notes: Free text for the model card.
        also: Forms to write beside `model.pt`.

    Yields:
        Progress.

    Raises:
        RunError: The run has no checkpoint, or was trained on other data.
        ExportError: The logits of the exported file differ from those of the network, or the exporter of a form is
            missing.
        EngineError: The logits of a form differ from those of `model.pt`.
    """
    require_exporters(also)
    recipe = run.recipe()
    announced = run.announced_publication()
    if announced and (card := store.find_by_checksum(recipe.model, announced)):
        # The last attempt crashed just after publishing.
        return _promote_and_record(run, store, card, promotion)
    classifier, state = restore(run, recipe, dataset)
    exporting = PhaseReport("exporting", "renewing the statistics and calibrating", epoch=state["epoch"])
    yield exporting
    temperature, familiarity = _round_and_calibrate(classifier, recipe, dataset, state["epoch"])
    with store.draft(recipe.model) as draft:
        yield replace(exporting, message=f"writing {MODEL}")
        torchscript.save(classifier, draft / MODEL)
        for form in also:
            yield replace(exporting, message=f"writing {FORM_FILES[form]}")
            torch_export.save(classifier, draft / FORM_FILES[form], form)
            selection.load(draft / MODEL, "cpu", form)  # compares the logits
        quantization = (yield from quantize(draft / MODEL, recipe, dataset, state["epoch"])) if recipe.int8 else None
        images, labels = to_device(dataset.test, CPU)
        measuring = PhaseReport("measuring", f"measuring {MODEL}", images=len(images), epoch=state["epoch"])
        engine = selection.load(draft / MODEL, "cpu", purpose="evaluation")
        logits = yield from predict_with_reports(engine.compute_logits, images, measuring)
        if quantization and quantization.accepted:
            measuring = replace(measuring, message=f"measuring {INT8}")
            int8 = OpenVinoEngine(draft / INT8).compute_logits
            test = evaluate((yield from predict_with_reports(int8, images, measuring)), labels)
            quantization = quantization.model_copy(update={"test": test})
        extra = dataset.extra
        curve = [EpochSummary.model_validate(metrics) for metrics in run.epochs() if metrics["epoch"] <= state["epoch"]]
        card = ModelCard(
            name=recipe.model,
            version=0,
            created=datetime.now(UTC).replace(microsecond=0),
            recipe=recipe.public_fields,
            classes=list(dataset.classes),
            superclasses=list(dataset.superclasses),
            parameters=sum(parameter.numel() for parameter in classifier.parameters()),
            seed=recipe.seed,
            data=dataset.fingerprint,
            temperature=temperature,
            test=evaluate(logits, labels),
            test_ece_uncalibrated=expected_calibration_error(logits * temperature, labels),
            int8=quantization,
            familiarity=familiarity,
            extra_data=ExtraData(images=len(extra.split), sha256=extra.sha256) if extra else None,
            curve=curve,
            training_seconds=sum(point.seconds for point in curve),
            **(state.get("provenance") or collect_provenance()),  # runs of earlier releases lack it
            notes=notes,
            files={},
        )
        yield PhaseReport("publishing", f"publishing {recipe.model}", epoch=state["epoch"])
        run.save_test_logits(logits, temperature)
        run.announce_publication(sha256(draft / MODEL))
        card = store.publish(draft, card)
    return _promote_and_record(run, store, card, promotion)


def _round_and_calibrate(
    classifier: Classifier, recipe: Recipe, dataset: Dataset, epoch: int
) -> tuple[float, FamiliarityThreshold | None]:
    """Round the weights, recompute the batch-normalization statistics, and set the temperature.

    Returns:
        The temperature, and the threshold of familiar images if the recipe holds images out.
    """
    torchscript.round_weights(classifier)
    training, _, validation = make_splits(recipe, dataset)
    if not recipe.trains_in_evaluation_mode(epoch):  # weights of that mode fit the frozen statistics already
        recompute_batch_norm(classifier, sample(training, STATISTICS_IMAGES))
    if not recipe.validation_images:
        return classifier.temperature.item(), None
    images, labels = to_device(validation, CPU)
    logits = predict(classifier, images)
    classifier.temperature.fill_(fit_temperature(logits, labels))
    temperature = classifier.temperature.item()
    return temperature, fit_familiarity(logits / temperature)


def _promote_and_record(run: Run, store: Store, card: ModelCard, promotion: Promotion) -> Publication:
    live = store.promote_if(card, promotion)
    epoch = card.curve[-1].epoch if card.curve else None
    published = Publication(model=card.name, version=card.version, live=live, test=card.test, epoch=epoch)
    run.record_publication(published)
    return published


def quantize(
    model: Path, recipe: Recipe, dataset: Dataset, epoch: int
) -> Generator[PhaseReport, None, QuantizationReport]:
    """Write an int8 model beside an exported file, if its accuracy drops by at most `MAX_ACCURACY_DROP`.

    Accuracy is the mean over four views of each held-out image, mirrored and shifted, because a drop of a few tenths of
    a point is within the noise of a single view. If int8 in all layers loses too much, the first layer stays in
    floating point. The reason is that upsampled images have little energy in high frequencies, so that high-frequency
    filters mostly see the rounding error of the pixels.

    Returns:
        The report, without measures on the test set.
    """
    samples, comparison = quantization_images(recipe, dataset)
    images, labels = to_device(comparison, CPU)
    comparing = PhaseReport("quantizing", f"measuring {MODEL} on held-out images", epoch=epoch)
    before = yield from _measure_top1_in_views(OpenVinoEngine(model), images, labels, comparing)
    for float_first_layer in (False, True):
        layers = "all layers but the first" if float_first_layer else "all layers"
        yield replace(comparing, message=f"quantizing {layers} to int8")
        file = openvino.quantize(model, samples, float_layers=[0] if float_first_layer else [])
        comparing = replace(comparing, message=f"measuring {INT8} on held-out images")
        after = yield from _measure_top1_in_views(OpenVinoEngine(file), images, labels, comparing)
        drop = before - after
        if accepted := drop <= MAX_ACCURACY_DROP:
            break
    if not accepted:
        openvino.delete_quantized(file)
    return QuantizationReport(
        accepted=accepted, images=len(comparison), lost_top1=drop, float_first_layer=float_first_layer, test=None
    )


def quantization_images(recipe: Recipe, dataset: Dataset) -> tuple[Tensor, Split]:
    """Return the images for calibrating a quantized model and for comparing its accuracy, both from the training split.

    Calibration images are uint8 [CALIBRATION_IMAGES, 32, 32, 3]. Comparison images are the recipe's validation split.
    If the recipe holds no images out, they are at most `COMPARISON_IMAGES` training images other than these.
    """
    count = recipe.validation_images or min(COMPARISON_IMAGES, len(dataset.train) // 2)
    training, comparison = hold_out(dataset.train, count)
    return sample(training, CALIBRATION_IMAGES), comparison


def sample(split: Split, count: int) -> Tensor:
    """Return a fixed random sample of a split: uint8 [count, 32, 32, 3], with the classes mixed."""
    images, _ = to_device(split, CPU)
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]]


def recompute_batch_norm(classifier: Classifier, images: Tensor) -> None:
    """Recompute batch-normalization statistics over many batches of unaugmented images, with the final weights.

    This is the precise BatchNorm of Wu & Johnson 2021, arXiv:2105.07576, section 3. The running mean from training
    covers only the last few batches, with shifted images and changing weights. Frozen stages keep their statistics.

    Args:
        classifier: Classifier in evaluation mode. Its statistics change in place; its weights do not.
        images: uint8 [N, 32, 32, 3] of the training split.
    """
    batches = [batch for batch in images.split(STATISTICS_BATCH) if len(batch) == STATISTICS_BATCH] or [images]
    classifier.train()
    layers: list[Any] = [each for each in classifier.modules() if hasattr(each, "running_mean") and each.training]
    classifier.eval()
    for layer in layers:
        layer.train()
    with torch.no_grad():
        for number, batch in enumerate(batches, start=1):
            for layer in layers:
                layer.momentum = 1 / number  # makes the running mean the mean over all batches so far
            classifier(batch.permute(0, 3, 1, 2))
    classifier.eval()


def _measure_top1_in_views(
    engine: OpenVinoEngine, images: Tensor, labels: Tensor, report: PhaseReport
) -> Generator[PhaseReport, None, float]:
    views = [view.roll(shift, (1, 2)) for view in (images, images.flip(2)) for shift in ((0, 0), (2, 2))]
    report = replace(report, images=len(views) * len(images))
    logits = yield from predict_with_reports(engine.compute_logits, torch.cat(views), report)
    return (logits.argmax(1) == labels.repeat(len(views))).double().mean().item()


def restore(run: Run, recipe: Recipe, dataset: Dataset) -> tuple[Classifier, State]:
    """Return the classifier of a run's last checkpoint, on the CPU in evaluation mode, and the whole checkpoint."""
    state = run.load(dataset.fingerprint)
    stages = recipe.trainable_in(state["epoch"])
    classifier = build(recipe.from_scratch.model_copy(update={"trainable": stages}), len(dataset.classes))
    classifier.load_state_dict(state["classifier"])
    return classifier.eval(), state
