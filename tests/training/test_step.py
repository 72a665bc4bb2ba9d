"""Test the optimization step: its sums, its recordings, and a step computed by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from training.dataset import Dataset, load_dataset
from training.loop import make_splits, to_device, train
from training.networks import build
from training.phase import make_phase
from training.recipes import Recipe, make_recipe
from training.run import Run
from training.step import TrainStep

CPU = torch.device("cpu")
FIELDS = {"width": 8, "batch_size": 32, "validation_images": 0, "precision": "float32", "label_smoothing": 0}


@pytest.fixture(scope="module")
def tiny() -> Dataset:
    return load_dataset("synthetic:1")


def begun(recipe: Recipe, dataset: Dataset) -> TrainStep:
    """A step at the beginning of the first epoch."""
    torch.manual_seed(recipe.seed)
    classifier = build(recipe)
    split, _, evaluation = make_splits(recipe, dataset)
    images, labels = to_device(split, CPU)
    step = TrainStep(recipe, classifier, labels, torch.float32)
    phases = make_phase(recipe, 1, classifier, images, torch.from_numpy(evaluation.images), torch.float32)
    with pytest.raises(StopIteration) as finished:
        next(phases)
    step.begin_phase(finished.value.value)
    step.begin_epoch(1)
    return step


def test_a_step_of_plain_sgd_subtracts_the_gradient_of_the_cross_entropy(tiny: Dataset) -> None:
    fields = {"optimizer": "sgd", "momentum": 0, "weight_decay": 0}
    step = begun(make_recipe("resnet", FIELDS | fields), tiny)
    batch, indices = next(step.phase.batches(torch.Generator().manual_seed(0), 1))
    expected = build(step.recipe)
    expected.load_state_dict(step.classifier.state_dict())
    logits = expected(batch)
    loss = F.cross_entropy(logits, step.labels[indices])
    loss.backward()
    step(batch, indices, 0.1, torch.Generator())
    for (name, after), before in zip(step.classifier.named_parameters(), expected.parameters(), strict=True):
        assert before.grad is not None
        torch.testing.assert_close(after, before - 0.1 * before.grad, msg=name)
    assert step.learning_rate == 0.1
    assert step.loss_sum.item() == pytest.approx(32 * loss.item())
    assert step.correct.item() == (logits.argmax(1) == step.labels[indices]).sum().item()


def test_the_sums_keep_their_addresses_and_begin_every_epoch_at_zero(tiny: Dataset) -> None:
    step = begun(make_recipe("resnet", FIELDS), tiny)
    addresses = step.loss_sum.data_ptr(), step.correct.data_ptr()
    for batch, indices in step.phase.batches(torch.Generator().manual_seed(0), 1):
        step(batch, indices, 0.01, torch.Generator())
    assert step.loss_sum.item() > 0
    step.begin_epoch(2)
    assert (step.loss_sum.item(), step.correct.item()) == (0, 0)
    assert (step.loss_sum.data_ptr(), step.correct.data_ptr()) == addresses


TRANSFER = {"image_size": 32, "weights": "none", "validation_images": 0, "batch_size": 50, "epochs": 1}


@pytest.mark.parametrize(
    ("name", "fields", "recordings"),
    [
        ("resnet", FIELDS | {"epochs": 2}, 1),
        ("resnet-seed", {"width": 8, "epochs": 3, "eval_mode_after": 1}, 2),
        ("resnet18", TRANSFER | {"finetune_epochs": 2}, 2),
    ],
    ids=["one phase", "evaluation mode from the second epoch on", "two phases"],
)
def test_a_new_phase_or_mode_starts_a_new_recording(
    name: str,
    fields: dict[str, Any],
    recordings: int,
    tiny: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A CUDA graph replays the network and the mode of its recording."""
    started = list[TrainStep]()
    start = TrainStep._start_recording

    def counted(step: TrainStep) -> None:
        started.append(step)
        start(step)

    monkeypatch.setattr(TrainStep, "_start_recording", counted)
    run = Run(tmp_path)
    run.create(make_recipe(name, fields))
    list(train(run.recipe(), tiny, run, CPU))
    assert len(started) == recordings
