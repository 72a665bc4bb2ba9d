"""Asks the service on this machine whether it is ready: `python -m app.server.probe`, the health check of the image.

Input: the environment variables CIFAR100_UDS and CIFAR100_PORT. Output: exit status 0 if /health/ready is 200, else 1.
This module imports the standard library only, so that a probe takes little time.
"""

import os
import socket
import sys
from http.client import HTTPConnection, HTTPException

_TIMEOUT_S = 2.0


def is_ready(port: int, uds: str | None = None) -> bool:
    """Return True if the service that listens on the unix socket, or else on the port of 127.0.0.1, is ready."""
    connection = HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    try:
        if uds:
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(_TIMEOUT_S)
            connection.sock.connect(uds)
        connection.request("GET", "/health/ready")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(not is_ready(int(os.environ.get("CIFAR100_PORT", "8000")), os.environ.get("CIFAR100_UDS")))
