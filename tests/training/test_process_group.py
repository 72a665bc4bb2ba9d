"""Test runs that several processes train together, which `torchrun` starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training.dataset import Dataset
from training.loop import make_splits
from training.recipes import RecipeError, make_recipe
from training.run import Run
from training.store import LocalStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

ONE_STEP = """
import sys
import torch
from training.networks import build
from training.phase import Phase
from training.process_group import join_torchrun
from training.recipes import make_recipe
from training.step import TrainStep

recipe = make_recipe("resnet", {"width": 8, "optimizer": "sgd", "label_smoothing": 0})
torch.manual_seed(0)
images, labels = torch.randint(256, (7, 3, 32, 32), dtype=torch.uint8), torch.arange(7)
classifier = build(recipe, 100)
with join_torchrun() as group:
    step = TrainStep(recipe, classifier, labels, torch.float32, group)
    step.begin_phase(Phase(None, images, lambda batch: batch, classifier))
    classifier.eval()  # so that no normalization depends on the other images of a share
    step(images, torch.arange(7), 0.1, torch.Generator())
    step.add_up()
    if group.is_first:
        torch.save(classifier.state_dict() | {"loss": step.loss_sum, "seen": torch.tensor(step.seen)}, sys.argv[1])
"""


def torchrun(*arguments: str, processes: int = 2) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return subprocess.run([*command, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=600)


def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    script = tmp_path / "one_step.py"
    script.write_text(ONE_STEP)
    weights = []
    for processes in (1, 2):
        file = tmp_path / f"{processes}.pt"
        done = torchrun(str(script), str(file), processes=processes)  # shares of 7, or of 4 and 3 images
        assert done.returncode == 0, done.stderr
        weights.append(torch.load(file, weights_only=True))
    alone, together = weights
    assert alone["seen"] == together["seen"] == 7
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-4, atol=1e-6)


def test_torchrun_trains_both_phases_with_a_teacher_and_publishes_once(models: Path, tmp_path: Path) -> None:
    recipe = (
        "resnet18 weights=none image_size=32 trainable=layer4,fc epochs=1 finetune_epochs=1 batch_size=64 int8=false"
    )
    fields = f"{recipe} validation_images=100 teacher=resnet/1 teacher_weight=0.5".split()
    where = ["--run", str(tmp_path / "run"), "--models", str(models), "--data", "synthetic:4"]
    done = torchrun("-m", "--", "training", "train", *fields, *where)  # torchrun takes --run itself without the --
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("published resnet18/1") == 1
    run = Run(tmp_path / "run")
    assert [epoch["epoch"] for epoch in run.epochs()] == [1, 2]
    assert run.teacher_file.exists()
    assert LocalStore(models).versions("resnet18") == [1]
    again = torchrun("-m", "--", "training", "train", *fields, *where, "--resume")
    assert again.returncode == 0, again.stderr
    assert "the run is finished and published as resnet18/1" in again.stdout


@pytest.mark.parametrize(("processes", "kept"), [(1, 385), (2, 385), (3, 380)])
def test_a_rest_of_fewer_than_two_images_per_process_is_left_out(processes: int, kept: int, dataset: Dataset) -> None:
    held_out = len(dataset.train) - 385
    recipe = make_recipe("resnet", {"batch_size": 76, "validation_images": held_out})
    train, _, _ = make_splits(recipe, dataset, processes)  # five batches and a rest of 5 images
    assert len(train) == kept


def test_a_batch_that_is_too_small_for_the_group_is_refused(dataset: Dataset) -> None:
    with pytest.raises(RecipeError, match="batch_size=4 is too small for 3 processes; give at least 6"):
        make_splits(make_recipe("resnet", {"batch_size": 4, "validation_images": 0}), dataset, processes=3)
