"""Run a real nginx in front of the service, on a free port of the loopback interface."""

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server import wait_for

_CONFIGURATION = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
{servers}
}}
"""

_SERVER = """
map $http_upgrade $connection_upgrade {{ default upgrade; '' close; }}
server {{
    listen 127.0.0.1:{port} backlog=2048;
    client_max_body_size 64m;
    location {location} {{
        proxy_pass {upstream};
        proxy_http_version 1.1;
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection $connection_upgrade;
        proxy_set_header Host $http_host;
        proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
        {more}
    }}
}}
"""


def is_installed() -> bool:
    return shutil.which("nginx") is not None


@contextmanager
def run_nginx(folder: Path, upstream: str, more: str = "", location: str = "/") -> Iterator[str]:
    """Run an nginx that forwards requests, with the usual directives for WebSockets and X-Forwarded-For.

    Args:
        folder: Folder for the files of nginx.
        upstream: URL of the service, such as http://127.0.0.1:8000 or http://unix:/run/cifar100.sock. If it has a path,
            nginx replaces the location by this path. After a unix socket a colon precedes the path.
        more: Further directives for the location.
        location: Path prefix of the requests that nginx forwards.

    Yields:
        The URL of the nginx.
    """
    port = find_free_port()
    with run_servers(folder, _SERVER.format(port=port, upstream=upstream, more=more, location=location), port):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def run_servers(folder: Path, servers: str, port: int) -> Iterator[None]:
    """Run an nginx with these server blocks. Wait until it answers on the port.

    Args:
        folder: Folder for the files of nginx.
        servers: Directives of the http block, such as a file of /etc/nginx/conf.d.
        port: A port of 127.0.0.1 on which a server listens.
    """
    configuration = folder / "nginx.conf"
    configuration.write_text(_CONFIGURATION.format(folder=folder, servers=servers))
    command = [shutil.which("nginx") or "nginx", "-c", str(configuration), "-e", str(folder / "error.log")]
    process = subprocess.Popen(command)
    try:
        wait_for(lambda: _answers(port), 20, folder / "error.log")
        yield
    finally:
        process.terminate()
        process.wait()


def find_free_port() -> int:
    """Return a port of 127.0.0.1 on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def parse_address(url: str) -> tuple[str, int]:
    """Return the host and port of a URL."""
    host, port = re.findall(r"//([^:/]+):(\d+)", url)[0]
    return host, int(port)
