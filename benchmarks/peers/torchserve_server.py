"""A TorchServe server: a handler in a .mar archive, behind its Java front end with dynamic batching.

Requests per second on two cores with 32 connections (TorchScript, OpenVINO) by `CLASSIFIER_WORKERS`: two workers with
one thread 420, 371; one worker with two threads 394, 563.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent


class Handler:
    """The handler that each worker process creates."""

    def initialize(self, _: Any) -> None:
        from classifier import Classifier

        self.classifier = Classifier()

    def handle(self, data: list[dict[str, Any]], _: Any) -> list[Any]:
        from classifier import decode

        return self.classifier([decode(bytes(row.get("body") or row["data"])) for row in data])


def main() -> None:
    from classifier import MAX_BATCH, PORT, WORKERS

    with tempfile.TemporaryDirectory(prefix="torchserve-") as name:
        folder = Path(name)
        (folder / "model.yaml").write_text(
            f"minWorkers: {WORKERS}\nmaxWorkers: {WORKERS}\nbatchSize: {MAX_BATCH}\nmaxBatchDelay: 1\n"
        )
        archive = ["--model-name", "classifier", "--version", "1", "--handler", __file__]
        archive += ["--extra-files", str(HERE / "classifier.py"), "--config-file", str(folder / "model.yaml")]
        subprocess.run([BIN / "torch-model-archiver", *archive, "--export-path", folder], check=True)
        addresses = (("inference", PORT), ("management", 0), ("metrics", 0))
        (folder / "config.properties").write_text(
            "".join(f"{what}_address=http://127.0.0.1:{port or _free_port()}\n" for what, port in addresses)
            + "job_queue_size=1000\nmetrics_mode=log\ndisable_system_metrics=true\n"
        )
        command = [BIN / "torchserve", "--start", "--foreground", "--disable-token-auth", "--model-store", folder]
        command += ["--models", "classifier=classifier.mar", "--ts-config", folder / "config.properties"]
        path = f"{BIN}:{os.environ['PATH']}"
        subprocess.run(command, cwd=folder, env=os.environ | {"PATH": path}, check=True)


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    main()
