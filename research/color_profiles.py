"""Measure the accuracy that the conversion to sRGB gains, and its cost.

The program writes test images as PNG files in other color spaces, so that they look the same: it converts the numbers
and adds the profile. It decodes and classifies them as the service does, with the profile and without it. Then it
measures the CPU time of decoding a photo of a phone with and without a profile.

    python research/color_profiles.py [--images 10000] [--model resnet18/5] [--models models]

Time: four minutes for 2,000 images.
Result: for 2,000 images, top-1 in other color spaces is 81.8 to 82.2 % with conversion and 74.1 to 82.0 % without it;
converting the colors of a photo takes 0.03 ms, and 4 ms for the first photo with a profile (AMD EPYC, 2 cores,
2026-11-29).
Table: results/color_profiles.md.
"""

import argparse
import io
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests/helpers"))

import icc_profiles
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from results import describe_run, keep

from app.inference.images import color
from app.inference.images.encoded import EncodedImage
from training.dataset import load_dataset
from training.runtimes.engine import Engine
from training.runtimes.selection import load
from training.store import MODEL, LocalStore

PHOTO = (4032, 3024)
TIMES = 20
BATCH = 50


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(data: bytes) -> NDArray[np.uint8]:
    return EncodedImage(data, 1 << 24, 50_000_000).decode()


def classify(images: NDArray[np.uint8], engine: Engine) -> NDArray[np.int64]:
    """Return the most probable class of uint8 [N, 3, 32, 32], as the service computes it."""
    logits = [engine(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
    classes: NDArray[np.int64] = np.concatenate(logits).argmax(1)
    return classes


def accuracy_rows(engine: Engine, count: int) -> list[str]:
    test = load_dataset().test
    images, labels = test.images[:count], test.labels[:count]
    plain = classify(images.transpose(0, 3, 1, 2).copy(), engine)
    rows = [f"| sRGB | {np.mean(plain == labels):.1%} | | | |"]
    for name in icc_profiles.RGB_SPACES:
        if name == "sRGB":
            continue
        profile = icc_profiles.rgb_profile(name)
        cases: tuple[dict[str, Any], ...] = ({}, {"icc_profile": profile})
        stored = [Image.fromarray(icc_profiles.from_srgb(image, name)) for image in images]
        answers = [
            classify(np.stack([decode(encode(image, **options)) for image in stored]), engine) for options in cases
        ]
        cells = " | ".join(f"{np.mean(each == labels):.1%} | {np.mean(each != plain):.1%}" for each in answers)
        rows.append(f"| {name} | {cells} |")
    return rows


def cost_rows() -> list[str]:
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    photo = Image.fromarray(coarse).resize(PHOTO, Image.Resampling.BICUBIC)
    cmyk = photo.resize((2016, 1512)).convert("CMYK")
    cases = {
        "JPEG 4032x3024, Display P3": (photo, "JPEG", icc_profiles.rgb_profile("Display P3")),
        "JPEG 4032x3024, sRGB": (photo, "JPEG", icc_profiles.rgb_profile("sRGB")),
        "JPEG 2016x1512, CMYK, a profile of 0.5 MB": (cmyk, "JPEG", icc_profiles.cmyk_profile(17)),
    }
    rows = []
    for name, (image, kind, profile) in cases.items():
        tagged, plain = encode(image, kind, icc_profile=profile), encode(image, kind)
        color._transforms = color._Transforms()
        first = _milliseconds(tagged)
        spent = min(_milliseconds(tagged) for _ in range(TIMES)), min(_milliseconds(plain) for _ in range(TIMES))
        times = " | ".join(f"{each:.1f} ms" for each in (spent[1], spent[0], first))
        rows.append(f"| {name} | {times} | {_conversion(image, profile):.2f} ms |")
    return rows


def _milliseconds(data: bytes) -> float:
    started = time.process_time()
    decode(data)
    return 1000 * (time.process_time() - started)


def _conversion(image: Image.Image, profile: bytes) -> float:
    """Return the milliseconds of converting 32x32 pixels with a profile that was used before."""
    small = image.resize((32, 32))
    started = time.process_time()
    for _ in range(TIMES):
        color.to_srgb(small, profile)
    return 1000 * (time.process_time() - started) / TIMES


def main(version: str, count: int, models: Path) -> None:
    store = LocalStore(models)
    card = store.card(*store.parse(version))
    keep(
        __file__,
        [
            f"Top-1 of `{version}` on the first {count:,} test images in other color spaces, and the part of the "
            f"answers that differ from those for sRGB. {describe_run()}.",
            "",
            "| color space | top-1, profile ignored | answers changed | top-1, converted | answers changed |",
            "| --- | --: | --: | --: | --: |",
            *accuracy_rows(load(store.verify(card) / MODEL, "cpu"), count),
            "",
            f"CPU time of decoding, least of {TIMES}; the first image with a profile makes the transform.",
            "",
            "| file | without a profile | with it | the first with it | conversion of 32x32 pixels |",
            "| --- | --: | --: | --: | --: |",
            *cost_rows(),
        ],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--model", default="resnet18/5")
    parser.add_argument("--models", type=Path, default=Path("models"))
    given = parser.parse_args()
    main(given.model, given.images, given.models)
