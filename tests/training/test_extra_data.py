"""Test that a run trains on extra images, and that they never change its validation and test images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from training import extra_data
from training.__main__ import cli
from training.dataset import DataError, Dataset, hold_out
from training.files import sha256
from training.loop import make_splits
from training.recipes import make_recipe
from training.store import LocalStore

RECIPE = make_recipe("resnet", {"validation_images": 100})
ARRAYS: dict[str, NDArray[Any]] = {
    "images": np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8),
    "labels": np.array(["red_disc", "blue_ring", "red_disc"]),
}


def save(folder: Path, **arrays: Any) -> Path:
    content: dict[str, Any] = ARRAYS | arrays
    np.savez(folder / "extra.npz", **content)
    return folder / "extra.npz"


def test_extra_images_are_trained_on_and_the_held_out_images_stay(dataset: Dataset, tmp_path: Path) -> None:
    file = save(tmp_path)
    with_extra = extra_data.add(dataset, file, RECIPE.validation_images)
    train, name, held_out = make_splits(RECIPE, with_extra)
    before, _, held_out_before = make_splits(RECIPE, dataset)
    assert (len(train), name) == (len(before) + 3, "validation")
    assert (train.images[-3:] == ARRAYS["images"]).all()
    assert [dataset.classes[label] for label in train.labels[-3:]] == ["red_disc", "blue_ring", "red_disc"]
    assert (held_out.images == held_out_before.images).all()
    assert with_extra.fingerprint == dataset.fingerprint
    assert with_extra.extra
    assert with_extra.extra.sha256 == sha256(file)


def test_test_images_and_held_out_images_are_left_out(dataset: Dataset, tmp_path: Path) -> None:
    train, held_out = hold_out(dataset.train, RECIPE.validation_images)
    images = np.stack([dataset.test.images[7], held_out.images[3], train.images[5]])
    extra = extra_data.add(dataset, save(tmp_path, images=images), RECIPE.validation_images).extra
    assert extra
    assert (extra.left_out, len(extra.split)) == (2, 1)
    assert (extra.split.images[0] == train.images[5]).all()
    with pytest.raises(DataError, match="no image that is neither in the test set nor held out"):
        extra_data.add(dataset, save(tmp_path, images=images[:2], labels=ARRAYS["labels"][:2]), 100)


@pytest.mark.parametrize(
    ("arrays", "fault"),
    [
        ({"labels": np.array(["red_disc", "vase", "red_disc"])}, "'vase' is not a class of the data set"),
        ({"labels": np.array(["red_disc"])}, r"and 'labels' \[1\], expected"),
        ({"images": ARRAYS["images"].astype(np.float32)}, "'images' is float32"),
        ({"labels": np.array([{"a": 1}] * 3, object)}, "is not an npz file with the arrays"),
    ],
)
def test_files_of_another_form_are_refused(
    arrays: dict[str, NDArray[Any]], fault: str, dataset: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=fault):
        extra_data.add(dataset, save(tmp_path, **arrays), 0)


@pytest.mark.slow
def test_a_run_keeps_its_extra_images_and_its_card_names_them(tmp_path: Path) -> None:
    file, run, models = save(tmp_path), str(tmp_path / "run"), str(tmp_path / "models")
    words = [
        "train",
        "resnet",
        "width=8",
        "epochs=1",
        "validation_images=0",
        "int8=false",
        "--run",
        run,
        "--no-publish",
    ]
    data = ["--data", "synthetic:1"]
    wrong = save(tmp_path, labels=np.array(["vase"] * 3))
    refused = CliRunner().invoke(cli, [*words, *data, "--extra-data", str(wrong)])
    assert (refused.exit_code, "'vase' is not a class" in refused.output) == (1, True)
    trained = CliRunner().invoke(cli, [*words, *data, "--extra-data", str(save(tmp_path))])
    assert "3 extra training images; 0 are left out" in trained.output, trained.output
    checksum = sha256(file)
    file.unlink()
    exported = CliRunner().invoke(cli, ["export", run, "--models", models, *data])
    assert exported.exit_code == 0, exported.output
    card = LocalStore(Path(models)).card("resnet", 1)
    assert card.extra_data
    assert (card.extra_data.images, card.extra_data.sha256) == (3, checksum)
    resumed = CliRunner().invoke(cli, [*words, *data, "--resume", "--extra-data", str(save(tmp_path))])
    assert (resumed.exit_code, "a resumed run keeps its extra data" in resumed.output) == (2, True)
