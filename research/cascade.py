"""Compare two ways of choosing the threshold of a cascade: the expected loss of accuracy, and counted correct answers.

The program uses only the images that both members hold out. It divides them into random halves many times, fits a
cascade on one half with either rule and the same tolerance, and measures on the other half the share of images that is
sent on and the accuracy lost against the mean of both members. It prints the table.

    python research/cascade.py [resnet resnet18] [--splits 100] [--models models]

Time: not recorded.
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests/helpers"))

import torch
from results import describe_run, keep
from torch import Tensor

from training import cascade
from training.cascade import TOLERANCE, Fit
from training.dataset import load_dataset
from training.runtimes import selection
from training.runtimes.cascade import compute_confidence, mix
from training.store import LocalStore


def count_correct(first: Tensor, mean: Tensor, labels: Tensor) -> float:
    """Return the threshold that sends on as few images as possible within the tolerance of counted accuracy.

    Args:
        first: Logits of the first member, [N, classes].
        mean: Logits of the mean of both members, [N, classes].
        labels: int64 [N].
    """
    lost = (mean.argmax(1) == labels).int() - (first.argmax(1) == labels).int()
    confidence, order = torch.from_numpy(compute_confidence(first.numpy())).sort(descending=True)
    within = (lost[order].cumsum(0) <= TOLERANCE * len(labels)).nonzero()
    return confidence[within.max()].item() if len(within) else 1.0


def judge(threshold: float, first: Tensor, mean: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the share of images that is sent on, and the counted accuracy that is lost against the mean."""
    answered = torch.from_numpy(compute_confidence(first.numpy())) >= threshold
    lost = (mean.argmax(1) == labels).double() - (first.argmax(1) == labels).double()
    return 1 - answered.double().mean().item(), (lost * answered).mean().item()


def main(members: list[str], count: int, models: Path) -> None:
    store, dataset = LocalStore(models), load_dataset()
    cards = [store.source_card(member) for member in members]
    held_out = cascade.find_held_out(cards, dataset)
    first, second = (cascade.predict_split(selection.load_version(store, card), held_out) for card in cards)
    labels = torch.from_numpy(held_out.labels)
    random = torch.Generator().manual_seed(0)
    fits = list[Fit]()
    judged: dict[str, list[tuple[float, float]]] = {"expected": [], "counted": []}
    for _ in range(count):
        fitted_on, rest = torch.randperm(len(labels), generator=random).chunk(2)
        fits.append(fitted := cascade.fit(first[fitted_on], second[fitted_on], labels[fitted_on]))
        mean = torch.from_numpy(mix(first.numpy(), second.numpy(), fitted.weights))
        counted = count_correct(first[fitted_on], mean[fitted_on], labels[fitted_on])
        for rule, threshold in (("expected", fitted.threshold), ("counted", counted)):
            judged[rule].append(judge(threshold, first[rest], mean[rest], labels[rest]))
    lines = [
        f"Thresholds fitted on one half of {len(labels)} images held out from {' and '.join(members)}, judged on the "
        f"other; tolerance {TOLERANCE:.1%}; mean and standard deviation of {count} divisions. {describe_run()}.",
        "",
        f"Weight of the second member: {_spread([each.weights[1] for each in fits], '.2f')}. "
        f"Temperature: {_spread([each.temperature for each in fits], '.3f')}.",
        "",
        "| loss of accuracy | sent on | lost against the mean |",
        "| --- | --: | --: |",
    ]
    for rule, values in judged.items():
        sent_on, lost = zip(*values, strict=True)
        lines.append(f"| {rule} | {_spread(sent_on, '.1%')} | {_spread(lost, '.2%')} |")
    keep(__file__, lines, whole=False)


def _spread(values: "list[float] | tuple[float, ...]", form: str) -> str:
    spread, mean = torch.std_mean(torch.tensor(values))
    return f"{mean.item():{form}} ± {spread.item():{form}}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("members", nargs="*", default=["resnet", "resnet18"])
    parser.add_argument("--splits", type=int, default=100)
    parser.add_argument("--models", type=Path, default=Path("models"))
    options = parser.parse_args()
    main(options.members, options.splits, options.models)
