"""Test that a GPU computes the same as a CPU, except for rounding.

Run `python -m pytest -m gpu` on a machine with a GPU.
"""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from training import distillation, step
from training.dataset import Dataset
from training.loop import Epoch, train
from training.recipes import Recipe, make_recipe
from training.run import Run
from training.runtimes import selection
from training.runtimes.cuda_graph import WARMUP_CALLS, GraphedFunction
from training.runtimes.engine import deviation
from training.runtimes.torchscript import TorchScriptEngine
from training.store import LocalStore

pytestmark = pytest.mark.gpu

EXACT = {"precision": "float32", "validation_images": 100, "batch_size": 48, "epochs": 2}
FROZEN = {"image_size": 64, "weights": "none", "finetune_epochs": 0, "learning_rate": 1e-4}
SHARED = {"width": 8, "dropout": 0, "learning_rate": 1e-4, "batch_norm_statistics": "per-use"}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "muon": ("resnet", {"width": 8, "learning_rate": 0.005}),
    "sgd and mixup": ("resnet", {"width": 8, "optimizer": "sgd", "learning_rate": 0.02, "mixup": 0.2}),
    "shared weights, adam": ("resnet-seed", SHARED),
    "evaluation mode in the second epoch": ("resnet-seed", SHARED | {"eval_mode_after": 1}),
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


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[torch.cuda.CUDAGraph]:
    """A list that receives each CUDA graph when it is replayed."""
    replayed: list[torch.cuda.CUDAGraph] = []
    replay = torch.cuda.CUDAGraph.replay

    def noted(graph: torch.cuda.CUDAGraph) -> None:
        replayed.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", noted)
    return replayed


def trained(path: Path, chosen: Recipe, dataset: Dataset, device: torch.device) -> list[float]:
    """Train a run, or resume it, and return the training loss and the validation loss of each epoch, in turn."""
    run = Run(path)
    if not path.exists():
        run.create(chosen)
    epochs = [event for event in train(run.recipe(), dataset, run, device) if isinstance(event, Epoch)]
    return [loss for epoch in epochs for loss in (epoch.train_loss, epoch.loss)]


@pytest.mark.parametrize(("name", "overrides"), RECIPES.values(), ids=RECIPES)
def test_recorded_steps_learn_what_steps_on_the_cpu_learn(
    name: str,
    overrides: dict[str, Any],
    dataset: Dataset,
    gpu: torch.device,
    tmp_path: Path,
    replays: list[torch.cuda.CUDAGraph],
) -> None:
    chosen = make_recipe(name, EXACT | overrides)
    here = trained(tmp_path / "gpu", chosen, dataset, gpu)
    changes_mode = chosen.trains_in_evaluation_mode(chosen.epochs)
    assert len(set(replays)) == (2 if chosen.finetune_epochs or changes_mode else 1)
    assert here == pytest.approx(trained(tmp_path / "cpu", chosen, dataset, torch.device("cpu")), rel=0.02)


def test_recording_changes_nothing(
    dataset: Dataset, gpu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = make_recipe("resnet", EXACT | {"width": 8, "learning_rate": 0.005})
    recorded = trained(tmp_path / "recorded", chosen, dataset, gpu)
    monkeypatch.setattr(step, "GraphedFunction", lambda function: function)
    assert trained(tmp_path / "plain", chosen, dataset, gpu) == pytest.approx(recorded, rel=1e-3)


@pytest.mark.parametrize(("first", "second"), [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
@pytest.mark.parametrize("name", ["muon", "features", "two stages, sgd"])
def test_a_run_goes_on_on_another_device(
    name: str, first: str, second: str, dataset: Dataset, gpu: torch.device, tmp_path: Path
) -> None:
    base, overrides = RECIPES[name]
    chosen = make_recipe(base, EXACT | overrides)
    whole = trained(tmp_path / "whole", chosen, dataset, gpu)
    run = Run(tmp_path / "run")
    run.create(chosen)
    for event in train(chosen, dataset, run, torch.device(first)):
        if isinstance(event, Epoch):
            break
    assert trained(run.path, chosen, dataset, torch.device(second)) == pytest.approx(whole[2:], rel=0.02)


def test_half_precision_is_recorded_too(
    dataset: Dataset, gpu: torch.device, tmp_path: Path, replays: list[torch.cuda.CUDAGraph]
) -> None:
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("a scaler of float16 cannot be recorded")
    rough, exact = (
        trained(tmp_path / precision, make_recipe("resnet", EXACT | {"width": 8, "precision": precision}), dataset, gpu)
        for precision in ("auto", "float32")
    )
    assert len(set(replays)) == 2
    assert rough == pytest.approx(exact, rel=0.1)


def test_a_teacher_answers_as_on_the_cpu(published_store: Path, dataset: Dataset, gpu: torch.device) -> None:
    pytest.importorskip("openvino")
    chosen = make_recipe("resnet", {"teacher": "resnet/1", "validation_images": 100})
    images = torch.from_numpy(dataset.test.images).permute(0, 3, 1, 2)
    answers = [
        distillation.load_teacher(chosen, LocalStore(published_store), dataset, device)(images.to(device)).cpu().numpy()
        for device in (gpu, torch.device("cpu"))
    ]
    assert deviation(*answers) < 0.03


def test_the_engine_computes_any_number_of_images(models: Path, dataset: Dataset) -> None:
    model = models / "resnet" / "1" / "model.pt"
    engine, exact = selection.load(model, "auto", "torchscript"), TorchScriptEngine(model)
    assert engine.name == "torchscript-cuda-f16"
    images = np.ascontiguousarray(np.concatenate([dataset.train.images, dataset.test.images]).transpose(0, 3, 1, 2))
    images = np.concatenate([images, 255 - images])
    expected = exact(images)
    kept = engine(images[:2])
    for size in (1, 2, 8, 9, 33, 65, 129, 256, 257, len(images)):
        assert deviation(engine(images[-size:]), expected[-size:]) <= engine.tolerance
    assert deviation(kept, expected[:2]) <= engine.tolerance


def test_an_engine_that_is_not_needed_any_more_leaves_the_gpu(models: Path) -> None:
    engine = selection.load(models / "resnet" / "1" / "model.pt", "cuda", "torchscript")
    gone = weakref.ref(engine)
    gc.disable()  # the service freezes the objects of its start, so the collector never visits them
    try:
        del engine
        assert gone() is None
    finally:
        gc.enable()


def test_a_graph_takes_new_arguments_and_passes_on_what_has_another_shape(
    replays: list[torch.cuda.CUDAGraph],
) -> None:
    total = torch.zeros((), device="cuda")

    def add(values: Tensor) -> Tensor:
        total.add_(values.sum())
        return 2 * values

    recorded: Callable[[Tensor], Tensor] = GraphedFunction(add)
    for number in range(20):
        values = torch.full((3 if number % 3 else 2,), float(number), device="cuda")
        assert recorded(values).tolist() == (2 * values).tolist()
    assert len(replays) == 20 - 13 - WARMUP_CALLS
    assert total.item() == sum(number * (3 if number % 3 else 2) for number in range(20))
