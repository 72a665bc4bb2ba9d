"""mosec with its dynamic batching."""

import sys

from classifier import CORES, MAX_BATCH, PORT, Answer, Classifier, decode
from mosec import Server, Worker


class Classify(Worker):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = Classifier(threads=1)

    def deserialize(self, data: memoryview) -> bytes:
        return bytes(data)

    def forward(self, data: list[bytes]) -> list[Answer]:
        return self.classifier([decode(image) for image in data])


if __name__ == "__main__":
    sys.argv += ["--address", "127.0.0.1", "--port", str(PORT), "--timeout", "30000", "--log-level", "warning"]
    server = Server()
    server.append_worker(Classify, num=CORES, max_batch_size=MAX_BATCH, max_wait_time=2)
    server.run()
