"""A Ray Serve server with its dynamic batching and the options of its guide to high throughput.

Requests per second on two cores with 32 connections (TorchScript, OpenVINO) by `CLASSIFIER_WORKERS`: two replicas with
one thread 628, 453; one replica with two threads 496, 686. On another processor, two replicas gave 252, 262 without
HAProxy instead of 775, 649.
"""

import os
import signal

os.environ.setdefault("RAY_SERVE_ENABLE_HA_PROXY", "1")
os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from classifier import MAX_BATCH, PORT, WORKERS, Answer, Classifier, Images, decode
from ray import serve
from starlette.requests import Request


@serve.deployment(num_replicas=WORKERS, max_ongoing_requests=4 * MAX_BATCH, ray_actor_options={"num_cpus": 0.5})
class Service:
    def __init__(self) -> None:
        self.classifier = Classifier()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.002)
    async def classify(self, images: list[Images]) -> list[Answer]:
        return self.classifier(images)

    async def __call__(self, request: Request) -> Answer:
        return await self.classify(decode(await request.body()))


if __name__ == "__main__":
    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT}, logging_config={"enable_access_log": False})
    serve.run(Service.bind(), route_prefix="/predict")
    signal.pause()
