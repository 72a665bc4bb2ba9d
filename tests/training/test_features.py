"""Test cached features of the frozen stages: equal training results, one file, and a disk without room for it."""

import fcntl
import resource
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from phase_reports import collect_events
from torch import Tensor

from training import augment
from training.dataset import Dataset, load_dataset
from training.features import Features, prepare
from training.loop import Epoch, to_device, train
from training.networks import Classifier, TransferResNet18, build
from training.phase_report import PhaseReport
from training.recipes import Recipe, make_recipe
from training.run import Run

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SMALL = {"weights": "none", "image_size": 64, "batch_size": 32, "precision": "float32", "validation_images": 0}
SMALL |= {"finetune_epochs": 0}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load_dataset("synthetic:1")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CIFAR100_FEATURES", str(tmp_path / "cache"))
    return tmp_path / "cache"


def chosen(**fields: Any) -> Recipe:
    return make_recipe("resnet18", SMALL | fields)


def built(recipe: Recipe, seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return build(recipe)


def prepared(recipe: Recipe, classifier: Classifier, dataset: Dataset) -> tuple[Features | None, list[PhaseReport]]:
    images, evaluation = to_device(dataset.train, CPU)[0], to_device(dataset.test, CPU)[0]
    return collect_events(prepare(recipe, classifier, images, evaluation, torch.float32))


@pytest.mark.parametrize("flips", [{"flip": True}, {"flip": False}, {"flip_alternates": True}], ids=str)
def test_batches_are_features_of_the_very_images_that_would_be_drawn(flips: dict[str, bool], dataset: Dataset) -> None:
    recipe = chosen(**flips, trainable="layer3,layer4,fc")
    classifier = built(recipe)
    features, _ = prepared(recipe, classifier, dataset)
    assert features is not None

    def made_of(images: Tensor) -> Tensor:
        assert isinstance(classifier.network, TransferResNet18)
        with torch.inference_mode():
            return classifier.network.forward_features(classifier.preprocess(images))

    images, _ = to_device(dataset.train, CPU)
    pairs = zip(
        features.batches(recipe, torch.Generator().manual_seed(3), epoch=2),
        augment.batches(images, recipe, torch.Generator().manual_seed(3), epoch=2),
        strict=True,
    )
    for (batch, rows), (pixels, expected_rows) in pairs:
        assert torch.equal(rows, expected_rows)
        torch.testing.assert_close(batch.float(), made_of(pixels), rtol=1e-3, atol=1e-3)
    evaluated = made_of(torch.from_numpy(dataset.test.images).permute(0, 3, 1, 2))
    torch.testing.assert_close(features.evaluation.permute(0, 3, 1, 2).float(), evaluated, rtol=1e-3, atol=1e-3)


def finished(path: Path, recipe: Recipe, dataset: Dataset) -> tuple[list[Epoch], dict[str, Tensor]]:
    run = Run(path)
    run.create(recipe)
    epochs = [event for event in train(recipe, dataset, run, CPU) if isinstance(event, Epoch)]
    return epochs, run.load()["classifier"]


@pytest.mark.parametrize("combination", [{}, {"mixup": 0.5}, {"cutmix": 0.5}], ids=str)
def test_training_on_features_gives_what_training_on_images_gives(
    dataset: Dataset, tmp_path: Path, folder: Path, combination: dict[str, float]
) -> None:
    """The results differ only by rounding to float16: final weights differ by less than 1 % of their total change."""
    fields = {"epochs": 3, "batch_size": 50, "optimizer": "sgd", "learning_rate": 0.01, **combination}
    images = finished(tmp_path / "images", chosen(**fields, cache_features=False), dataset)
    assert not folder.exists()
    features = finished(tmp_path / "features", chosen(**fields), dataset)
    assert folder.exists()
    for one, other in zip(images[0], features[0], strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-3)
        assert one.loss == pytest.approx(other.loss, rel=1e-3)

    def flat(state: dict[str, Tensor]) -> Tensor:
        return torch.cat([value.flatten() for name, value in state.items() if ".layer4." in name or ".fc." in name])

    start = flat(built(chosen(**fields)).state_dict())
    travelled = (flat(images[1]) - start).norm()
    assert (flat(features[1]) - flat(images[1])).norm() < 0.01 * travelled


def test_the_file_is_announced_used_again_and_replaced_by_that_of_other_weights(dataset: Dataset, folder: Path) -> None:
    recipe = chosen()
    values = 2 * 100 + 100  # both flips of the training images, and the test images
    _, events = prepared(recipe, built(recipe), dataset)
    (file,) = folder.iterdir()
    assert file.stat().st_size == values * 256 * 4 * 4 * 2
    assert events[0].done == 0
    assert str(file) in events[0].message
    assert events[-1].done == events[-1].images == values

    made = file.stat().st_mtime_ns
    _, events = prepared(chosen(learning_rate=0.1, seed=4), built(recipe), dataset)
    assert [event.done for event in events] == [values]
    assert [each.stat().st_mtime_ns for each in folder.iterdir()] == [made]

    for changed, seed in ((recipe, 1), (chosen(trainable="layer3,layer4,fc"), 0), (chosen(image_size=96), 0)):
        prepared(changed, built(changed, seed), dataset)
        (other,) = folder.iterdir()
        assert other != file
        file = other


@pytest.mark.parametrize("fields", [{"cache_features": False}, {"crop_padding": 4}, {"trainable": "stem,fc"}])
def test_nothing_is_computed_beforehand_where_it_would_be_of_no_use(
    fields: dict[str, Any], dataset: Dataset, folder: Path
) -> None:
    assert prepared(chosen(**fields), built(chosen(**fields)), dataset) == (None, [])
    assert not folder.exists()


Usage = namedtuple("Usage", "total used free")


def test_without_room_for_the_file_nothing_is_written(
    dataset: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**12, 10**12, 10**9))
    features, (event,) = prepared(chosen(), built(chosen()), dataset)
    assert features is None
    assert event.message.endswith(
        "has no room for 0.0 GB of features of the frozen stages; computing them in every epoch instead"
    )
    assert list(folder.iterdir()) == []


def test_what_a_killed_run_has_left_makes_room_and_what_is_being_written_stays(dataset: Dataset, folder: Path) -> None:
    folder.mkdir()
    left, growing = folder / "left.1.partial", folder / "growing.2.partial"
    left.touch()
    with growing.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        prepared(chosen(), built(chosen()), dataset)
    assert growing.exists()
    assert not left.exists()


def test_a_file_that_is_not_whole_is_computed_again(dataset: Dataset, folder: Path) -> None:
    recipe = chosen()
    first, _ = prepared(recipe, built(recipe), dataset)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.unlink()  # another run unlinks the file like this
    assert first is not None
    assert first.evaluation.any()
    file.write_bytes(whole[:-2])
    _, events = prepared(recipe, built(recipe), dataset)
    assert events[0].done == 0
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_does_not_end_training(dataset: Dataset, folder: Path) -> None:
    folder.write_text("a file, not a folder")
    features, (event,) = prepared(chosen(), built(chosen()), dataset)
    assert features is None
    assert "computing the features in every epoch instead" in event.message


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_be_written_to_its_end_is_dropped_and_training_goes_on(
    dataset: Dataset, tmp_path: Path, folder: Path
) -> None:
    recipe = chosen()
    with largest_file(100_000):
        features, events = prepared(recipe, built(recipe), dataset)
    assert features is None
    assert "computing the features in every epoch instead" in events[-1].message
    assert list(folder.iterdir()) == []
