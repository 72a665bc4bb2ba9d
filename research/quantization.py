"""Measure the cost of int8 quantization for a published version, and the convolutions that cost most.

The program uses the images that the version's recipe holds out of training. It compares the floating-point form with
int8 in all layers, and with int8 in all layers except one convolution, for each given convolution in turn. KL is the
mean divergence of the quantized form's probabilities from those of the floating-point form. It separates forms whose
difference in top-1 is smaller than the noise of these images.

    python research/quantization.py NAME/VERSION [CONVOLUTION ...]

Result: int8 in all layers of resnet18/2 costs 0.85 points of top-1, int8 without convolution 0 costs 0.30.
Table: docs/results.md.
"""

import shutil
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests/helpers"))

from results import describe_run
from throughput import measure_images_per_s
from torch.nn import functional as F

from training.dataset import load_dataset
from training.evaluate import predict
from training.export import CPU, quantization_images
from training.loop import to_device
from training.recipes import parse_recipe
from training.runtimes.openvino import OpenVinoEngine, quantize
from training.store import MODEL, LocalStore

ROUNDS, SECONDS, BATCH = 5, 0.5, 32


def main(version: str, positions: list[int]) -> None:
    store = LocalStore(Path("models"))
    card = store.card(*store.parse(version))
    published = store.verify(card) / MODEL
    samples, judged = quantization_images(parse_recipe(card.recipe), load_dataset())
    images, labels = to_device(judged, CPU)

    print(f"{version}, {len(labels)} images, {describe_run()}")
    print("\n| int8 | top-1 lost | KL | images/s |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(shutil.copy(published, folder))
        network = OpenVinoEngine(model)
        expected = predict(network.compute_logits, images).log_softmax(1)
        print(f"| nothing ({network.precision}) | | | {_rate(network):.0f} |", flush=True)
        for spared in [None, *positions]:
            quantized = OpenVinoEngine(quantize(model, samples, [] if spared is None else [spared]))
            logits = predict(quantized.compute_logits, images).log_softmax(1)
            divergence = F.kl_div(logits, expected, log_target=True, reduction="batchmean").item()
            lost = (expected.argmax(1) == labels).double().mean() - (logits.argmax(1) == labels).double().mean()
            what = "throughout" if spared is None else f"but for convolution {spared}"
            speed = _rate(quantized)
            print(f"| {what} | {100 * lost:.2f} points | {divergence:.4f} | {speed:.0f} |", flush=True)


def _rate(network: OpenVinoEngine) -> float:
    return statistics.median(measure_images_per_s(network, BATCH, SECONDS) for _ in range(ROUNDS))


if __name__ == "__main__":
    main(sys.argv[1], [int(position) for position in sys.argv[2:]])
