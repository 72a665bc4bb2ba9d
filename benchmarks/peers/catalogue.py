"""The servers that are compared: how each is started, asked and understood.

All do one job: an encoded image in, the five most probable classes with their probabilities out, as JSON.
"""

import json
import os
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.workers import processors

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PYTHON = ROOT / ".venv-peers" / "bin" / "python"

BOUNDARY = "boundary-of-the-form"

Message = tuple[dict[str, str], bytes]
"""Headers and body of a request."""


def raw(image: bytes, media_type: str) -> Message:
    """The image is the body."""
    return {"Content-Type": media_type}, image


def form(image: bytes, media_type: str) -> Message:
    """The image is a file of a form."""
    disposition = 'Content-Disposition: form-data; name="images"; filename="image"'
    head = f"--{BOUNDARY}\r\n{disposition}\r\nContent-Type: {media_type}\r\n\r\n"
    body = head.encode() + image + f"\r\n--{BOUNDARY}--\r\n".encode()
    return {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}, body


def open_inference(image: bytes, _: str) -> Message:
    """The image is a string in the binary form of the Open Inference Protocol."""
    value = struct.pack("<I", len(image)) + image
    tensor = {"name": "image", "shape": [1, 1], "datatype": "BYTES"}
    head = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": len(value)}}]}).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    return headers, head + value


@dataclass(frozen=True)
class Server:
    """One of the servers.

    Attributes:
        name: chooses it on the command line.
        package: whose version its requirements pin; empty for ours.
        title: its name in tables.
        path: of its URL; {model} is replaced.
        message: makes a request of an image and its media type.
        best: the label of the most probable class in an answer.
        workers: of ours: how many processes serve, 0 is one for each processor; None for a peer.
        device: of ours: where it computes.
    """

    name: str
    package: str
    title: str
    path: str
    best: Callable[[Any], str]
    message: Callable[[bytes, str], Message] = raw
    workers: int | None = None
    device: str = "cpu"

    def command(self, port: int, folder: Path, engine: str, runs: Path) -> tuple[list[str], dict[str, str]]:
        """Command line and environment of the server.

        Args:
            folder: the version of a model in a store, which a peer serves; ours serves the whole store.
            engine: that a peer uses: torchscript, or OpenVINO in a precision, such as openvino-bf16. Ours uses what
                suits the processor, or with OpenVINO this but no int8.
            runs: where ours may keep jobs.
        """
        if self.workers is not None:
            settings = {"CIFAR100_MODELS": str(folder.parent.parent), "CIFAR100_RUNS": str(runs)}
            settings |= {"CIFAR100_WORKERS": str(self.workers), "CIFAR100_DEVICE": self.device}
            settings |= {"CIFAR100_LOG_LEVEL": "WARNING"}  # no line for every request, as with the peers
            settings |= {"CIFAR100_RUNTIME": "openvino"} if engine.startswith("openvino") else {}
            return [sys.executable, "-m", "app", "--port", str(port)], os.environ | settings
        settings = {"CLASSIFIER_MODEL": str(folder), "CLASSIFIER_ENGINE": engine, "CLASSIFIER_PORT": str(port)}
        settings |= {"CLASSIFIER_CORES": str(processors())}
        return [str(PYTHON), str(HERE / f"{self.name}_server.py")], os.environ | settings

    def request(self, port: int, model: str, image: bytes, media_type: str) -> bytes:
        """A whole HTTP request."""
        headers, body = self.message(image, media_type)
        headers = {"Host": f"127.0.0.1:{port}", **headers, "Content-Length": str(len(body))}
        lines = [
            f"POST {self.path.format(model=model)} HTTP/1.1",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        return "\r\n".join([*lines, "", ""]).encode() + body


def _first_class(answer: Any) -> str:
    return str(answer["classes"][0]["label"])


def _first_prediction(answer: Any) -> str:
    return _first_class(answer["predictions"][0])


OURS = Server("ours", "", "**ours**", "/predict?model={model}", _first_prediction, workers=0)
SERVERS = (
    OURS,
    replace(OURS, name="ours-alone", title="ours as one process", workers=1),
    Server("fastapi", "fastapi", "plain FastAPI", "/predict", _first_class),
    Server("litserve", "litserve", "LitServe", "/predict", _first_class),
    Server("mosec", "mosec", "mosec", "/inference", _first_class),
    Server("ray", "ray[serve]", "Ray Serve", "/predict", _first_class),
    Server("bentoml", "bentoml", "BentoML", "/predict", lambda answer: _first_class(answer[0]), form),
    Server("torchserve", "torchserve", "TorchServe", "/predictions/classifier", _first_class),
    Server(
        "triton",
        "nvidia-pytriton",
        "Triton (pytriton)",
        "/v2/models/classifier/infer",
        lambda answer: str(next(output for output in answer["outputs"] if output["name"] == "labels")["data"][0]),
        open_inference,
    ),
)
