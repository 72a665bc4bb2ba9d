"""Test the training loop with real runs: it learns, survives a kill, and resumes with identical results."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from training import loop
from training.dataset import Dataset, load_dataset
from training.loop import Epoch, TrainingError, make_splits, train
from training.networks import build
from training.optimizers import make_optimizer
from training.recipes import Recipe, make_recipe
from training.run import Run, RunError
from training.schedule import learning_rate

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

# Augmentation, momentum and dropout all have state that a resumed run must continue.
INTERRUPTED = {
    "validation_images": 0,
    "width": 8,
    "epochs": 4,
    "batch_size": 32,
    "learning_rate": 0.05,
    "dropout": 0.25,
    "mixup": 0.2,
}


@pytest.fixture(scope="module")
def tiny() -> Dataset:
    return load_dataset("synthetic:1")


@pytest.fixture(scope="module")
def small() -> Dataset:
    return load_dataset("synthetic:2")


def started(path: Path, chosen: Recipe) -> Run:
    run = Run(path)
    run.create(chosen)
    return run


def finish(run: Run, dataset: Dataset) -> list[Epoch]:
    return [event for event in train(run.recipe(), dataset, run, CPU) if isinstance(event, Epoch)]


def assert_identical(one: Any, other: Any) -> None:
    """Assert that two checkpoints are bitwise equal, through all nested dicts and lists."""
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_identical(one[key], other[key])
    elif isinstance(one, list):
        for mine, theirs in zip(one, other, strict=True):
            assert_identical(mine, theirs)
    else:
        assert one == other


def test_remaining_time_is_above_zero_until_the_run_is_exported(tiny: Dataset, tmp_path: Path) -> None:
    run = started(tmp_path, make_recipe("resnet", INTERRUPTED | {"epochs": 2}))
    remaining = [event.remaining_s for event in train(run.recipe(), tiny, run, CPU) if event.phase == "training"]
    assert len(remaining) == 4  # a tick at the end of each epoch, and the epoch
    assert all(seconds is not None and seconds > 0 for seconds in remaining)


def measures(run: Run) -> list[tuple[float, ...]]:
    """Return number, training loss, loss and top-1 accuracy of each epoch of a run, without times."""
    return [(epoch["epoch"], epoch["train_loss"], epoch["loss"], epoch["top1"]) for epoch in run.epochs()]


def test_a_small_network_learns_the_synthetic_classes_within_four_epochs(tmp_path: Path) -> None:
    """The measured accuracy is 46.6 % (20 s on half a busy core); chance is 1 %."""
    overrides = {"width": 8, "epochs": 4, "batch_size": 32, "optimizer": "adam", "learning_rate": 0.005}
    plain = {"validation_images": 0, "flip": False, "crop_padding": 0, "label_smoothing": 0, "weight_decay": 0}
    run = started(tmp_path / "run", make_recipe("resnet", overrides | plain))
    epochs = finish(run, load_dataset("synthetic:20"))
    assert epochs[-1].top1 > 0.15
    assert epochs[-1].top5 > 0.4
    assert epochs[-1].train_loss < epochs[0].train_loss - 1
    assert epochs[-1].split == "test"


def command(run: Path, *options: str) -> list[str]:
    fields = [f"{field}={value}" for field, value in INTERRUPTED.items()]
    train = [sys.executable, "-m", "training", "train", "resnet", *fields]
    return [*train, "--data", "synthetic:2", "--run", str(run), "--no-publish", *options]


@pytest.fixture
def second_epoch(tmp_path: Path) -> Iterator[tuple[Run, "subprocess.Popen[str]"]]:
    """A run in a separate process that has finished the first of four epochs, and the process."""
    run = Run(tmp_path / "run")
    # Background jobs of a shell ignore SIGINT, and child processes inherit this. They do not inherit a Python handler.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        command(run.path),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    signal.signal(signal.SIGINT, handler)
    deadline = time.monotonic() + 120
    while not (run.checkpoint_file.exists() and run.epochs()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield run, process
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def uninterrupted(small: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = started(tmp_path_factory.mktemp("uninterrupted"), make_recipe("resnet", INTERRUPTED))
    finish(run, small)
    return run


def test_a_killed_run_is_resumed_bit_for_bit(
    second_epoch: tuple[Run, "subprocess.Popen[str]"], uninterrupted: Run
) -> None:
    run, process = second_epoch
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert run.load()["epoch"] < 4
    subprocess.run(command(run.path, "--resume"), cwd=ROOT, env=ENVIRONMENT, check=True, timeout=120)
    assert_identical(run.load(), uninterrupted.load())
    assert measures(run) == measures(uninterrupted)


def test_an_interrupted_run_exits_with_130_and_can_be_resumed(
    second_epoch: tuple[Run, "subprocess.Popen[str]"], uninterrupted: Run, small: Dataset
) -> None:
    run, process = second_epoch
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in output
    assert "--resume" in output
    finish(run, small)
    assert_identical(run.load(), uninterrupted.load())
    assert measures(run) == measures(uninterrupted)


class Crash(BaseException):
    pass


class CrashingBeforeSave(Run):
    def save(self, state: dict[str, Any]) -> None:  # noqa: ARG002
        raise Crash


class CrashingBeforeRecord(Run):
    def record(self, metrics: dict[str, Any]) -> None:
        if metrics["event"] == "epoch":
            raise Crash
        super().record(metrics)


@pytest.mark.parametrize(
    "crashing",
    [CrashingBeforeSave, CrashingBeforeRecord],
)
def test_the_metrics_of_a_resumed_run_have_every_epoch_once_wherever_it_crashed(
    crashing: type[Run], tiny: Dataset, tmp_path: Path
) -> None:
    run = started(tmp_path, make_recipe("resnet", {"width": 8, "epochs": 2, "validation_images": 0}))
    with pytest.raises(Crash):
        finish(crashing(tmp_path), tiny)
    finish(run, tiny)
    assert [epoch["epoch"] for epoch in run.epochs()] == [1, 2]
    assert [(line["event"], line["epoch"]) for line in run.metrics() if line["phase"] == "training"] == [
        ("tick", 1), ("epoch", 1), ("tick", 2), ("epoch", 2)
    ]  # fmt: skip


def test_a_run_can_be_resumed_where_another_precision_is_faster(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(tmp_path, make_recipe("resnet", {"width": 8, "epochs": 2, "validation_images": 0}))
    stopped = train(run.recipe(), tiny, run, CPU)
    assert next(event for event in stopped if isinstance(event, Epoch)).epoch == 1
    stopped.close()
    assert run.load()["scaler"] == {}
    monkeypatch.setattr(loop, "choose_dtype", lambda *_: torch.float16)
    finish(run, tiny)
    assert run.load()["epoch"] == 2
    assert run.load()["scaler"]["scale"] > 0


def test_a_line_of_metrics_that_was_cut_off_is_ignored_and_dropped(tmp_path: Path) -> None:
    run = started(tmp_path, make_recipe("resnet"))
    run.record({"event": "epoch", "epoch": 1})
    with run.metrics_file.open("a") as file:
        file.write('{"event": "epo')
    assert run.epochs() == [{"event": "epoch", "epoch": 1}]
    run.drop_metrics_after(1)
    run.record({"event": "epoch", "epoch": 2})
    assert [json.loads(line)["epoch"] for line in run.metrics_file.read_text().splitlines()] == [1, 2]


def test_a_run_of_constant_learning_rate_extended_by_an_epoch_equals_a_longer_run(
    tiny: Dataset, tmp_path: Path
) -> None:
    chosen = make_recipe("resnet-seed", {"schedule": "constant", "width": 8, "epochs": 1})
    extended = started(tmp_path / "extended", chosen)
    finish(extended, tiny)
    extended.extend(2)
    finish(extended, tiny)
    whole = started(tmp_path / "whole", chosen.model_copy(update={"epochs": 2}))
    finish(whole, tiny)
    assert_identical(extended.load(), whole.load())
    assert measures(extended) == measures(whole)


def test_a_run_does_not_go_on_with_other_data(tiny: Dataset, small: Dataset, tmp_path: Path) -> None:
    run = started(tmp_path, make_recipe("resnet-seed", {"width": 8, "epochs": 1}))
    finish(run, tiny)
    run.extend(2)
    with pytest.raises(RunError, match="trained on other data"):
        finish(run, small)
    assert run.load()["epoch"] == 1


def test_a_run_of_a_step_schedule_can_be_extended(tmp_path: Path) -> None:
    run = started(tmp_path, make_recipe("resnet-seed", {"schedule": "step", "epochs": 1}))
    assert run.extend(2).epochs == 2


def test_a_run_whose_schedule_depends_on_its_length_cannot_be_extended(tmp_path: Path) -> None:
    run = started(tmp_path, make_recipe("resnet", {"epochs": 2}))
    with pytest.raises(RunError, match="schedule one-cycle depends on epochs=2"):
        run.extend(3)
    assert run.recipe().epochs == 2


def test_a_run_cannot_be_shortened(tmp_path: Path) -> None:
    run = started(tmp_path, make_recipe("resnet-seed", {"epochs": 4}))
    with pytest.raises(RunError, match="started for 4 epochs and cannot be shortened to 3"):
        run.extend(3)


def test_a_loss_that_is_no_longer_finite_ends_the_run_and_keeps_the_last_good_checkpoint(
    tiny: Dataset, tmp_path: Path
) -> None:
    run = started(
        tmp_path, make_recipe("resnet", {"width": 8, "epochs": 1, "schedule": "constant", "validation_images": 0})
    )
    finish(run, tiny)
    good = run.load()
    # Each step multiplies the weights by 1 - 100 * 0.9, so they diverge.
    diverging = run.recipe().model_copy(
        update={"epochs": 2, "learning_rate": 100.0, "weight_decay": 0.9, "batch_size": 2, "momentum": 0.0}
    )
    with pytest.raises(TrainingError, match=r"no longer finite \(epoch 2, .*the checkpoint of epoch 1 is kept.*lower"):
        list(train(diverging, tiny, run, CPU))
    assert good["epoch"] == 1
    assert_identical(run.load(), good)
    assert all(value.isfinite().all() for value in good["classifier"].values())
    assert [epoch["epoch"] for epoch in run.epochs()] == [1]


def rates(chosen: Recipe, *progress: float) -> list[float]:
    return [learning_rate(chosen, each) for each in progress]


def test_a_constant_schedule_is_constant() -> None:
    assert rates(make_recipe("resnet-seed", {"schedule": "constant", "epochs": 8}), 0, 3.3, 7.99) == [1e-3] * 3


def test_a_step_schedule_divides_the_rate_after_10_15_and_25_epochs() -> None:
    chosen = make_recipe("resnet-seed", {"schedule": "step", "epochs": 30})
    expected = [1e-3, 1e-3, 1e-4, 1e-4, 5e-5, 5e-5, 2e-5, 2e-5]
    assert rates(chosen, 0, 9.99, 10, 14.99, 15, 24.99, 25, 29.99) == pytest.approx(expected)


def test_a_cosine_schedule_falls_from_the_peak_through_its_half_to_zero() -> None:
    chosen = make_recipe("resnet", {"schedule": "cosine", "epochs": 8, "learning_rate": 0.4})
    expected = [0.4, 0.2 * (1 + math.sqrt(0.5)), 0.2, 0.2 * (1 - math.sqrt(0.5)), 0.0]
    assert rates(chosen, 0, 2, 4, 6, 8 - 1e-9) == pytest.approx(expected, abs=1e-9)


def test_a_one_cycle_schedule_rises_for_a_quarter_and_falls_for_the_rest() -> None:
    chosen = make_recipe("resnet", {"epochs": 8, "learning_rate": 0.4})
    assert rates(chosen, 0, 1, 2, 5, 8 - 1e-9) == pytest.approx([0, 0.2, 0.4, 0.2, 0], abs=1e-9)


def test_the_finetune_stage_runs_through_the_schedule_anew_with_its_own_peak() -> None:
    chosen = make_recipe("resnet18", {"epochs": 8, "finetune_epochs": 4, "finetune_learning_rate": 1e-4})
    assert rates(chosen, 2, 8, 9, 10.5, 12 - 1e-9) == pytest.approx([1e-3, 0, 1e-4, 5e-5, 0], abs=1e-9)


def test_the_loop_follows_the_schedule(uninterrupted: Run) -> None:
    steps = 7  # 200 images in batches of 32
    expected = [learning_rate(uninterrupted.recipe(), epoch - 0.5 / steps) for epoch in (1, 2, 3, 4)]
    assert [epoch["learning_rate"] for epoch in uninterrupted.epochs()] == pytest.approx(expected)
    assert uninterrupted.load()["optimizer"]["param_groups"][0]["lr"] == pytest.approx(expected[-1])


@pytest.fixture(scope="module")
def transfer(tiny: Dataset, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Copies of a resnet18 run folder: before the first epoch and after each of 1 + 2 epochs."""
    fields = {"weights": "none", "image_size": 32, "epochs": 1, "finetune_epochs": 2, "finetune_learning_rate": 0.01}
    fields |= {"validation_images": 0, "finetune_crop_padding": 0}
    chosen = make_recipe("resnet18", fields | {"optimizer": "sgd", "momentum": 0, "schedule": "constant"})
    root = tmp_path_factory.mktemp("transfer")
    run = started(root / "run", chosen)
    folders = [shutil.copytree(run.path, root / "0")]
    finished = (event for event in train(chosen, tiny, run, CPU) if isinstance(event, Epoch))
    folders += [shutil.copytree(run.path, root / str(event.epoch)) for event in finished]
    return folders


def stage_of(name: str) -> str:
    layer = name.removeprefix("network.backbone.").split(".")[0]
    return "stem" if layer in {"conv1", "bn1"} else layer


def changed_stages(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {stage_of(name) for name, value in before.items() if not torch.equal(value, after[name])}


def test_the_first_stage_of_resnet18_trains_two_stages_and_the_second_all(transfer: list[Path]) -> None:
    chosen = Run(transfer[0]).recipe()
    torch.manual_seed(chosen.seed)
    states = [build(chosen).state_dict(), *(Run(folder).load()["classifier"] for folder in transfer[1:])]
    changed = [changed_stages(before, after) for before, after in itertools.pairwise(states)]
    everything = {"stem", "layer1", "layer2", "layer3", "layer4", "fc"}
    assert changed == [{"layer4", "fc"}, everything, everything]


def test_a_run_resumed_within_the_finetune_stage_goes_on_as_if_uninterrupted(
    transfer: list[Path], tiny: Dataset, tmp_path: Path
) -> None:
    resumed = Run(shutil.copytree(transfer[2], tmp_path / "run"))
    recipe = resumed.recipe_file.read_text()
    resumed.recipe_file.write_text(recipe.replace('"weights": "none"', '"weights": "/gone/resnet18.pth"'))
    finish(resumed, tiny)
    assert_identical(resumed.load()["classifier"], Run(transfer[3]).load()["classifier"])


def test_frozen_weights_get_no_weight_decay_either(tiny: Dataset, tmp_path: Path) -> None:
    fields = {"weights": "none", "image_size": 32, "trainable": "fc", "optimizer": "sgd", "weight_decay": 0.1}
    chosen = make_recipe("resnet18", fields)
    classifier = build(chosen)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    optimizer = make_optimizer(chosen, classifier)
    classifier.train()
    classifier(torch.from_numpy(tiny.train.images[:4]).permute(0, 3, 1, 2)).square().mean().backward()
    optimizer.step()
    assert changed_stages(before, classifier.state_dict()) == {"fc"}


@pytest.fixture(scope="module")
def switched(tiny: Dataset, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Copies of a run folder after each of two epochs. The second epoch trains in evaluation mode."""
    root = tmp_path_factory.mktemp("switched")
    run = started(root / "run", make_recipe("resnet-seed", {"width": 8, "epochs": 2, "eval_mode_after": 1}))
    finished = (event for event in train(run.recipe(), tiny, run, CPU) if isinstance(event, Epoch))
    return [shutil.copytree(run.path, root / str(event.epoch)) for event in finished]


def test_in_evaluation_mode_weights_train_and_running_statistics_stay(switched: list[Path]) -> None:
    before, after = (Run(folder).load()["classifier"] for folder in switched)
    unchanged = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert unchanged == set(dict(build(Run(switched[0]).recipe()).named_buffers())) | {
        "network.blocks.0.shortcut_init.weight",  # no unit applies this layer
        "network.blocks.0.shortcut_init.bias",
    }


def test_in_evaluation_mode_nothing_is_dropped(switched: list[Path], tiny: Dataset, tmp_path: Path) -> None:
    resumed = Run(shutil.copytree(switched[0], tmp_path / "run"))
    resumed.recipe_file.write_text(resumed.recipe().model_copy(update={"dropout": 0.0}).model_dump_json())
    finish(resumed, tiny)
    assert_identical(resumed.load()["classifier"], Run(switched[1]).load()["classifier"])


def test_what_is_evaluated_is_the_held_out_split_where_there_is_one(finished_run: Run) -> None:
    assert [epoch["split"] for epoch in finished_run.epochs()] == ["validation"]


def test_an_image_that_would_be_alone_in_the_last_batch_is_left_out(tiny: Dataset) -> None:
    for batch_size, trained in ((99, 99), (50, 100), (33, 99)):
        split, _, _ = make_splits(make_recipe("resnet", {"validation_images": 0, "batch_size": batch_size}), tiny)
        assert len(split) == trained


def test_runs_of_other_seeds_differ(tiny: Dataset, tmp_path: Path) -> None:
    losses = set()
    for seed in (0, 1):
        run = started(
            tmp_path / str(seed), make_recipe("resnet", {"width": 8, "epochs": 1, "validation_images": 0, "seed": seed})
        )
        losses.add(finish(run, tiny)[0].train_loss)
    assert len(losses) == 2
