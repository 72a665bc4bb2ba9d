"""A mosec server with its dynamic batching.

Requests per second on two cores with 32 connections (TorchScript, OpenVINO) by `CLASSIFIER_WORKERS`: two workers with
one thread 480, 505; one worker with two threads 680, 932. On another processor, a wait of 1 ms instead of 2 ms gave 862
instead of 750, and 1775 instead of 1709. Decoding in a separate stage was slower.
"""

import os
import sys

os.environ.setdefault("CLASSIFIER_WORKERS", "1")

from classifier import MAX_BATCH, PORT, WORKERS, Answer, Classifier, decode
from mosec import Server, Worker


class Classify(Worker):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = Classifier()

    def deserialize(self, data: memoryview) -> bytes:
        return bytes(data)

    def forward(self, data: list[bytes]) -> list[Answer]:
        return self.classifier([decode(image) for image in data])


if __name__ == "__main__":
    sys.argv += ["--address", "127.0.0.1", "--port", str(PORT), "--timeout", "30000", "--log-level", "warning"]
    server = Server()
    server.append_worker(Classify, num=WORKERS, max_batch_size=MAX_BATCH, max_wait_time=1)
    server.run()
