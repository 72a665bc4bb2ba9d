"""A Triton server through nvidia-pytriton, with Triton's dynamic batching.

The image is one string in the binary form of the inference protocol. A raw body would require one size for all images.

Requests per second on two cores with 32 connections (TorchScript, OpenVINO) by `CLASSIFIER_WORKERS`: two functions with
one thread 550, 416; one function with two threads 445, 594. A delay of 1 or 2 ms made no difference beyond the noise.
"""

import os
import sysconfig

import numpy as np
from classifier import MAX_BATCH, PORT, WORKERS, Classifier, decode
from numpy.typing import NDArray
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


class Service:
    def __init__(self) -> None:
        self.classifier = Classifier()

    @batch
    def __call__(self, image: NDArray[np.object_]) -> dict[str, NDArray[np.generic]]:
        answers = [answer["classes"] for answer in self.classifier([decode(row[0]) for row in image])]
        labels = [[entry["label"].encode() for entry in answer] for answer in answers]
        probabilities = [[entry["probability"] for entry in answer] for answer in answers]
        return {"labels": np.array(labels, np.object_), "probabilities": np.array(probabilities, np.float32)}


if __name__ == "__main__":
    # Triton's Python backend must find this interpreter's libpython before the system's libpython.
    os.environ["LD_LIBRARY_PATH"] = sysconfig.get_config_var("LIBDIR")
    config = TritonConfig(http_address="127.0.0.1", http_port=PORT, allow_grpc=False, allow_metrics=False)
    with Triton(config=config) as triton:
        triton.bind(
            model_name="classifier",
            infer_func=[Service() for _ in range(WORKERS)],
            inputs=[Tensor(name="image", dtype=bytes, shape=(1,))],
            outputs=[
                Tensor(name="labels", dtype=bytes, shape=(5,)),
                Tensor(name="probabilities", dtype=np.float32, shape=(5,)),
            ],
            config=ModelConfig(max_batch_size=MAX_BATCH, batcher=DynamicBatcher(max_queue_delay_microseconds=1000)),
        )
        triton.serve()
