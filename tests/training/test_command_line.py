"""Test the command line with commands as users type them."""

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cascades import MEMBERS, add_second_member
from server import DATA
from tiny_models import make_store
from typer.testing import CliRunner, Result

from training.__main__ import cli
from training.cascade import publish as publish_cascade
from training.dataset import Dataset
from training.evaluate import evaluate, predict
from training.loop import make_splits
from training.recipes import RECIPES, Recipe, make_recipe
from training.run import Run
from training.runtimes import torchscript
from training.store import LocalStore

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Restore the SIGTERM handler, because `train` replaces the handler of the test process."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def typed(*words: str, columns: int = 80) -> Result:
    return CliRunner().invoke(cli, words, env={"COLUMNS": str(columns)})


def said(result: Result) -> str:
    """Return all output as one line with single spaces."""
    return " ".join(result.output.split())


def test_train_publishes_and_evaluate_measures_the_same(tmp_path: Path) -> None:
    models, run = tmp_path / "models", tmp_path / "run"
    common = ("--data", "synthetic:1", "--models", str(models))
    trained = typed(
        "train", "resnet", "width=8", "epochs=1", "validation_images=0", "--run", str(run), "--notes", "a try", *common
    )
    assert trained.exit_code == 0, trained.output
    card = LocalStore(models).card("resnet", 1)
    assert (card.recipe["width"], card.recipe["epochs"], card.notes) == (8, 1, "a try")
    assert "epoch 1/1" in trained.stderr
    assert trained.stdout.startswith(f"published resnet/1: test top-1 {card.test.top1:.2%}")
    assert trained.stdout.endswith("it is live\n")

    measured = typed("evaluate", "resnet", "--json", *common)
    assert json.loads(measured.stdout)["result"]["top1"] == pytest.approx(card.test.top1)
    for name in ("resnet", "resnet/1"):
        measured = typed("evaluate", name, *common)
        assert measured.exit_code == 0, measured.output
        assert f"resnet/1 on 100 test images: top-1 {card.test.top1:.2%}, top-5 {card.test.top5:.2%}" in said(measured)


def test_the_threshold_of_familiar_images_is_added_to_a_card_that_lacks_it(models: Path) -> None:
    store, words = LocalStore(models), ("familiarity", "resnet", "--data", "synthetic:4", "--models", str(models))
    exported = store.card("resnet", 1)
    assert exported.familiarity
    store.amend(exported.model_copy(update={"familiarity": None}))
    added = typed(*words)
    assert added.exit_code == 0, added.output
    assert "resnet/1: 95.0% of 100 held-out images have a score (energy) of at least" in said(added)
    measured = store.card("resnet", 1).familiarity
    assert measured
    assert measured.threshold == pytest.approx(exported.familiarity.threshold, abs=1e-4)

    recipe = exported.recipe | {"validation_images": 0}
    store.amend(exported.model_copy(update={"recipe": recipe}))
    refused = typed(*words)
    assert refused.exit_code == 1
    assert "has held out none of these images" in said(refused)


def test_a_cascade_gets_a_threshold_for_each_of_its_scores(models: Path, dataset: Dataset) -> None:
    store = LocalStore(models)
    add_second_member(store)
    publish_cascade(store, dataset, MEMBERS)
    fitted = store.card("cascade", 1)
    assert fitted.full_familiarity
    assert fitted.full_familiarity.score == "agreement"
    store.amend(fitted.model_copy(update={"familiarity": None, "full_familiarity": None}))
    added = typed("familiarity", "cascade", "--data", DATA, "--models", str(models))
    assert added.exit_code == 0, added.output
    assert "cascade/1: 95.0% of 100 held-out images have a score (agreement) of at least" in said(added)
    assert store.card("cascade", 1) == fitted


def test_a_run_that_is_finished_and_published_is_not_published_again(tmp_path: Path) -> None:
    models = tmp_path / "models"
    words = ("train", "resnet", "--run", str(tmp_path / "run"), "--data", "synthetic:1", "--models", str(models))
    assert typed(*words, "width=8", "epochs=1", "validation_images=0", "int8=False").exit_code == 0
    resumed = typed(*words, "--resume")
    assert resumed.exit_code == 0
    assert said(resumed) == "the run is finished and published as resnet/1"
    assert LocalStore(models).versions("resnet") == [1]


def test_evaluate_refuses_a_damaged_file(models: Path) -> None:
    with (models / "resnet" / "1" / "model.pt").open("ab") as file:
        file.write(b"\0")
    result = typed("evaluate", "resnet", "--data", "synthetic:1", "--models", str(models))
    assert result.exit_code == 1
    assert "model.pt is damaged" in said(result)


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("resnet", "epoch=3"), "did you mean epochs?"),
        (("resnet", "epochs=0"), "epochs: Input should be greater than or equal to 1"),
        (("resnet", "epochs"), "'epochs' is not of the form FIELD=VALUE"),
        (("resnet50",), "there is no recipe 'resnet50'"),
        (("resnet", "validation_images=100"), "validation_images=100 leaves none of 100 images for training"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_before_anything_is_created(
    words: tuple[str, ...], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = typed("train", *words, "--data", "synthetic:1")
    assert result.exit_code == 2
    assert fault in said(result)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "fault", "exit_code"),
    [
        (("resnet-seed",), "contains a run of resnet, not of resnet-seed", 2),
        (("resnet", "width=16"), "was started with width=8; a resumed run cannot change it to 16", 2),
        (("resnet", "epochs=5"), "the schedule one-cycle depends on epochs=1; start a new run instead", 1),
    ],
)
def test_a_run_is_not_resumed_as_another(words: tuple[str, ...], fault: str, exit_code: int, finished_run: Run) -> None:
    before = finished_run.recipe_file.read_bytes(), finished_run.checkpoint_file.read_bytes()
    result = typed("train", *words, "--resume", "--run", str(finished_run.path), "--data", "synthetic:4")
    assert result.exit_code == exit_code
    assert fault in said(result)
    assert (finished_run.recipe_file.read_bytes(), finished_run.checkpoint_file.read_bytes()) == before


def test_a_new_run_does_not_overwrite_an_old_one(finished_run: Run) -> None:
    result = typed("train", "resnet", "validation_images=0", "--run", str(finished_run.path), "--data", "synthetic:4")
    assert result.exit_code == 1
    assert "contains a run already; give --resume" in said(result)


def test_a_field_under_its_former_name_is_compared_with_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.create(make_recipe("resnet18", {"reinitialize": "layer4"}))
    words = ("train", "resnet18", "reinitialise=layer3", "--resume", "--run", str(run.path), "--data", "synthetic:20")
    result = typed(*words)
    assert result.exit_code == 2
    assert "was started with reinitialize=('layer4',)" in said(result)


def test_there_must_be_a_run_to_resume(tmp_path: Path) -> None:
    result = typed("train", "resnet", "--resume", "--run", str(tmp_path / "none"), "--data", "synthetic:1")
    assert result.exit_code == 1
    assert "there is no run in" in said(result)


def test_a_constant_run_is_extended_by_asking_for_more_epochs(tmp_path: Path) -> None:
    words = ("train", "resnet-seed", "width=8", "--run", str(tmp_path), "--data", "synthetic:1", "--no-publish")
    assert typed(*words, "epochs=1").exit_code == 0
    resumed = typed(*words, "epochs=2", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "epoch 2/2" in resumed.output
    assert "epoch 1/2" not in resumed.output
    assert Run(tmp_path).load()["epoch"] == Run(tmp_path).recipe().epochs == 2


def test_a_run_that_went_on_after_it_was_published_is_published_again(tmp_path: Path) -> None:
    words = ["train", "resnet-seed", "width=8", "int8=False", "--run", str(tmp_path / "run"), "--data", "synthetic:1"]
    words += ["--models", str(tmp_path / "models")]
    assert typed(*words, "epochs=1").exit_code == 0
    assert typed(*words, "epochs=2", "--resume", "--no-publish").exit_code == 0
    assert "published resnet-seed/2" in said(typed(*words, "--resume"))
    assert len(LocalStore(tmp_path / "models").card("resnet-seed", 2).curve) == 2


def test_a_folder_in_which_nothing_could_be_trained_is_free_for_another_run(tmp_path: Path) -> None:
    words = ["train", "resnet18", "image_size=32", "epochs=1", "finetune_epochs=0", "validation_images=0"]
    words += ["--run", str(tmp_path), "--data", "synthetic:1", "--no-publish"]
    failed = typed(*words, f"weights={tmp_path / 'typo.pth'}")
    assert failed.exit_code == 1
    assert "typo.pth" in said(failed)
    assert typed(*words, "weights=none", "cache_features=false").exit_code == 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes."
        ),
    ],
)
def test_too_little_memory_is_an_error_of_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("training.loop.train", fail)
    result = typed("train", "resnet", "validation_images=0", "--run", str(tmp_path), "--data", "synthetic:1")
    assert result.exit_code == 1
    last = result.output.strip().splitlines()[-1]
    assert last.startswith("error: out of memory: ")
    assert last.endswith("; lower batch_size or image_size")


def test_evaluate_measures_on_the_images_held_out_if_there_are_any(
    models: Path, finished_run: Run, dataset: Dataset
) -> None:
    words = ("evaluate", "resnet", "--split", "validation", "--models", str(models))
    _, _, held_out = make_splits(finished_run.recipe(), dataset)
    logits = predict(torchscript.load(models / "resnet" / "1" / "model.pt"), torch.from_numpy(held_out.images))
    expected = evaluate(logits, torch.from_numpy(held_out.labels))
    measured = typed(*words, "--data", "synthetic:4")
    assert f"resnet/1 on 100 validation images: top-1 {expected.top1:.2%}" in said(measured)
    assert f"loss {expected.loss:.4f}" in said(measured)
    refused = typed(*words, "--data", "synthetic:1")
    assert refused.exit_code == 1
    assert "resnet/1 has held out none of these images" in said(refused)


def test_evaluate_may_average_mirror_images_and_refuses_other_classes(models: Path, tmp_path: Path) -> None:
    words = ("evaluate", "resnet", "--models", str(models), "--data", "synthetic:1")
    assert "on 100 test images and their mirror images: top-1" in said(typed(*words, "--flip"))
    card = models / "resnet" / "1" / "card.json"
    card.write_text(card.read_text().replace('"red_disc"', '"tomato"'))
    refused = typed(*words)
    assert refused.exit_code == 1
    assert "resnet/1 was trained on other classes" in said(refused)


def test_a_run_that_cannot_be_resumed_now_can_be_later(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.create(make_recipe("resnet18", {"weights": str(tmp_path / "not yet.pth")}))
    result = typed("train", "resnet18", "--run", str(run.path), "--data", "synthetic:20", "--resume")
    assert (result.exit_code, "does not exist" in said(result)) == (1, True)
    assert run.recipe_file.exists()


def test_a_run_that_is_trained_just_now_is_not_exported(finished_run: Run, tmp_path: Path) -> None:
    with finished_run.lock():
        result = typed("export", str(finished_run.path), "--data", "synthetic:1", "--models", str(tmp_path))
    assert (result.exit_code, "is working in" in said(result)) == (75, True)


def test_export_publishes_a_run_again_and_the_live_version_stays_if_told_to(finished_run: Run, models: Path) -> None:
    words = ("export", str(finished_run.path), "--data", "synthetic:4", "--models", str(models))
    publication = finished_run.publication_file.read_bytes()
    result = typed(*words, "--promote", "never")
    finished_run.publication_file.write_bytes(publication)
    assert result.exit_code == 0, result.output
    assert "published resnet/2" in said(result)
    assert "the live version did not change" in said(result)
    assert (LocalStore(models).versions("resnet"), LocalStore(models).live("resnet")) == ([1, 2], 1)


@pytest.mark.parametrize("columns", [200, 80])
def test_recipes_lists_all_recipes_and_all_fields(columns: int) -> None:
    result = typed("recipes", columns=columns)
    assert result.exit_code == 0
    words = set(re.findall(r"[\w-]+", result.output))
    assert set(RECIPES) <= words
    assert set(Recipe.model_fields) - {"name"} <= words
    assert [each["name"] for each in json.loads(typed("recipes", "--json").stdout)] == list(RECIPES)


def test_a_model_without_a_live_version_is_an_error(tmp_path: Path) -> None:
    result = typed("evaluate", "resnet", "--data", "synthetic:1", "--models", str(tmp_path))
    assert result.exit_code == 1
    assert f"there is no model resnet in {tmp_path}; there are: none" in said(result)


def test_a_version_that_is_no_number_is_an_error(models: Path) -> None:
    result = typed("evaluate", "resnet/newest", "--data", "synthetic:1", "--models", str(models))
    assert result.exit_code == 1


def test_an_error_names_a_path_with_brackets_in_full(tmp_path: Path) -> None:
    result = typed("evaluate", "resnet", "--data", "synthetic:1", "--models", str(tmp_path / "[old]"))
    assert "[old]" in result.output


def test_cascade_is_fitted_evaluated_and_fitted_again_after_a_member_is_promoted(models: Path, tmp_path: Path) -> None:
    store, common = LocalStore(models), ("--data", "synthetic:4", "--models", str(models))
    add_second_member(store)
    fitted = typed("cascade", *common)
    assert fitted.exit_code == 0, fitted.output
    card = store.card("cascade", 1)
    assert "resnet/1 and resnet18/1: weights" in said(fitted)
    assert f"published cascade/1: test top-1 {card.test.top1:.2%}" in said(fitted)
    measured = typed("evaluate", "cascade", *common)
    assert f"cascade/1 on 100 test images: top-1 {card.test.top1:.2%}" in said(measured)
    held_out = typed("evaluate", "cascade", "--split", "validation", *common)
    assert "cascade/1 on 100 validation images" in said(held_out)
    assert "cascade/1 has no int8 form" in said(typed("evaluate", "cascade", "--int8", *common))

    words = ("train", "resnet", "width=8", "epochs=1", "int8=False", "--promote", "always", *common)
    trained = typed(*words, "validation_images=100", "--run", str(tmp_path / "run"))
    assert trained.exit_code == 0, trained.output
    assert "resnet/2 and resnet18/1: weights" in said(trained)
    assert (store.live("resnet"), store.live("cascade")) == (2, 2)

    trained = typed(*words, "validation_images=0", "--run", str(tmp_path / "other"))
    assert trained.exit_code == 0, trained.output
    assert "the live one keeps its members: resnet/3 has held out 0 images" in said(trained)
    assert (store.live("resnet"), store.live("cascade")) == (3, 2)


def test_cascade_refuses_members_without_common_held_out_images(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    add_second_member(store)
    refused = typed("cascade", "--data", DATA, "--models", str(store.root))
    assert refused.exit_code == 1
    assert "has held out 0 images" in said(refused)
    assert "cascade" not in store.names()
