"""Check the maps of POST /explain: hiding the regions that speak for a class must lower its probability.

For each image the program explains the predicted class, hides the tenth of the pixels with the highest values under the
mean color of the image, and computes the probability again. It compares the fall with that of three random tenths: the
same shape moved to a random place (with wrap-around), random cells of the map, and pixels that are scattered at random.
Scattered pixels do the most harm, because they leave no region intact and add edges that no photo has.

    python research/explanations.py resnet/4 resnet18/5 [--split test] [--images 200] [--models models]

The default split is the images that a version's recipe holds out. The masks, the fill color and the linear model were
chosen there; the test set gives the final figures only.

Table: results/explanations.md.
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests/helpers"))

import numpy as np
from numpy.typing import NDArray
from results import describe_run, keep

from app.inference.batching import BatchOutput
from app.inference.explanation import CELL, importance_map, occlude
from training.dataset import Dataset, hold_out, load_dataset
from training.runtimes import selection
from training.runtimes.engine import Engine
from training.store import MODEL, LocalStore

_TENTH = 0.1


def compute_probabilities(engine: Engine, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the probabilities float64 [N, classes] of images uint8 [N, 3, 32, 32]."""
    return BatchOutput(
        np.concatenate([engine(batch) for batch in np.array_split(images, -(-len(images) // 16))])
    ).probabilities


def hide(image: NDArray[np.uint8], hidden: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return an image with some pixels, bool [32, 32], in the mean color of the image."""
    return np.where(hidden, image.mean((1, 2)).round().astype(np.uint8)[:, None, None], image)


def find_top_tenth(cells: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which pixels are in the tenth with the highest values of a map, bool [32, 32]."""
    values = cells.repeat(CELL, 0).repeat(CELL, 1)
    ranks = np.argsort(np.argsort(-values.ravel(), kind="stable"))
    return (ranks < _TENTH * ranks.size).reshape(values.shape)


def measure(version: str, store: LocalStore, dataset: Dataset, split: str, count: int) -> str:
    """Return the table row of one version."""
    card = store.card(*store.parse(version))
    engine = selection.load(store.verify(card) / MODEL, "auto", "auto")
    source = dataset.test if split == "test" else hold_out(dataset.train, card.held_out)[1]
    random = np.random.default_rng(0)
    chosen = random.permutation(len(source))[:count]
    falls = []
    for image in np.ascontiguousarray(source.images[chosen].transpose(0, 3, 1, 2)):
        probabilities = compute_probabilities(engine, occlude(image))
        label = probabilities[0].argmax()
        cells = importance_map(probabilities[:, label])
        highest = find_top_tenth(cells)
        other_cells = find_top_tenth(random.permutation(cells.ravel()).reshape(cells.shape))
        moved = np.roll(highest, random.integers(0, len(highest), 2), (0, 1))
        scattered = random.permutation(highest.ravel()).reshape(highest.shape)
        hidden = np.stack([hide(image, each) for each in (highest, moved, other_cells, scattered)])
        falls.append(probabilities[0, label] - compute_probabilities(engine, hidden)[:, label])
    mean = " | ".join(f"{fall:.3f}" for fall in np.mean(falls, 0))
    wins = " | ".join(f"{share:.0%}" for share in (np.array(falls)[:, :1] > np.array(falls)[:, 1:]).mean(0))
    return f"| `{version}` | {engine.name} | {mean} | {wins} |"


def main(versions: list[str], split: str, count: int, models: Path) -> None:
    store, dataset = LocalStore(models), load_dataset()
    source = "the test set" if split == "test" else "the images held out"
    lines = [
        f"Mean fall of the probability of the predicted class if a tenth of the pixels is hidden, and the share of the "
        f"images for which the top tenth costs more; {count} images of {source}; {describe_run()}.",
        "",
        "| model | engine | top tenth of the map | same shape elsewhere | random cells | scattered pixels | "
        "more than elsewhere | more than random cells | more than scattered |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: |",
        *(measure(version, store, dataset, split, count) for version in versions),
    ]
    keep(__file__, lines, split == "test")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--models", type=Path, default=Path("models"))
    chosen = parser.parse_args()
    main(chosen.versions, chosen.split, chosen.images, chosen.models)
