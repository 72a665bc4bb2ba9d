"""A BentoML server with its adaptive batching. Its batches are lists, which BentoML accepts only as multipart forms.

Requests per second on two cores with 32 connections (TorchScript, OpenVINO) by `CLASSIFIER_WORKERS`: two workers with
one thread 522, 374; one worker with two threads 347, 393. On another processor, two workers were faster with OpenVINO
too: 628 against 444 to 519. A lower latency limit made no difference.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("CLASSIFIER_WORKERS", os.environ.get("CLASSIFIER_CORES", str(os.cpu_count())))

import bentoml
from classifier import MAX_BATCH, PORT, WORKERS, Answer, Classifier, pixels
from PIL.Image import Image


@bentoml.service(workers=WORKERS, metrics={"enabled": False}, logging={"access": {"enabled": False}})
class Service:
    def __init__(self) -> None:
        self.classifier = Classifier()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=30_000)
    def predict(self, images: list[Image]) -> list[Answer]:
        return self.classifier([pixels(image) for image in images])


if __name__ == "__main__":
    os.environ["BENTOML_DO_NOT_TRACK"] = "True"
    folder = Path(__file__).parent
    address = ["--host", "127.0.0.1", "--port", str(PORT)]
    command = [sys.executable, "-m", "bentoml", "serve", f"{Path(__file__).stem}:Service", *address]
    os.chdir(folder)
    os.execv(sys.executable, command)  # noqa: S606  # the same interpreter
