"""Run an S3 server on a free port of the loopback interface: moto's, with one request at a time.

One request at a time makes its conditional writes atomic, as those of S3 are. It keeps all objects in memory.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
from server import wait_for

_SERVER = """
from moto.server import create_backend_app
from werkzeug.serving import make_server

server = make_server("127.0.0.1", 0, create_backend_app("s3"), threaded=False)
print(server.port, flush=True)
server.serve_forever()
"""


def is_installed() -> bool:
    return find_spec("moto") is not None and find_spec("s3fs") is not None


@dataclass(frozen=True)
class S3Server:
    """A running server."""

    environment: dict[str, str]
    """The environment variables with which clients find it."""
    process: "subprocess.Popen[bytes]"


@contextmanager
def run_s3(folder: Path) -> Iterator[S3Server]:
    """Run a server. Its log is in the folder."""
    port, log = folder / "port", folder / "s3.log"
    with port.open("w") as output, log.open("w") as errors:
        process = subprocess.Popen([sys.executable, "-c", _SERVER], stdout=output, stderr=errors)
    try:
        wait_for(lambda: port.read_text().strip() or process.poll() is not None, 60, log)
        environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port.read_text().strip()}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        yield S3Server(environment, process)
    finally:
        process.kill()
        process.wait()


def open_files(location: str) -> tuple[Any, str]:
    """Return the file system of a store and the path of the store in it, without any cache."""
    filesystem, path = fsspec.core.url_to_fs(location, use_listings_cache=False, skip_instance_cache=True)
    return filesystem, path


def make_bucket(name: str) -> None:
    """Create a bucket of the server that the environment names."""
    open_files(f"s3://{name}")[0].mkdir(name)
