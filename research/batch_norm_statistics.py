"""Measure how much accuracy a single set of running statistics costs the shared-weight network.

A block of `resnet-seed` applies one BatchNorm at several depths. This program evaluates one trained run in evaluation
mode, first with separate running statistics for every use, as the run was trained, then with a single set, as a literal
transcription keeps it. The weights are the same. The program gathers the single set by passing training batches through
the network in training mode. The third row of the table normalizes every batch by its own statistics, as training does,
so running statistics have no effect on it.

    python research/batch_norm_statistics.py runs/RUN

Result: top-1 on the test set is 46.97 % with statistics for every use, 4.84 % with one set.
Table: docs/results.md.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from training import augment
from training.dataset import Dataset, load_dataset
from training.evaluate import evaluate, predict
from training.export import restore
from training.loop import to_device
from training.networks import Classifier, build
from training.networks.resnet import SharedBatchNorm
from training.run import Run

GATHERING_BATCHES = 200  # with momentum 0.1, the first batches no longer count


def main(folder: str) -> None:
    run = Run(Path(folder))
    recipe = run.recipe()
    dataset = load_dataset()
    per_use, state = restore(run, recipe, dataset)
    single = build(recipe.model_copy(update={"batch_norm_statistics": "shared"}), len(dataset.classes))
    weights = {name: value for name, value in per_use.state_dict().items() if ".bn.running" not in name}
    single.load_state_dict(weights, strict=False)

    images, _ = to_device(dataset.train, torch.device("cpu"))
    torch.manual_seed(0)
    single.train()
    batches = augment.batches(images, recipe, torch.Generator().manual_seed(0), epoch=1)
    with torch.no_grad():
        for (batch, _), _ in zip(batches, range(GATHERING_BATCHES), strict=False):
            single(batch)

    print(f"{recipe.name}, epoch {state['epoch']}, 10,000 test images, evaluation mode")
    print("| running statistics | top-1 | loss |\n| --- | --- | --- |")
    for name, classifier in (("for every use", per_use), ("one set", single.eval())):
        report(name, classifier, dataset)
    for module in per_use.modules():
        if isinstance(module, SharedBatchNorm | nn.BatchNorm2d):
            module.train()
    report("of the batch itself", per_use, dataset)


def report(name: str, classifier: Classifier, dataset: Dataset) -> None:
    images, labels = to_device(dataset.test, torch.device("cpu"))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))  # every batch has all classes
    result = evaluate(predict(classifier, images[order]), labels[order])
    print(f"| {name} | {result.top1:.2%} | {result.loss:.3f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
