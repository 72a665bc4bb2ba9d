"""Compare two ways of choosing the temperature: least cross-entropy, and mean confidence equal to accuracy.

The program uses only the images that a version's recipe holds out. It divides them into random halves many times, fits
both temperatures on one half and measures the calibration error on the other. (With so few images the error is some
percentage points by chance alone.) It prints the table and keeps it.

    python research/calibration.py resnet/2 resnet/3 resnet18/1 resnet18/2 [--splits 40] [--models models]

Result: matching confidence to accuracy has the lower error for all four versions, by 0.02 to 1.07 points (AMD EPYC, 2
cores, 2026-11-25).
Table: results/calibration.md.
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests/helpers"))

import torch
from results import describe_run, keep
from torch import Tensor
from torch.nn import functional as F

from training.dataset import Dataset, load_dataset
from training.evaluate import expected_calibration_error, fit_temperature, predict
from training.loop import make_splits
from training.recipes import parse_recipe
from training.runtimes.openvino import OpenVinoEngine
from training.store import MODEL, LocalStore


def least_cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature that minimizes the cross-entropy (Guo et al. 2017, arXiv:1706.04599)."""
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits.double() / log_temperature.exp(), labels)
        value.backward()
        return value

    optimizer.step(loss)
    return log_temperature.exp().item()


METHODS = {"least cross-entropy": least_cross_entropy, "as confident as accurate": fit_temperature}


def compare(version: str, store: LocalStore, dataset: Dataset, count: int) -> str:
    """Return the table row of one version.

    Args:
        version: Model and version, such as "resnet/2".
        count: Number of random divisions into halves.
    """
    card = store.card(*store.parse(version))
    _, _, validation = make_splits(parse_recipe(card.recipe), dataset)
    network = OpenVinoEngine(store.verify(card) / MODEL)
    logits = predict(network.compute_logits, torch.from_numpy(validation.images)) * card.temperature
    labels = torch.from_numpy(validation.labels)
    random = torch.Generator().manual_seed(0)
    errors: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(count):
        fitted, judged = torch.randperm(len(labels), generator=random).chunk(2)
        for method, fit in METHODS.items():
            temperature = fit(logits[fitted], labels[fitted])
            errors[method].append(expected_calibration_error(logits[judged] / temperature, labels[judged]))
    means = (f"{sum(each) / count:.2%}" for each in errors.values())
    temperatures = (f"{fit(logits, labels):.3f}" for fit in METHODS.values())
    return f"| `{version}` | {len(labels)} | {' | '.join(means)} | {' | '.join(temperatures)} |"


def main(versions: list[str], count: int, models: Path) -> None:
    store, dataset = LocalStore(models), load_dataset()
    lines = [
        f"Calibration error on one half of the images held out, temperature from the other; mean of {count} divisions. "
        f"{describe_run()}.",
        "",
        f"| model | images | {' | '.join(METHODS)} | {' | '.join(f'temperature, {method}' for method in METHODS)} |",
        "| --- | --: | --: | --: | --: | --: |",
        *(compare(version, store, dataset, count) for version in versions),
    ]
    keep(__file__, lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--splits", type=int, default=40)
    parser.add_argument("--models", type=Path, default=Path("models"))
    chosen = parser.parse_args()
    main(chosen.versions, chosen.splits, chosen.models)
