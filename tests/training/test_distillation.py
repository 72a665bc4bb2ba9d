"""Test distillation: the loss, the images that the teacher gets, and the runs that learn from its logits."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from phase_reports import collect_events
from torch import Tensor

from training import distillation
from training.dataset import Dataset
from training.evaluate import predict
from training.export import restore
from training.loop import Epoch, train
from training.networks import Classifier
from training.phase_report import PhaseReport
from training.recipes import RecipeError, make_recipe
from training.run import Run
from training.runtimes import selection
from training.runtimes.openvino import INT8
from training.store import LocalStore, StoreError

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TINY = {"width": 8, "epochs": 2, "batch_size": 64, "validation_images": 100}


def started(path: Path, **fields: Any) -> Run:
    run = Run(path)
    run.create(make_recipe("resnet", TINY | fields))
    return run


def compute_logits(
    run: Run, teacher: distillation.Teacher, images: Tensor, name: str = "resnet/1", data: str = "d"
) -> tuple[Tensor, list[PhaseReport]]:
    return collect_events(distillation.compute_teacher_logits(name, lambda: teacher, images, data, run))


def test_the_gradient_is_the_difference_of_softened_answers_times_the_temperature() -> None:
    """The gradient is equation 2 of Hinton et al. 2015, times T^2, which keeps its scale independent of T."""
    random = torch.Generator().manual_seed(0)
    student = torch.randn(5, 7, generator=random, requires_grad=True)
    teacher = 3 * torch.randn(5, 7, generator=random)
    distillation.compute_loss(student, teacher, 4.0).backward()
    expected = 4.0 * ((student / 4).softmax(1) - (teacher / 4).softmax(1)) / 5
    torch.testing.assert_close(student.grad, expected)


def test_a_teacher_is_asked_once_about_every_image_and_its_mirror_image(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    images = torch.randint(0, 256, (230, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def left_column(pixels: Tensor) -> Tensor:
        return pixels[:, :, :, 0].flatten(1).float()

    logits, events = compute_logits(run, left_column, images)
    both = (images[:, :, 0].float() + images[:, :, -1].float()) / 2
    torch.testing.assert_close(logits, both.permute(0, 2, 1).flatten(1))
    assert (events[0].done, events[-1].done, events[-1].images) == (0, 230, 230)

    def forgetful(_: Tensor) -> Tensor:
        raise AssertionError("asked again")

    again, events = compute_logits(run, forgetful, images)
    assert torch.equal(again, logits)
    assert events == []
    with pytest.raises(AssertionError, match="asked again"):
        compute_logits(run, forgetful, images, name="resnet/2")
    with pytest.raises(AssertionError, match="asked again"):
        compute_logits(run, forgetful, images, data="other images")
    assert len(compute_logits(run, left_column, images[:100])[0]) == 100  # the stored logits belong to other images


class _Confused:
    """A teacher that predicts the class after the true one."""

    def __init__(self, dataset: Dataset):
        images = torch.from_numpy(dataset.train.images).permute(0, 3, 1, 2)
        self._label = {self._key(image): int(label) for image, label in zip(images, dataset.train.labels, strict=True)}

    def __call__(self, pixels: Tensor) -> Tensor:
        labels = torch.tensor([(self._label[self._key(image)] + 1) % 100 for image in pixels])
        return 20 * torch.nn.functional.one_hot(labels, 100).float()

    @staticmethod
    def _key(image: Tensor) -> int:
        """Return a key that is the same for an image and its mirror image."""
        return hash(tuple(sorted((image.numpy().tobytes(), image.flip(2).numpy().tobytes()))))


def test_with_all_the_weight_a_student_learns_its_teachers_answers_instead_of_the_labels(
    dataset: Dataset, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "load_teacher", lambda *_: _Confused(dataset))
    plain = {"flip": False, "crop_padding": 0, "validation_images": 0, "batch_size": 32}
    fields = {"optimizer": "adam", "learning_rate": 0.005, "weight_decay": 0, "epochs": 8, "schedule": "constant"}
    run = started(tmp_path / "run", **plain, **fields, teacher="resnet/1", teacher_weight=1)
    list(train(run.recipe(), dataset, run, CPU, LocalStore(models)))
    student, _ = restore(run, run.recipe(), dataset)
    answers = predict(student, torch.from_numpy(dataset.train.images)).argmax(1)
    labels = torch.from_numpy(dataset.train.labels)
    assert (answers == (labels + 1) % 100).float().mean() > 0.2 > (answers == labels).float().mean()


def test_a_run_with_a_teacher_goes_on_without_asking_it_again(dataset: Dataset, models: Path, tmp_path: Path) -> None:
    run = started(tmp_path / "run", teacher="resnet/1")
    events = train(run.recipe(), dataset, run, CPU, LocalStore(models))
    assert next(event for event in events if isinstance(event, Epoch)).epoch == 1
    events.close()
    resumed = list(train(run.recipe(), dataset, run, CPU, LocalStore(models)))
    assert "features" not in {event.phase for event in resumed}

    whole = started(tmp_path / "whole", teacher="resnet/1")
    assert "features" in {event.phase for event in train(whole.recipe(), dataset, whole, CPU, LocalStore(models))}
    for name, value in whole.load()["classifier"].items():
        assert torch.equal(value, run.load()["classifier"][name]), name


def test_a_teacher_that_cannot_be_used_is_an_error(dataset: Dataset, models: Path, tmp_path: Path) -> None:
    def load(dataset: Dataset, **fields: Any) -> None:
        distillation.load_teacher(make_recipe("resnet", TINY | fields), LocalStore(models), dataset, CPU)

    with pytest.raises(StoreError, match="there is no version 7 of resnet"):
        load(dataset, teacher="resnet/7")
    with pytest.raises(StoreError, match="other classes"):
        load(replace(dataset, classes=tuple(reversed(dataset.classes))), teacher="resnet/1")
    with pytest.raises(StoreError, match="resnet/1 was trained on all but 100 images"):
        load(dataset, teacher="resnet/1", validation_images=101)
    run = started(tmp_path / "run", teacher="resnet/1")
    with pytest.raises(ValueError, match="the recipe needs resnet/1 from a model store"):
        list(train(run.recipe(), dataset, run, CPU))


class _Watchful:
    """A teacher that records the batches it receives."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, pixels: Tensor) -> Tensor:
        self.seen.append(pixels.clone())
        return torch.zeros(len(pixels), 100)


@pytest.mark.parametrize("fields", [{}, {"cutmix": 1.0}, {"mixup": 0.5}], ids=["plain", "cutmix", "mixup"])
def test_a_teacher_of_augmented_views_sees_the_very_batches_that_the_student_is_trained_on(
    fields: dict[str, Any], dataset: Dataset, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, trained_on = _Watchful(), list[Tensor]()
    monkeypatch.setattr(distillation, "load_teacher", lambda *_: teacher)
    preprocess = Classifier.preprocess

    def noting(classifier: Classifier, images: Tensor) -> Tensor:
        if classifier.training:
            trained_on.append(images.clone())
        return preprocess(classifier, images)

    monkeypatch.setattr(Classifier, "preprocess", noting)
    run = started(tmp_path / "run", teacher="resnet/1", teacher_view="augmented", crop_padding=4, **fields)
    list(train(run.recipe(), dataset, run, CPU, LocalStore(models)))
    assert len(teacher.seen) == len(trained_on) == 2 * 5  # two epochs of 300 images in batches of 64
    assert all(torch.equal(shown, trained) for shown, trained in zip(teacher.seen, trained_on, strict=True))


def test_the_answers_to_a_combination_are_targets_whatever_its_shares(
    dataset: Dataset, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student with teacher weight 1 learns the teacher's logits, here the same for every image."""
    answer = 20 * torch.eye(100)[7]
    monkeypatch.setattr(distillation, "load_teacher", lambda *_: lambda pixels: answer.expand(len(pixels), 100))
    fields = {"optimizer": "adam", "learning_rate": 0.005, "weight_decay": 0, "schedule": "constant"}
    view = {"teacher": "resnet/1", "teacher_weight": 1, "teacher_view": "augmented", "cutmix": 1.0}
    run = started(tmp_path / "run", **fields, **view)
    list(train(run.recipe(), dataset, run, CPU, LocalStore(models)))
    student, _ = restore(run, run.recipe(), dataset)
    assert (predict(student, torch.from_numpy(dataset.train.images)).argmax(1) == 7).all()


def test_a_teacher_that_is_asked_in_every_step_answers_in_its_quantized_form(
    dataset: Dataset, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = list[str]()

    monkeypatch.setattr(selection, "OpenVinoEngine", lambda file, *_, **__: loaded.append(file.name))
    fields = {"teacher": "resnet/1", "validation_images": 100}
    for quantized in (False, True):
        if quantized:
            monkeypatch.setattr(LocalStore, "verify", lambda self, card: self.root / card.name / str(card.version))
            (models / "resnet" / "1" / INT8).touch()
        for view in ("original", "augmented"):
            chosen = make_recipe("resnet", fields | {"teacher_view": view})
            distillation.load_teacher(chosen, LocalStore(models), dataset, CPU)
    assert loaded == ["model.pt", "model.pt", "model.pt", "int8.xml"]


def test_several_versions_teach_the_mean_of_their_logits(
    dataset: Dataset, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(([[1.0, 2.0]], [[3.0, 6.0]]))

    def compiled(*_: object) -> SimpleNamespace:
        logits = torch.tensor(next(answers))
        return SimpleNamespace(compute_logits=lambda _: logits)

    monkeypatch.setattr(selection, "OpenVinoEngine", compiled)
    chosen = make_recipe("resnet", {"teacher": "resnet/1,resnet/1", "validation_images": 100})
    teacher = distillation.load_teacher(chosen, LocalStore(models), dataset, CPU)
    assert torch.equal(teacher(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), torch.tensor([[2.0, 4.0]]))


def test_teachers_are_named_by_their_versions() -> None:
    assert make_recipe("resnet", {"teacher": "resnet18/12"}).teachers == ("resnet18/12",)
    assert make_recipe("resnet", {"teacher": "resnet18/1,resnet/3"}).teachers == ("resnet18/1", "resnet/3")
    assert make_recipe("resnet", {"teacher": "none"}).teachers == ()
    for wrong in ("resnet18", "../resnet/1", "resnet/0", "resnet/1\n", "resnet/1,", "none,resnet/1"):
        with pytest.raises(RecipeError, match=r"^teacher: "):
            make_recipe("resnet", {"teacher": wrong})
