"""Measure how well a score tells images of the 100 classes from strangers: photographs of something else, noise, text.

The threshold of each score keeps 95 % of the images that a version's recipe holds out. The program reports the share of
the strangers below it, and the area under the ROC curve (AUROC) between the images of a split and the strangers. Images
go through the decoder and the engine of the service.

    python research/familiarity.py resnet/4 resnet18/5 cascade/1 --pictures FOLDER [--split test] [--models models]

FOLDER has the photographs below, in any subfolders. They are in the wheels of scikit-image 0.19.3 and scikit-learn
1.5.2, and in Debian's package mate-backgrounds 1.26.0. None shows one of the 100 classes: pictures of people, clouds,
roads, beetles, rockets, cups and the like are left out, and so are paintings and graphics.

The scores: the maximum of the softmax (Hendrycks & Gimpel 2017, arXiv:1610.02136), the energy (Liu et al. 2020,
arXiv:2010.03759), and the largest logit (Hendrycks et al. 2022, arXiv:1911.11132). A cascade has two: the energy of
its first member, which is computed anyway, and the agreement of both members, the energy of the mean of their logits.

Table: results/familiarity.md.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests/helpers"))

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from results import describe_run, keep
from torch import Tensor

from app.inference.images.encoded import SIZE, decode
from training.dataset import hold_out, load_dataset
from training.evaluate import FAMILIAR, predict
from training.runtimes import selection
from training.runtimes.cascade import average, join_names
from training.runtimes.engine import Engine
from training.store import LocalStore, ModelCard

PHOTOGRAPHS = {
    "scikit-image": "brick.png cell.png chelsea.png coins.png grass.png gravel.png hubble_deep_field.jpg ihc.png "
    "microaneurysms.png moon.png retina.jpg",
    "scikit-learn": "flower.jpg",
    "mate-backgrounds": "Aqua.jpg Blinds.jpg FreshFlower.jpg Garden.jpg GreenMeadow.jpg RainDrops.jpg TwoWings.jpg "
    "Wood.jpg",
}
COUNT = 200  # images of noise, and of text
WORDS = Path(__file__).read_text().split()
MAX_PIXELS = 50_000_000

Images = NDArray[np.uint8]


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "maximum softmax": lambda logits: logits.softmax(1).amax(1),
    "energy": lambda logits: logits.logsumexp(1),
    "largest logit": lambda logits: logits.amax(1),
}


def read_photographs(folder: Path) -> Images:
    """Return the photographs as the service decodes them, uint8 [N, 3, 32, 32]."""
    names = " ".join(PHOTOGRAPHS.values()).split()
    found = {path.name: path for path in folder.rglob("*") if path.name in names}
    if missing := set(names) - found.keys():
        raise SystemExit(f"{folder} lacks {', '.join(sorted(missing))}; see the head of this script")
    return np.stack([decode(found[name].read_bytes(), 64 << 20, MAX_PIXELS) for name in names])


def make_noise(random: np.random.Generator) -> Images:
    """Return noise with a grain of 1 to 16 pixels, gray or colored, uint8 [COUNT, 3, 32, 32]."""
    noise = []
    for number in range(COUNT):
        side = SIZE // 2 ** (number % 5)
        pixels = random.integers(0, 256, (side, side, 3), np.uint8)
        if number % 2:
            pixels[:] = pixels[..., :1]
        noise.append(np.asarray(Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
    return np.stack(noise).transpose(0, 3, 1, 2)


def make_text(random: np.random.Generator) -> Images:
    """Return pictures of text of different sizes and colors, uint8 [COUNT, 3, 32, 32]."""
    pictures = []
    for _ in range(COUNT):
        paper, ink = (tuple(int(each) for each in random.integers(*bounds, 3)) for bounds in ((160, 256), (0, 100)))
        picture = Image.new("RGB", (256, 256), paper)
        words = random.permutation(WORDS)
        lines = "\n".join(" ".join(words[row : row + 8]) for row in range(0, 80, 8))
        font = ImageFont.load_default(int(random.integers(14, 64)))
        ImageDraw.Draw(picture).multiline_text((4, 4), lines, fill=ink, font=font)
        pictures.append(np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)))
    return np.stack(pictures).transpose(0, 3, 1, 2)


def compute_logits(engine: Engine, images: Images) -> Tensor:
    return predict(engine.compute_logits, torch.from_numpy(images.transpose(0, 2, 3, 1).copy())).double()


def load_scores(store: LocalStore, card: ModelCard) -> tuple[str, Callable[[Images], dict[str, Tensor]]]:
    """Return the name of a version's engine, and a function from images to their scores by name."""
    if not card.cascade:
        engine = selection.load_version(store, card)
        return engine.name, lambda images: {
            name: score(compute_logits(engine, images)) for name, score in SCORES.items()
        }
    first, second = (selection.load_version(store, store.member_card(each)) for each in store.cascade(card).members)

    def compute_scores(images: Images) -> dict[str, Tensor]:
        logits = [compute_logits(engine, images) for engine in (first, second)]
        mean = torch.from_numpy(average(*(each.numpy() for each in logits)))
        return {"energy": SCORES["energy"](logits[0]), "agreement": SCORES["energy"](mean)}

    return join_names(first.name, second.name), compute_scores


def auroc(known: Tensor, strangers: Tensor) -> float:
    """Return the probability that a known image has a higher score than a stranger."""
    return (known[:, None] > strangers).double().mean().item()


def main(versions: list[str], pictures: Path, split: str, models: Path) -> None:
    store, dataset, random = LocalStore(models), load_dataset(), np.random.default_rng(0)
    strangers = {"photographs": read_photographs(pictures), "noise": make_noise(random), "text": make_text(random)}
    counts = ", ".join(f"{len(images)} {name}" for name, images in strangers.items())
    lines = [
        f"Strangers below the threshold that keeps {FAMILIAR:.0%} of the images held out, and AUROC against "
        f"{'the test set' if split == 'test' else 'the images held out'}. Strangers: {counts}. {describe_run()}.",
        "",
        f"| model | score | threshold | {split} kept | {' | '.join(f'{name} found | AUROC' for name in strangers)} |",
        f"| --- | --- | --: | --: |{' --: | --: |' * len(strangers)}",
    ]
    for version in versions:
        card = store.card(*store.parse(version))
        engine_name, compute_scores = load_scores(store, card)
        held_out = hold_out(dataset.train, card.held_out)[1]
        known = dataset.test if split == "test" else held_out
        fitted, judged = (compute_scores(each.images.transpose(0, 3, 1, 2)) for each in (held_out, known))
        foreign = [compute_scores(images) for images in strangers.values()]
        for name, scores in fitted.items():
            threshold = scores.quantile(1 - FAMILIAR)
            found = " | ".join(
                f"{(each[name] < threshold).double().mean():.0%} | {auroc(judged[name], each[name]):.3f}"
                for each in foreign
            )
            kept = (judged[name] >= threshold).double().mean()
            lines.append(f"| `{version}`, {engine_name} | {name} | {threshold:.3f} | {kept:.1%} | {found} |")
    keep(__file__, lines, split == "test")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--models", type=Path, default=Path("models"))
    chosen = parser.parse_args()
    main(chosen.versions, chosen.pictures, chosen.split, chosen.models)
