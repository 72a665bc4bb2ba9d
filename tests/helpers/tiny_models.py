"""Train and publish real models within seconds, on the synthetic data set."""

from pathlib import Path
from typing import Any

import torch
from server import DATA

from training.dataset import load_dataset
from training.export import publish
from training.loop import train
from training.recipes import make_recipe
from training.run import Run
from training.store import LocalStore

TINY: dict[str, Any] = {"validation_images": 0, "width": 8, "epochs": 2, "learning_rate": 0.05, "int8": False}
NAME = "resnet"


def make_store(folder: Path, versions: int = 1) -> LocalStore:
    """Return a model store with versions of `resnet` that differ in their seed. The last version is live.

    Args:
        folder: Empty folder for the store and the runs.
    """
    torch.set_num_threads(1)
    dataset, made = load_dataset(DATA), LocalStore(folder / "models")
    for seed in range(versions):
        run = Run(folder / "first-runs" / str(seed))
        run.create(make_recipe(NAME, TINY | {"seed": seed}))
        list(train(run.recipe(), dataset, run, torch.device("cpu")))
        publish(run, dataset, made, "always")
    return made
