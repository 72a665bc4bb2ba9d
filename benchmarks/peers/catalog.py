"""Describe the servers of the comparison: their commands, their requests and their answers.

All servers do the same job: the input is an encoded image; the output is JSON with the five most probable classes and
their probabilities.
"""

import json
import os
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.machine import cpu_count

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PYTHON = ROOT / ".venv-peers" / "bin" / "python"

BOUNDARY = "boundary-of-the-form"

Message = tuple[dict[str, str], bytes]
"""Headers and body of a request."""


def raw(image: bytes, media_type: str) -> Message:
    """Return a request with the image as its body."""
    return {"Content-Type": media_type}, image


def form(image: bytes, media_type: str) -> Message:
    """Return a request with the image as a file in a form."""
    disposition = 'Content-Disposition: form-data; name="images"; filename="image"'
    head = f"--{BOUNDARY}\r\n{disposition}\r\nContent-Type: {media_type}\r\n\r\n"
    body = head.encode() + image + f"\r\n--{BOUNDARY}--\r\n".encode()
    return {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}, body


def open_inference(image: bytes, _: str) -> Message:
    """Return a request with the image as a string in the binary form of the Open Inference Protocol."""
    value = struct.pack("<I", len(image)) + image
    tensor = {"name": "image", "shape": [1, 1], "datatype": "BYTES"}
    head = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": len(value)}}]}).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    return headers, head + value


@dataclass(frozen=True)
class Server:
    """One of the servers.

    Attributes:
        name: Name on the command line.
        package: Package whose version requirements.txt pins; empty for our service.
        title: Name in the tables.
        path: Path of the URL; {model} is replaced.
        best: Function from an answer to the label of its most probable class.
        message: Function from an image and its media type to a request.
        workers: Number of processes of our service, 0 for one per processor; None for a peer.
        device: Device on which our service computes.
        cascade: True if our service answers with its cascade where the others serve `resnet18`.
    """

    name: str
    package: str
    title: str
    path: str
    best: Callable[[Any], str]
    message: Callable[[bytes, str], Message] = raw
    workers: int | None = None
    device: str = "cpu"
    cascade: bool = False

    def command(self, port: int, folder: Path, engine: str, runs: Path) -> tuple[list[str], dict[str, str]]:
        """Return the command line and the environment of the server.

        Args:
            folder: Version of a model in a store. A peer serves this version; our service serves the whole store.
            engine: Engine of a peer: torchscript, or OpenVINO in a precision, such as openvino-bf16. Our service
                chooses the engine that suits the processor; with OpenVINO it uses OpenVINO without int8.
            runs: Folder for the jobs of our service.
        """
        if self.workers is not None:
            settings = {"CIFAR100_MODELS": str(folder.parent.parent), "CIFAR100_RUNS": str(runs)}
            settings |= {"CIFAR100_WORKERS": str(self.workers), "CIFAR100_DEVICE": self.device}
            settings |= {"CIFAR100_LOG_LEVEL": "WARNING"}  # no log line per request, as with the peers
            settings |= {"CIFAR100_RUNTIME": "openvino"} if engine.startswith("openvino") else {}
            return [sys.executable, "-m", "app", "--port", str(port)], os.environ | settings
        settings = {"CLASSIFIER_MODEL": str(folder), "CLASSIFIER_ENGINE": engine, "CLASSIFIER_PORT": str(port)}
        settings |= {"CLASSIFIER_CORES": str(cpu_count())}
        return [str(PYTHON), str(HERE / f"{self.name}_server.py")], os.environ | settings

    def request(self, port: int, model: str, image: bytes, media_type: str) -> bytes:
        """Return a complete HTTP request."""
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
CASCADE = replace(OURS, name="ours-cascade", title="ours, `cascade`", path="/predict?model=cascade", cascade=True)
SERVERS = (
    OURS,
    CASCADE,
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
