"""Compare runs of one process with runs that two workers of Ray Train share.

    python research/several_processes.py [--data DIR] [--seeds 3]

Each seed trains twice, on 25,000 images of the real data set for four epochs. The other 25,000 training images measure
the accuracy. Both runs of a seed see the same batches. The two workers normalize by the statistics of half a batch.

Table: results/several_processes.md.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests/helpers"))

from results import describe_run, is_whole, keep

from training.run import Run

ROOT = Path(__file__).parents[1]
RECIPE = ["resnet", "width=8", "epochs=4", "validation_images=25000", "int8=false"]
ENGINES = {"one process": [], "two workers": ["--engine", "ray", "--workers", "2"]}


def train(folder: Path, data: str | None, seed: int, engine: list[str]) -> list[float]:
    """Train and return the validation top-1 after each epoch, 0-1."""
    command = [sys.executable, "-m", "training", "train", *RECIPE, f"seed={seed}", "--run", str(folder), "--no-publish"]
    command += [*engine, *(["--data", data] if data else [])]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    return [epoch["top1"] for epoch in Run(folder).epochs()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of cifar100.npz")
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    measured: dict[str, list[list[float]]] = {name: [] for name in ENGINES}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(chosen.seeds):
            for name, engine in ENGINES.items():
                measured[name].append(train(Path(folder, f"{name} {seed}"), chosen.data, seed, engine))
                print(name, seed, measured[name][-1], flush=True)
    epochs = range(len(measured["one process"][0]))
    whole = is_whole(parser, argparse.Namespace(data=None, seeds=chosen.seeds))
    keep(
        __file__,
        [
            f"`{' '.join(RECIPE)}`, {chosen.seeds} seeds, top-1 on 25,000 held-out images. {describe_run()}.",
            "",
            "| epoch | one process: mean (standard deviation) | two workers: mean (standard deviation) | difference |",
            "| --: | --: | --: | --: |",
            *(_format_row(epoch, measured) for epoch in epochs),
        ],
        whole,
    )


def _format_row(epoch: int, measured: dict[str, list[list[float]]]) -> str:
    columns = [[run[epoch] for run in runs] for runs in measured.values()]
    means = [statistics.mean(column) for column in columns]
    spreads = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
    texts = [f"{mean:.2%} ({spread * 100:.2f})" for mean, spread in zip(means, spreads, strict=True)]
    return f"| {epoch + 1} | {' | '.join(texts)} | {(means[1] - means[0]) * 100:+.2f} points |"


if __name__ == "__main__":
    main()
