"""Run an S3 server on a free port of the loopback interface: moto's, with one request at a time.

One request at a time makes its conditional writes atomic, as those of S3 are. It keeps all objects in memory.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def run_s3(folder: Path) -> Iterator[dict[str, str]]:
    """Run a server.

    Args:
        folder: Folder for its log.

    Yields:
        The environment variables with which clients find it.
    """
    port, log = folder / "port", folder / "s3.log"
    with port.open("w") as output, log.open("w") as errors:
        server = subprocess.Popen([sys.executable, "-c", _SERVER], stdout=output, stderr=errors)
    try:
        wait_for(lambda: port.read_text().strip() or server.poll() is not None, 60, log)
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port.read_text().strip()}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.kill()
        server.wait()


def open_files(location: str) -> tuple[Any, str]:
    """Return the file system of a store and the path of the store in it, without any cache."""
    filesystem, path = fsspec.core.url_to_fs(location, use_listings_cache=False, skip_instance_cache=True)
    return filesystem, path


def make_bucket(name: str) -> None:
    """Create a bucket of the server that the environment names."""
    open_files(f"s3://{name}")[0].mkdir(name)
