"""Measure the accuracy of published versions on corrupted test images, and on test images sent as photos.

Ten corruptions at three severities have about the strength of levels 1, 3 and 5 of Hendrycks and Dietterich 2019. The
random generator of each corruption has a fixed seed. The photo of a test image is scaled to 500x500 pixels, saved as a
JPEG of quality 85, and decoded as the service decodes an upload. Every version runs in the runtime that serves it.

    python research/robustness.py [--images 10000] [--versions resnet/4 resnet18/5] [--models models]

Time: ten minutes for 2,000 images and three versions.
Table: results/robustness.md.
"""

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests/helpers"))

import numpy as np
import torch
from PIL import Image
from results import describe_run, keep
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2.functional import gaussian_blur

from app.inference.images.encoded import EncodedImage
from training.dataset import load_dataset
from training.runtimes.engine import Engine
from training.runtimes.selection import load
from training.store import MODEL, LocalStore

BATCH = 100
PHOTO_SIDE, PHOTO_QUALITY = 500, 85
SEED = 0

Corruption = Callable[[Tensor, float, torch.Generator], Tensor]
"""Function from float images [N, 3, 32, 32] from 0 to 1, a strength and a generator to corrupted images."""


def add_gaussian_noise(images: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    return images + deviation * torch.randn(images.shape, generator=generator)


def add_shot_noise(images: Tensor, photons: float, generator: torch.Generator) -> Tensor:
    return torch.poisson(images * photons, generator=generator) / photons


def add_impulse_noise(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Set a share of the values to 0 or 1."""
    draws = torch.rand(images.shape, generator=generator)
    return torch.where(draws < share, (draws < share / 2).float(), images)


def blur(images: Tensor, deviation: float, _: torch.Generator) -> Tensor:
    blurred: Tensor = gaussian_blur(images, [9, 9], [deviation, deviation])
    return blurred


def blur_by_motion(images: Tensor, length: float, generator: torch.Generator) -> Tensor:
    """Average each image along a line of a random direction, `length` pixels long."""
    angles = torch.rand(len(images), generator=generator) * torch.pi
    directions = torch.stack([angles.cos(), angles.sin()], 1) / (images.shape[-1] / 2)
    identity = functional.affine_grid(
        torch.eye(2, 3).expand(len(images), 2, 3), list(images.shape), align_corners=False
    )
    steps = torch.linspace(-length / 2, length / 2, 9)
    moved = [
        functional.grid_sample(
            images, identity + step * directions[:, None, None], padding_mode="reflection", align_corners=False
        )
        for step in steps
    ]
    return torch.stack(moved).mean(0)


def add_fog(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Add smooth noise of several scales, and keep the brightest value."""
    fog = torch.zeros(len(images), 1, *images.shape[2:])
    for side in (2, 4, 8, 16):
        noise = torch.rand(len(images), 1, side, side, generator=generator) / side
        fog += functional.interpolate(noise, images.shape[2:], mode="bicubic", align_corners=False)
    fog = fog / fog.amax((1, 2, 3), keepdim=True)
    brightest = images.amax((1, 2, 3), keepdim=True)
    return (images + strength * fog) * brightest / (brightest + strength)


def brighten(images: Tensor, amount: float, _: torch.Generator) -> Tensor:
    return images + amount


def reduce_contrast(images: Tensor, factor: float, _: torch.Generator) -> Tensor:
    means = images.mean((2, 3), keepdim=True)
    return means + factor * (images - means)


def pixelate(images: Tensor, factor: float, _: torch.Generator) -> Tensor:
    small = functional.interpolate(images, scale_factor=factor, mode="area")
    return functional.interpolate(small, images.shape[2:], mode="nearest")


def compress(images: Tensor, quality: float, _: torch.Generator) -> Tensor:
    return torch.stack([_save_as_jpeg(image, int(quality)) for image in images])


def _save_as_jpeg(image: Tensor, quality: int) -> Tensor:
    buffer = io.BytesIO()
    Image.fromarray(to_bytes(image).permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1) / 255


CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, float, float]]] = {
    "Gaussian noise": (add_gaussian_noise, (0.04, 0.08, 0.10)),
    "shot noise": (add_shot_noise, (500, 100, 50)),
    "impulse noise": (add_impulse_noise, (0.01, 0.03, 0.07)),
    "Gaussian blur": (blur, (0.4, 0.7, 1.0)),
    "motion blur": (blur_by_motion, (2, 4, 6)),
    "fog": (add_fog, (0.2, 0.75, 1.5)),
    "brightness": (brighten, (0.05, 0.15, 0.30)),
    "contrast": (reduce_contrast, (0.75, 0.4, 0.15)),
    "pixelation": (pixelate, (0.95, 0.85, 0.65)),
    "JPEG compression": (compress, (80, 58, 40)),
}
"""Each corruption with its three strengths."""


def to_bytes(images: Tensor) -> Tensor:
    """Return images of values from 0 to 1 as uint8."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def corrupt(images: Tensor, corruption: Corruption, strength: float) -> Tensor:
    """Corrupt uint8 images [N, 3, 32, 32]."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.cat([to_bytes(corruption(batch / 255, strength, generator)) for batch in images.split(BATCH)])


def send_as_photos(images: Tensor) -> Tensor:
    """Return uint8 images [N, 3, 32, 32] after the way of a photo through the service."""
    decoded = []
    for image in images:
        large = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
            (PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.BICUBIC
        )
        buffer = io.BytesIO()
        large.save(buffer, "JPEG", quality=PHOTO_QUALITY)
        decoded.append(torch.from_numpy(EncodedImage(buffer.getvalue(), 1 << 24, 1 << 24).decode()))
    return torch.stack(decoded)


def accuracy(engine: Engine, images: Tensor, labels: Tensor) -> float:
    """Return the share of the images whose most probable class is their label."""
    logits = [engine(batch.contiguous().numpy()) for batch in images.split(BATCH)]
    return float(np.mean(np.concatenate(logits).argmax(1) == labels.numpy()))


def main(versions: list[str], count: int, models: Path) -> None:
    store = LocalStore(models)
    names = versions or [f"{name}/{live}" for name in store.names() if (live := store.live(name))]
    engines = [load(store.verify(store.card(*store.parse(name))) / MODEL, "cpu") for name in names]
    test = load_dataset().test
    images, labels = torch.from_numpy(test.images[:count]).permute(0, 3, 1, 2), torch.from_numpy(test.labels[:count])

    def measure(changed: Tensor) -> list[float]:
        return [accuracy(engine, changed, labels) for engine in engines]

    def row(name: str, strengths: str, figures: list[list[float]]) -> str:
        """Format the figures of each strength and version."""
        cells = [" / ".join(f"{each[number]:.1%}" for each in figures) for number in range(len(engines))]
        return f"| {name} | {strengths} | {' | '.join(cells)} |"

    rows, all_figures = [], []
    for name, (corruption, strengths) in CORRUPTIONS.items():
        figures = [measure(corrupt(images, corruption, strength)) for strength in strengths]
        all_figures += figures
        rows.append(row(name, ", ".join(f"{strength:g}" for strength in strengths), figures))
        print(rows[-1], file=sys.stderr)
    keep(
        __file__,
        [
            f"Top-1 on {count:,} corrupted test images, by strength of the corruption. {describe_run()}.",
            "",
            f"| corruption | strengths | {' | '.join(names)} |",
            f"| --- | --- | {' | '.join('---' for _ in names)} |",
            row("none", "", [measure(images)]),
            *rows,
            row("mean of the 30", "", [np.mean(all_figures, axis=0).tolist()]),
            row(f"sent as a photo of {PHOTO_SIDE}x{PHOTO_SIDE} pixels", "", [measure(send_as_photos(images))]),
        ],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--versions", nargs="*", default=[], help="the live version of every model by default")
    parser.add_argument("--models", type=Path, default=Path("models"))
    given = parser.parse_args()
    main(given.versions, given.images, given.models)
