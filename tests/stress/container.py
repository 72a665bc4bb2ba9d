"""Build the image, and prove that the service works in it with a read-only root and without privileges.

buildah executes the Dockerfile. podman then runs the image as an operator should: as its own user, with a read-only
root, without capabilities and without a network. Requests inside the container classify a photo, send a large form, and
train, quantize and promote a model. SIGTERM then arrives in the middle of a request.

    python tests/stress/container.py [--torch-index URL] [--extras heif]

The base image is used if the engine has it. Otherwise debootstrap makes a stand-in with the Python of the same release
of Debian. The command needs root, buildah, podman and debootstrap, all packages of Debian. hadolint and docker-compose
check the Dockerfile and the compose files if they are installed, and Prometheus and promtool scrape the service.

Time: two minutes if all layers are in the build cache. The first build also downloads all packages.
Result: the service writes to its volumes only, and SIGTERM lets a request finish (AMD EPYC, 2 cores, 2026-11-29).
Table: results/container.md.
"""

import argparse
import json
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

from processes import list_children
from results import Check, conclude, is_whole
from server import wait_for

ROOT = Path(__file__).parents[2]
IMAGE = "localhost/cifar100-proof"
MIB = 1 << 20
START_S = 180.0
JOB_S = 900.0
STOP_S = 60.0
KEY = secrets.token_hex(16)
LARGEST = 12
"""Number of packages in the table of sizes."""
FOR_GPU = ("nvidia", "triton", "cuda", "torch/lib/*cuda*")
"""Parts of the GPU build of PyTorch that its CPU build does not have."""

JOB = {
    "recipe": "resnet-seed",  # no member of the cascade, which stays the default model
    "overrides": {"width": 8, "epochs": 1, "validation_images": 100, "int8": True},
    "promote": "always",
}
FAULTS = ("Traceback", "Read-only", "read-only", "Permission denied", "not a writable")
"""Texts of a log that report a folder that cannot be written."""

# The programs run in the container. Their input is the photo, and their output one line.
PREDICT = """
import sys
from app.client import Client
with Client("http://127.0.0.1:8000") as client:
    print(client.predict(sys.stdin.buffer.read()).label)
"""
LARGE_FORM = """
import io, sys, httpx, numpy as np
from PIL import Image
pixels, content = np.random.default_rng(0).integers(0, 256, (820, 820, 3), np.uint8), io.BytesIO()
Image.fromarray(pixels).save(content, "PNG", compress_level=1)
answer = httpx.post("http://127.0.0.1:8000/predict", files={"file": content.getvalue()}, timeout=60)
print(answer.status_code, f"{len(content.getvalue()) / 1e6:.1f} MB")
"""
TRAIN = f"""
import httpx, json, time
with httpx.Client(base_url="http://127.0.0.1:8000", headers={{"Authorization": "Bearer {KEY}"}}, timeout=60) as client:
    place = client.post("/train", json={JOB!r}).raise_for_status().headers["location"]
    with client.stream("GET", place + "/events", timeout=None) as events:
        for line in events.iter_lines():
            pass
    job = client.get(place).json()
    output = client.get(place + "/files/output.log").text
    print(json.dumps({{"state": job["state"], "published": job["published"], "files": job["files"], "output": output}}))
"""
HALF_A_BODY = """
import http.client, sys
body = sys.stdin.buffer.read()
connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=60)
connection.putrequest("POST", "/predict")
connection.putheader("Content-Type", "image/jpeg")
connection.putheader("Content-Length", str(len(body)))
connection.endheaders(body[: len(body) // 2])
open("/data/half", "w").close()
import os, time
while not os.path.exists("/data/rest"):
    time.sleep(0.05)
connection.send(body[len(body) // 2 :])
print(connection.getresponse().status)
"""
FACTS = """
import os
status = dict(line.split(":", 1) for line in open("/proc/1/status").read().splitlines())
root = next(line.split()[3] for line in open("/proc/mounts") if line.split()[1] == "/")
print(status["Uid"].split()[0], status["CapEff"].strip(), status["NoNewPrivs"].strip(), root.split(",")[0])
"""
WRITTEN = """
import os
for root in ("/data", "/srv/cifar100/models", "/srv/cifar100/runs", "/tmp", "/dev/shm"):
    found = [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names]
    new = [path for path in found if os.stat(path).st_mtime > os.stat("/proc/1").st_ctime]
    print(root, len(new), sum(os.stat(path).st_size for path in new))
"""


def run(*command: str, stdin: bytes | None = None) -> str:
    """Return the output of a command.

    Raises:
        RuntimeError: The command failed; the message has the end of its output.
    """
    done = subprocess.run(command, input=stdin, capture_output=True, cwd=ROOT, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).decode(errors="replace")
        raise RuntimeError(f"{' '.join(command[:4])} ... exited with status {done.returncode}:\n{said[-3000:]}")
    return done.stdout.decode()


def provide_base(image: str, folder: Path) -> str:
    """Return a description of the base image. If the engine does not have it, import a minimal Debian in its place."""
    if subprocess.run(["podman", "image", "exists", image], check=False).returncode == 0:
        return run("podman", "image", "inspect", "--format={{.Comment}}", image).strip() or "as published"
    tag = re.fullmatch(r"python:(\d+\.\d+)-slim-(\w+)", image)
    if not tag:
        raise RuntimeError(f"the base image {image} is unknown to this script")
    python, release = tag.groups()
    root = folder / "base"
    run("debootstrap", "--variant=minbase", "--include=ca-certificates,python3,python3-venv", release, str(root))
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", root / "etc/ssl/certs/ca-certificates.crt")
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    version = run("chroot", str(root), "python", "--version").split()[1]
    if not version.startswith(f"{python}."):
        raise RuntimeError(f"Debian {release} has Python {version}, the base image {python}")
    description = f"stand-in: Debian {release} with Python {version}"
    with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as archive:
        path = "ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
        imported = ["podman", "import", "--change", path, "--message", description, "-", f"docker.io/library/{image}"]
        subprocess.run(imported, stdin=archive.stdout, capture_output=True, check=True)
    return description


def check_files() -> Iterator[Check]:
    """Check the Dockerfile, the compose files and the configuration of Prometheus with the tools of their makers."""
    compose = ["docker-compose", "--file", "compose.yaml"]
    commands = {
        "Dockerfile": ["hadolint", "Dockerfile"],
        "compose.yaml": [*compose, "config", "--quiet"],
        "compose.yaml with compose.gpu.yaml": [*compose, "--file", "compose.gpu.yaml", "config", "--quiet"],
        "prometheus/compose.yml": ["promtool", "check", "config", "deploy/prometheus/compose.yml"],
        "cifar100.service": ["systemd-analyze", "security", "--offline=yes", "deploy/systemd/cifar100.service"],
    }
    for what, command in commands.items():
        if not shutil.which(command[0]):
            yield Check(f"{what}, by {command[0]}", "not installed", "none")
            continue
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        said = " ".join(done.stderr.split() or done.stdout.split())
        yield Check(
            f"{what}, by {command[0]}", said if done.returncode else "none", "no complaint", not done.returncode
        )


def build(index: str, extras: str) -> Iterator[Check]:
    """Build the image as the Dockerfile says, and report the sizes of its layers and of its largest packages."""
    arguments = {"TORCH_INDEX": index, "EXTRAS": extras, "REVISION": run("git", "rev-parse", "HEAD").strip()}
    options = [f"--build-arg={name}={value}" for name, value in arguments.items()]
    # Docker's image format has the health check.
    engine = ["--layers", "--format=docker", "--isolation=chroot", "--network=host", "--pull-never"]
    run("buildah", "bud", *engine, *options, "--tag", IMAGE, ".")
    history = json.loads(run("podman", "history", "--no-trunc", "--format=json", IMAGE))
    layers = [(layer["size"], describe_layer(layer["CreatedBy"])) for layer in history]
    for size, made in reversed(layers):
        if size > MIB:
            yield Check(f"layer `{made}`", f"{size / MIB:,.0f} MiB")
    root = Path(run("podman", "image", "mount", IMAGE).strip())
    try:
        (packages,) = root.glob("venv/lib/python*/site-packages")
        sizes = {entry.name: measure_bytes(entry) for entry in packages.iterdir()}
        for_gpu = sum(map(measure_bytes, {path for pattern in FOR_GPU for path in packages.glob(pattern)}))
    finally:
        run("podman", "image", "unmount", IMAGE)
    total = sum(size for size, _ in layers)
    yield Check("image, uncompressed", f"{total / MIB:,.0f} MiB")
    yield Check(f"image without {', '.join(FOR_GPU)}", f"{(total - for_gpu) / MIB:,.0f} MiB")
    largest = sorted(sizes.items(), key=lambda item: item[1], reverse=True)[:LARGEST]
    yield Check("largest packages", ", ".join(f"{name} {size / MIB:,.0f} MiB" for name, size in largest))


def describe_layer(created_by: str) -> str:
    """Return the instruction that made a layer, such as "COPY /venv" for buildah's "COPY dir:0a1b... in /venv"."""
    instruction = created_by.removeprefix("/bin/sh -c ").removeprefix("#(nop) ")
    return re.sub(r"\b(?:dir|file|multi):[0-9a-f]+ in ", "", " ".join(instruction.split()))[:60].strip()


def measure_bytes(path: Path) -> int:
    """Return the total size of the files in a folder, or of a file."""
    return sum(each.lstat().st_size for each in (path, *path.rglob("*")) if not each.is_dir())


class Container:
    """A running container of the image, with the restrictions of compose.yaml and without a network."""

    def __init__(self) -> None:
        mounts = ["--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp:size=1g"]
        rights = ["--cap-drop=all", "--security-opt=no-new-privileges", "--network=none"]
        limits = ["--memory=8g", "--pids-limit=1024"]
        settings = [f"--env=CIFAR100_API_KEYS={KEY}", "--env=CIFAR100_DATA=synthetic:4"]
        self.began = time.monotonic()
        self.id = run("podman", "run", "--detach", *mounts, *rights, *limits, *settings, IMAGE).strip()

    def execute(self, program: str, stdin: bytes = b"") -> str:
        """Return the output of a Python program that runs in the container."""
        return run("podman", "exec", "--interactive", self.id, "python", "-c", program, stdin=stdin).strip()

    def is_healthy(self) -> bool:
        """Return whether the health check of the image succeeds."""
        return (
            subprocess.run(["podman", "healthcheck", "run", self.id], capture_output=True, check=False).returncode == 0
        )

    def inspect(self, field: str) -> str:
        """Return a field of the container, such as .State.Pid."""
        return run("podman", "inspect", f"--format={{{{{field}}}}}", self.id).strip()

    def log(self) -> str:
        """Return the log of the service."""
        done = subprocess.run(["podman", "logs", self.id], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr


@contextmanager
def running() -> Iterator[Container]:
    """Start a container, wait until it is healthy, and remove it with its volumes."""
    container = Container()
    try:
        wait_for(container.is_healthy, START_S)
        yield container
    except TimeoutError as error:
        raise RuntimeError(container.log()[-3000:]) from error
    finally:
        run("podman", "rm", "--force", "--volumes", container.id)


def check_service(container: Container, photo: bytes) -> Iterator[Check]:
    """Check the answers and the user of the service in the container."""
    yield Check("time until the health check succeeds", f"{time.monotonic() - container.began:.1f} s")
    facts = container.execute(FACTS)
    wanted = "1000 0000000000000000 1 ro"
    yield Check("user, capabilities, no new privileges, root", facts, wanted, facts == wanted)
    label = container.execute(PREDICT, photo)
    yield Check("prediction of docs/pictures/rocket.jpg", label, "rocket", label == "rocket")
    answer = container.execute(LARGE_FORM)
    yield Check("form with an image that is kept in /tmp", answer, "status 200", answer.startswith("200"))
    job = json.loads(container.execute(TRAIN))
    published = (job["published"] or {}).get("version")
    is_done = job["state"] == "succeeded" and published is not None
    yield Check(
        "training job with int8 form and pictures", f"{job['state']}, version {published}", "succeeded", is_done
    )
    complaints = sorted({text for text in FAULTS if text in job["output"]})
    yield Check("folders that the job could not write", ", ".join(complaints) or "none", "none", not complaints)
    label = container.execute(PREDICT, photo)
    yield Check("prediction after the training job", label, "rocket", label == "rocket")
    for line in container.execute(WRITTEN).splitlines():
        folder, files, size = line.split()
        yield Check(f"written to {folder}", f"{files} files, {int(size) / MIB:.1f} MiB")
    zombies = [child for child in list_children(int(container.inspect(".State.Pid"))) if is_zombie(child)]
    yield Check("zombies of process 1", str(len(zombies)), "0", not zombies)


def is_zombie(process: int) -> bool:
    return "State:\tZ" in Path(f"/proc/{process}/status").read_text()


def check_prometheus(container: Container, folder: Path) -> Iterator[Check]:
    """Run Prometheus with the shipped configuration in the network namespace of the container."""
    if not shutil.which("prometheus"):
        yield Check("scrape by Prometheus", "not installed", "up")
        return
    shipped = ROOT / "deploy" / "prometheus"
    shutil.copytree(shipped, folder / "prometheus")
    configuration = folder / "prometheus" / "compose.yml"
    text = configuration.read_text()
    # The name of the service exists only in a network of compose.
    configuration.write_text(text.replace("cifar100:8000", "127.0.0.1:8000").replace("15s", "1s"))
    inside = ["nsenter", f"--target={container.inspect('.State.Pid')}", "--net"]
    options = [f"--config.file={configuration}", f"--storage.tsdb.path={folder / 'series'}"]
    with (folder / "prometheus.log").open("wb") as log:
        server = subprocess.Popen([*inside, "prometheus", *options], stdout=log, stderr=log)
    try:
        ask = [*inside, "promtool", "query", "instant", "http://127.0.0.1:9090"]

        def scraped() -> str:
            done = subprocess.run([*ask, 'up{job="cifar100"}'], capture_output=True, text=True, check=False)
            return done.stdout if "=> 1" in done.stdout else ""

        wait_for(scraped, START_S, folder / "prometheus.log")
        names = run(*ask, 'count({job="cifar100",__name__=~"cifar100_.*"}) by (__name__)')
        found = len(set(re.findall(r"cifar100_\w+", names)))
        yield Check("scrape by Prometheus", f"up, {found} names of series", "up", found > 0)
    finally:
        server.terminate()
        server.wait()


def check_stop(container: Container, photo: bytes) -> Iterator[Check]:
    """Send SIGTERM while a client has sent half of a body."""
    command = ["podman", "exec", "--interactive", container.id, "python", "-c", HALF_A_BODY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdin
        client.stdin.write(photo)
        client.stdin.close()
        wait_for(lambda: exists(container, "/data/half"), START_S)
        began = time.monotonic()
        run("podman", "kill", "--signal=TERM", container.id)
        wait_for(lambda: not container.is_healthy(), START_S)
        run("podman", "exec", container.id, "touch", "/data/rest")
        assert client.stdout
        status = client.stdout.read().decode().strip()
    yield Check("request that SIGTERM interrupts", f"status {status}", "status 200", status == "200")
    wait_for(lambda: container.inspect(".State.Status") == "exited", STOP_S)
    code = container.inspect(".State.ExitCode")
    took = f"status {code} after {time.monotonic() - began:.1f} s"
    yield Check("exit after SIGTERM as process 1", took, "status 0", code == "0")
    complaints = sorted({text for text in FAULTS if text in container.log()})
    yield Check("faults in the log of the service", ", ".join(complaints) or "none", "none", not complaints)


def exists(container: Container, path: str) -> bool:
    return subprocess.run(["podman", "exec", container.id, "test", "-e", path], check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the image and prove that it works.")
    parser.add_argument("--torch-index", default="https://pypi.org/simple", help="index of the wheels of PyTorch")
    parser.add_argument("--extras", default="heif", help="extras of the package, separated by commas")
    given = parser.parse_args()
    photo = (ROOT / "docs" / "pictures" / "rocket.jpg").read_bytes()
    (base,) = set(re.findall(r"^FROM (python:\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    with tempfile.TemporaryDirectory(prefix="container-") as name:
        folder = Path(name)
        checks = [Check(f"base image {base}", provide_base(base, folder)), *check_files()]
        checks += build(given.torch_index, given.extras)
        with running() as container:
            checks += check_service(container, photo)
            checks += check_prometheus(container, folder)
            checks += check_stop(container, photo)
    ran = f"PyTorch from {given.torch_index}, extras {given.extras or 'none'}."
    return conclude(__file__, ran, checks, whole=is_whole(parser, given))


if __name__ == "__main__":
    sys.exit(main())
