"""What a GPU computes is what a CPU computes, but for rounding: `python -m pytest -m gpu` on a machine that has one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from app import engines
from app.engines import deviation
from training import distillation, loop
from training.cuda_graph import Recorded
from training.data import Dataset
from training.loop import Epoch, train
from training.recipes import Recipe, recipe
from training.run import Run
from training.store import Store

pytestmark = pytest.mark.gpu

EXACT = {"precision": "float32", "validation_images": 100, "batch_size": 48, "epochs": 2}
FROZEN = {"image_size": 64, "weights": "none", "finetune_epochs": 0, "learning_rate": 1e-4}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "muon": ("resnet", {"width": 8, "learning_rate": 0.005}),
    "sgd and mixup": ("resnet", {"width": 8, "optimizer": "sgd", "learning_rate": 0.02, "mixup": 0.2}),
    "shared weights, adam": ("resnet-seed", {"width": 8, "dropout": 0, "learning_rate": 1e-4}),
    "features": ("resnet18", FROZEN),
    "frozen stages, cutmix": ("resnet18", FROZEN | {"cache_features": False, "cutmix": 1.0}),
    "two stages": ("resnet18", FROZEN | {"finetune_epochs": 2}),
    "two stages, sgd": ("resnet18", FROZEN | {"finetune_epochs": 2, "optimizer": "sgd", "learning_rate": 0.01}),
}


@pytest.fixture(autouse=True)
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return torch.device("cuda")


def trained(path: Path, chosen: Recipe, dataset: Dataset, device: torch.device) -> list[float]:
    """The losses of a run's epochs."""
    run = Run(path)
    if not path.exists():
        run.create(chosen)
    epochs = [event for event in train(run.recipe(), dataset, run, device) if isinstance(event, Epoch)]
    return [loss for epoch in epochs for loss in (epoch.train_loss, epoch.loss)]


@pytest.mark.parametrize(("name", "overrides"), RECIPES.values(), ids=RECIPES)
def test_recorded_steps_learn_what_steps_on_the_cpu_learn(
    name: str, overrides: dict[str, Any], dataset: Dataset, gpu: torch.device, tmp_path: Path
) -> None:
    chosen = recipe(name, EXACT | overrides)
    here = trained(tmp_path / "gpu", chosen, dataset, gpu)
    assert here == pytest.approx(trained(tmp_path / "cpu", chosen, dataset, torch.device("cpu")), rel=0.02)


def test_recording_changes_nothing(
    dataset: Dataset, gpu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = recipe("resnet", EXACT | {"width": 8, "learning_rate": 0.005})
    recorded = trained(tmp_path / "recorded", chosen, dataset, gpu)
    monkeypatch.setattr(loop, "Recorded", lambda function: function)
    assert trained(tmp_path / "plain", chosen, dataset, gpu) == pytest.approx(recorded, rel=1e-3)


def test_a_run_goes_on_on_another_device(dataset: Dataset, gpu: torch.device, tmp_path: Path) -> None:
    chosen = recipe("resnet18", EXACT | FROZEN | {"schedule": "constant"})
    whole = trained(tmp_path / "whole", chosen, dataset, gpu)
    for number, (first, second) in enumerate([("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")]):
        path = tmp_path / str(number)
        trained(path, chosen.model_copy(update={"epochs": 1}), dataset, torch.device(first))
        Run(path).extend(2)
        assert trained(path, chosen, dataset, torch.device(second)) == pytest.approx(whole[2:], rel=0.02)


def test_half_precision_is_recorded_too(dataset: Dataset, gpu: torch.device, tmp_path: Path) -> None:
    rough, exact = (
        trained(tmp_path / precision, recipe("resnet", EXACT | {"width": 8, "precision": precision}), dataset, gpu)
        for precision in ("auto", "float32")
    )
    assert rough == pytest.approx(exact, rel=0.1)


def test_a_teacher_answers_as_on_the_cpu(published_store: Path, dataset: Dataset, gpu: torch.device) -> None:
    pytest.importorskip("openvino")
    chosen = recipe("resnet", {"teacher": "resnet/1", "validation_images": 100})
    images = torch.from_numpy(dataset.test.images).permute(0, 3, 1, 2)
    answers = [
        distillation.load_teacher(chosen, Store(published_store), dataset, device)(images.to(device)).cpu().numpy()
        for device in (gpu, torch.device("cpu"))
    ]
    assert deviation(*answers) < 0.03


def test_the_engine_computes_any_number_of_images(models: Path, dataset: Dataset) -> None:
    model = models / "resnet" / "1" / "model.pt"
    engine, exact = engines.load(model, "auto", "torchscript"), engines.TorchScriptEngine(model)
    assert engine.name == "torchscript-cuda-f16"
    images = np.ascontiguousarray(dataset.test.images.transpose(0, 3, 1, 2))
    expected = exact(images)
    kept = engine(images[:2])
    for size in (1, 2, 8, 9, 100, len(images)):
        assert deviation(engine(images[-size:]), expected[-size:]) <= engine.tolerance
    assert deviation(kept, expected[:2]) <= engine.tolerance


def test_a_graph_takes_new_arguments_and_passes_on_what_has_another_shape() -> None:
    total = torch.zeros((), device="cuda")

    def add(values: Tensor) -> Tensor:
        total.add_(values.sum())
        return 2 * values

    recorded: Callable[[Tensor], Tensor] = Recorded(add)
    for number in range(20):
        values = torch.full((3 if number % 3 else 2,), float(number), device="cuda")
        assert recorded(values).tolist() == (2 * values).tolist()
    assert total.item() == sum(number * (3 if number % 3 else 2) for number in range(20))
