"""Compare our training step with a plain PyTorch training loop, on the same network, batch and data.

The plain loop has one Python object per image, PIL transforms, a DataLoader with a worker per core, float32 and NCHW.
Ours is `training.loop.train` itself, as `python -m training train` runs it. Every measurement is a separate process,
the variants take turns, and the table shows medians. Memory is the peak of the process and its workers, sampled four
times a second. With both networks the program writes the table to benchmarks/results/. Linux only.

    python benchmarks/training_speed.py [--network resnet|resnet18] [--batches N] [--rounds 3] [--data FOLDER]

Result: our step trains `resnet` 2.10 times and `resnet18` 7.12 times as fast as the plain loop (AMD EPYC, 2 cores,
2026-11-26).
Table: results/training_speed.md.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests/helpers"))

import torch
from peers.running import resident_mib
from PIL import Image
from results import describe_run, keep
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms

from training.dataset import Dataset, Split, load_dataset
from training.loop import Epoch, train
from training.networks import CIFAR100_MEAN, CIFAR100_STD, IMAGENET_MEAN, IMAGENET_STD, build
from training.optimizers import make_optimizer
from training.recipes import Recipe, make_recipe
from training.resources import choose_dtype, default_device
from training.run import Run

LOOK_S = 0.25
BATCHES = {"resnet": 20, "resnet18": 5}
VARIANTS = {"resnet": ("plain", "ours"), "resnet18": ("plain", "ours without cached features", "ours")}


class Images(TorchDataset[tuple[Tensor, int]]):
    """A data set like torchvision.datasets.CIFAR100: an array, a PIL image for each item, and a transform."""

    def __init__(self, split: Split, transform: transforms.Compose):
        self.split = split
        self.transform = transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.split.images[index])), int(self.split.labels[index])


def plain(chosen: Recipe, dataset: Dataset, device: torch.device) -> float:
    """Return the images per second of the second epoch of the plain loop."""
    small = chosen.network == "resnet"
    augmentation: list[Any] = (
        [transforms.RandomCrop(32, padding=4)] if small else [transforms.Resize(chosen.image_size)]
    )
    mean, std = (CIFAR100_MEAN, CIFAR100_STD) if small else (IMAGENET_MEAN, IMAGENET_STD)
    transform = transforms.Compose(
        [*augmentation, transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(mean, std)]
    )
    loader = DataLoader(
        Images(dataset.train, transform),
        chosen.batch_size,
        shuffle=True,
        num_workers=os.cpu_count() or 1,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )
    network = build(chosen, len(dataset.classes)).network.to(device)
    optimizer = make_optimizer(chosen, network)
    network.train()
    for _ in range(2):
        started = time.perf_counter()
        for images, labels in loader:
            loss = F.cross_entropy(
                network(images.to(device, non_blocking=True)), labels.to(device), label_smoothing=chosen.label_smoothing
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss.item()  # synchronizes with a GPU
    return len(dataset.train) / (time.perf_counter() - started)


def ours(chosen: Recipe, dataset: Dataset, device: torch.device) -> float:
    """Return the images per second of the second epoch of `training.loop.train`."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CIFAR100_FEATURES"] = folder
        run = Run(Path(folder, "run"))
        run.create(chosen)
        epochs = [event for event in train(chosen, dataset, run, device) if isinstance(event, Epoch)]
    return epochs[-1].images_per_s


def measure(network: str, variant: str, batches: int, source: str | None) -> float:
    """Return the images per second of one variant, measured in this process."""
    short: dict[str, Any] = {"epochs": 2, "validation_images": 0}
    if network == "resnet18":
        short |= {"weights": "none", "image_size": 224, "finetune_epochs": 0, "finetune_crop_padding": 0}
    chosen = make_recipe(network, short)
    if "without" in variant:
        chosen = chosen.model_copy(update={"cache_features": False})
    whole = load_dataset(source)
    dataset = replace(whole, train=whole.train[: batches * chosen.batch_size], test=whole.test[:100])
    return (plain if variant == "plain" else ours)(chosen, dataset, default_device())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(VARIANTS), action="append", help="default: both")
    parser.add_argument("--batches", type=int, help=f"of an epoch; default: {BATCHES}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", help="folder of cifar100.npz, or synthetic:N")
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # prints the result of one measurement
    given = parser.parse_args()
    if given.variant:
        print(measure(given.network[0], given.variant, given.batches, given.data))
        return

    device = default_device()
    lines = [
        f"{describe_run()}; PyTorch {torch.__version__}; precision {choose_dtype(make_recipe('resnet'), device)}; "
        f"epochs of a few batches of 128, the second one timed; median of {given.rounds} rounds",
        "",
        "| network | batches | loop | images/s | of the plain loop | peak memory, GiB |",
        "| --- | --: | --- | --: | --: | --: |",
    ]
    networks = given.network or list(VARIANTS)
    for network in networks:
        batches = given.batches or BATCHES[network]
        rounds: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS[network]}
        for _ in range(given.rounds):
            for variant, measured in rounds.items():
                measured.append(_in_its_own_process(network, variant, batches, given.data))
        rates = {variant: [rate for rate, _ in measured] for variant, measured in rounds.items()}
        for variant, measured in rounds.items():
            ratio = statistics.median(
                mine / theirs for mine, theirs in zip(rates[variant], rates["plain"], strict=True)
            )
            memory = statistics.median(gib for _, gib in measured)
            rate = statistics.median(rates[variant])
            lines.append(f"| {network} | {batches} | {variant} | {rate:.0f} | {ratio:.2f} x | {memory:.2f} |")
            print(lines[-1], file=sys.stderr, flush=True)
    keep(__file__, lines, whole=set(networks) == set(VARIANTS))


def _in_its_own_process(network: str, variant: str, batches: int, source: str | None) -> tuple[float, float]:
    """Return the images per second and the peak memory in GiB."""
    command = [sys.executable, __file__, "--network", network, "--variant", variant, "--batches", str(batches)]
    command += ["--data", source] if source else []
    most = 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            most = max(most, resident_mib())
            time.sleep(LOOK_S)
        told = process.stdout.read() if process.stdout else ""
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)
    return float(told.splitlines()[-1]), most / 1024


if __name__ == "__main__":
    main()
