"""A LitServe server with its dynamic batching.

Requests per second on two cores with 32 connections (TorchScript, OpenVINO) by `CLASSIFIER_WORKERS`: two workers with
one thread 502, 421; one worker with two threads 409, 579. A wait of 1 ms, the slower queue and a second API server made
no difference beyond the noise.
"""

from typing import Annotated

import litserve
from classifier import MAX_BATCH, PORT, WORKERS, Answer, Classifier, Images, decode
from fastapi import Body


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:  # noqa: ARG002  # LitServe sets the name
        self.classifier = Classifier()

    def decode_request(self, request: Annotated[bytes, Body()]) -> Images:
        return decode(request)

    def batch(self, inputs: list[Images]) -> list[Images]:
        return inputs

    def predict(self, x: list[Images]) -> list[Answer]:
        return self.classifier(x)

    def unbatch(self, output: list[Answer]) -> list[Answer]:
        return output

    def encode_response(self, output: Answer) -> Answer:
        return output


if __name__ == "__main__":
    api = Api(max_batch_size=MAX_BATCH, batch_timeout=0.002)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=WORKERS, fast_queue=True)
    server.run(host="127.0.0.1", port=PORT, log_level="warning", access_log=False, generate_client_file=False)
