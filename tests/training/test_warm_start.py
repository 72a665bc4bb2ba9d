"""Test training from a published version: its weights, held-out images, and versions that do not fit."""

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from training import warm_start
from training.dataset import Dataset
from training.export import publish
from training.loop import Epoch, train
from training.networks import Classifier, build
from training.recipes import RecipeError, make_recipe
from training.run import Run
from training.runtimes import torchscript
from training.runtimes.engine import example_images
from training.store import MODEL, LocalStore, StoreError

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
FIELDS = {"width": 8, "epochs": 2, "validation_images": 100, "weights": "resnet/1", "int8": False}


def warmed(models: Path, dataset: Dataset, **fields: Any) -> Classifier:
    chosen = make_recipe("resnet", FIELDS | fields)
    classifier = build(chosen).eval()
    warm_start.load(classifier, chosen, LocalStore(models), dataset)
    return classifier


def test_the_classifier_computes_what_the_version_computes_before_calibration(models: Path, dataset: Dataset) -> None:
    images = example_images(8)
    version = torchscript.load(models / "resnet" / "1" / MODEL)
    temperature = LocalStore(models).card("resnet", 1).temperature
    assert abs(temperature - 1) > 0.01
    with torch.inference_mode():
        torch.testing.assert_close(warmed(models, dataset)(images) / temperature, version(images))


def test_a_run_starts_there_goes_on_without_the_version_and_its_card_names_it(
    models: Path, dataset: Dataset, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    run.create(make_recipe("resnet", FIELDS))
    cold = Run(tmp_path / "cold")
    cold.create(make_recipe("resnet", FIELDS | {"weights": "none"}))
    losses = []
    for each in (run, cold):
        events = train(each.recipe(), dataset, each, CPU, LocalStore(models))
        losses.append(next(event for event in events if isinstance(event, Epoch)).train_loss)
        events.close()
    assert losses[0] < losses[1]
    list(train(run.recipe(), dataset, run, CPU))
    published = publish(run, dataset, LocalStore(models))
    assert LocalStore(models).card("resnet", published.version).recipe["weights"] == "resnet/1"


def test_a_version_that_saw_other_pixel_values_does_not_fit(models: Path, dataset: Dataset) -> None:
    with pytest.raises(RecipeError, match="resnet/1 has normalization=dataset, which does not fit normalization=half"):
        warmed(models, dataset, normalization="half")


def test_the_card_of_an_earlier_release_lacks_newer_fields(models: Path) -> None:
    known = LocalStore(models).card("resnet", 1).recipe
    del known["normalization"]
    make_recipe("resnet", FIELDS).require_fit(known)


def test_images_that_the_version_was_trained_on_cannot_be_held_out(models: Path, dataset: Dataset) -> None:
    warmed(models, dataset, validation_images=60)
    with pytest.raises(StoreError, match=r"validation_images=101 holds out; give at most 100"):
        warmed(models, dataset, validation_images=101)
    other_data = replace(dataset, fingerprint="0")
    warmed(models, other_data, validation_images=101)


def test_a_version_that_does_not_fit_is_an_error(models: Path, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="resnet/1 has width=8, which does not fit width=16"):
        warmed(models, dataset, width=16)
    with pytest.raises(StoreError, match="there is no version 7 of resnet"):
        warmed(models, dataset, weights="resnet/7")
    run = Run(tmp_path / "run")
    run.create(make_recipe("resnet", FIELDS))
    with pytest.raises(ValueError, match="the recipe needs resnet/1 from a model store"):
        list(train(run.recipe(), dataset, run, CPU))


def test_a_file_that_holds_only_a_graph_cannot_be_trained_on(
    models: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.save(torchscript.load(models / "resnet" / "1" / MODEL), tmp_path / MODEL)
    monkeypatch.setattr(LocalStore, "verify_source", lambda *_: tmp_path / MODEL)
    with pytest.raises(StoreError, match="resnet/1 was exported as a graph without weights"):
        warmed(models, dataset)


@pytest.mark.parametrize("version", ["resnet18", "../resnet/1", "resnet/0", "resnet/x"])
def test_only_a_version_is_a_predecessor(version: str) -> None:
    assert make_recipe("resnet18", {"weights": version}).predecessor is None
    with pytest.raises(RecipeError, match=re.escape(f"weights={version} applies to network=resnet18")):
        make_recipe("resnet", {"weights": version})


def test_a_predecessors_stages_cannot_be_reinitialized() -> None:
    with pytest.raises(RecipeError, match="reinitialize applies to ImageNet weights, not to those of resnet18/2"):
        make_recipe("resnet18", {"weights": "resnet18/2", "reinitialize": "layer4"})
