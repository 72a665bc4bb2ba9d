"""Test a Ray cluster of three nodes: load spreads, a killed node costs no request, and training goes on.

Each node has a network namespace of its own on this machine. The head has the service and no replica; the other two
nodes offer three processors each. The parts:

1. Clients post images to a model with one replica. The cluster must start a second one.
2. One replica on each node computes the images. Both must compute a fair share.
3. SIGKILL ends all processes of a node under load. Requests may take longer, but none may fail. The node then returns.
4. Two workers on two nodes train a network. One of them is killed. The run must finish with every epoch once.
5. The overhead: the rate and the median latency of one server process that computes itself, and of one that uses a
   replica in the cluster, in turn.

    python tests/stress/ray_failures.py [--seconds 20] [--rounds 5]

The command needs root, `ip`, wrk and the extra `ray`.

Time: six minutes.
Table: results/ray_failures.md.
"""

import argparse
import http.client
import itertools
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

import httpx
from processes import cpu_s
from ray_nodes import Node, Nodes, can_make_namespaces, ray_environment
from results import Check, conclude, is_whole
from server import Server, wait_for

from training.run import Run
from training.store import LocalStore

ROOT = Path(__file__).parents[2]
CLIENTS = 8
READY_S = 300.0
IMAGE = ROOT / "app/static/samples/bear.jpg"
REPLICA = "ray::ServeReplica"
RECIPE = ["resnet", "width=8", "epochs=4", "batch_size=64", "validation_images=100", "int8=false"]
SLICE_S = 4


@dataclass(frozen=True)
class Answer:
    """One request: its start on the monotonic clock, its duration and its status, 0 without an answer."""

    started: float
    seconds: float
    status: int


class Load:
    """Clients that post one image after the other over connections that they keep.

    Args:
        url: Address of the service.
        body: Body of a multipart form.
    """

    def __init__(self, url: str, body: bytes, headers: dict[str, str]):
        self.answers: list[Answer] = []
        self._url = httpx.URL(url)
        self._body = body
        self._headers = headers
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._post, daemon=True) for _ in range(CLIENTS)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _post(self) -> None:
        connection = http.client.HTTPConnection(self._url.host, self._url.port, timeout=60)
        while not self._end.is_set():
            started, status = time.monotonic(), 0
            try:
                connection.request("POST", "/predict", self._body, self._headers)
                answer = connection.getresponse()
                answer.read()
                status = answer.status
            except (OSError, http.client.HTTPException):
                connection.close()
            self.answers.append(Answer(started, time.monotonic() - started, status))
        connection.close()


def make_form(image: Path) -> tuple[bytes, dict[str, str]]:
    """Return the body and the headers of a form with one image."""
    request = httpx.Request("POST", "http://x/predict", files={"file": image.read_bytes()})
    return request.read(), {"Content-Type": request.headers["Content-Type"]}


@contextmanager
def serve(folder: Path, node: Node, **settings: str) -> Iterator[Server]:
    """Run the service with the model `resnet` in the namespace of a node."""
    name = f"server-{time.monotonic_ns()}"
    chosen = {"host": node.address, "runtime": "auto"} | settings
    with Server(folder / "models", folder / name, folder / f"{name}.log", tuple(node.command()), **chosen) as server:
        wait_for(lambda: httpx.get(f"{server.address}/health/ready").status_code == 200, READY_S, server.log)
        yield server


def count_failures(answers: list[Answer]) -> int:
    """Return the number of answers that are no 200."""
    return sum(answer.status != 200 for answer in answers)


def check_autoscaling(nodes: Nodes, url: str) -> list[Check]:
    """Measure how long the cluster takes to start a second replica under load."""
    workers = nodes.nodes[1:]
    with Load(url, *make_form(IMAGE)) as load:
        started = time.monotonic()
        wait_for(lambda: all(node.processes(REPLICA) for node in workers), READY_S)
        seconds = time.monotonic() - started
    failed = count_failures(load.answers)
    return [
        Check("time until a second replica was started, on the other node", f"{seconds:.0f} s"),
        Check("failed requests", str(failed), "0", not failed),
    ]


def check_spread(nodes: Nodes, url: str, seconds: float) -> list[Check]:
    """Measure how the load spreads over the nodes with replicas, by the processor time of the replicas."""
    workers = nodes.nodes[1:]

    def measure() -> list[float]:
        return [sum(map(cpu_s, node.processes(REPLICA))) for node in workers]

    before = measure()
    with Load(url, *make_form(IMAGE)) as load:
        time.sleep(seconds)
    used = [after - start for after, start in zip(measure(), before, strict=True)]
    share = min(used) / sum(used)
    rate = len(load.answers) / seconds
    return [
        Check("requests per second, 8 clients", f"{rate:.0f}"),
        Check(
            "share of the busier node in the processor time of the replicas", f"{1 - share:.0%}", "≤ 65%", share > 0.35
        ),
        Check("failed requests", str(count_failures(load.answers)), "0", not count_failures(load.answers)),
    ]


def check_kill(nodes: Nodes, url: str, seconds: float) -> list[Check]:
    """Kill a node under load, wait until its replicas are replaced on the other node, and start it again."""
    lost, left = nodes.nodes[1], nodes.nodes[2]
    with Load(url, *make_form(IMAGE)) as load:
        time.sleep(seconds / 2)
        killed = time.monotonic()
        lost.kill()
        wait_for(lambda: len(left.processes(REPLICA)) == 2, READY_S)
        replaced = time.monotonic() - killed
        time.sleep(seconds / 2)
        lost.start()
        time.sleep(seconds / 2)
    during = [
        each for each in load.answers if killed - 1 <= each.started + each.seconds and each.started < killed + replaced
    ]
    ends = sorted(each.started + each.seconds for each in load.answers if each.status == 200)
    gaps = [later - sooner for sooner, later in itertools.pairwise(ends)]
    quiet = [each.seconds for each in load.answers if each.started + each.seconds < killed]
    failed = count_failures(load.answers)
    return [
        Check("requests in all, and failed", f"{len(load.answers)}, {failed}", "none failed", not failed),
        Check("median latency before the kill", f"{statistics.median(quiet) * 1000:.0f} ms"),
        Check(
            "longest latency after the kill",
            f"{max(each.seconds for each in during):.1f} s",
            "≤ 10 s",
            max(each.seconds for each in during) <= 10,
        ),
        Check("longest time without any answer", f"{max(gaps):.1f} s"),
        Check("time until the lost replica was replaced on the other node", f"{replaced:.1f} s"),
    ]


def check_training(nodes: Nodes, folder: Path) -> list[Check]:
    """Train in two workers on two nodes, and kill one of them."""
    run = Run(folder / "run")
    command = [sys.executable, "-m", "training", "train", *RECIPE, "--data", "synthetic:20", "--no-publish"]
    command += ["--run", str(run.path), "--models", str(folder / "models")]
    command += ["--engine", "ray", "--workers", "2", "--worker-cpus", "2", "--cluster", "auto"]
    with (folder / "training.log").open("wb") as log:
        process = subprocess.Popen(nodes.head.command(*command), stdout=log, stderr=subprocess.STDOUT)
    wait_for(lambda: process.poll() is not None or len(run.epochs()) == 1, READY_S, folder / "training.log")
    places = [node.number for node in nodes.nodes if node.processes("ray::RayTrainWorker")]
    victim = nodes.nodes[2].processes("ray::RayTrainWorker")[0]
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: len(run.epochs()) == 2, READY_S, folder / "training.log")
    resumed = time.monotonic() - killed
    status = process.wait(READY_S)
    epochs = [epoch["epoch"] for epoch in run.epochs()]
    return [
        Check("nodes with a worker", str(len(places)), "2", len(places) == 2),
        Check("exit status", str(status), "0", status == 0),
        Check("epochs", str(epochs), "[1, 2, 3, 4]", epochs == [1, 2, 3, 4]),
        Check("time from the kill of a worker to the end of the next epoch", f"{resumed:.1f} s"),
    ]


def run_wrk(url: str, script: Path, connections: int) -> tuple[float, float]:
    """Return the requests per second and the median latency in milliseconds of one slice of load."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{SLICE_S}s", "--latency", "-s", str(script), f"{url}/predict"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    value, unit = re.findall(r"50%\s+([\d.]+)(us|ms|s)", output)[0]
    assert "Non-2xx" not in output, output
    rate = float(re.findall(r"Requests/sec:\s+([\d.]+)", output)[0])
    return rate, float(value) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[unit]


def check_overhead(urls: dict[str, str], folder: Path, rounds: int) -> list[Check]:
    """Compare a server that computes itself with one that uses the cluster, slices in turn."""
    body, headers = make_form(IMAGE)
    (folder / "body").write_bytes(body)
    script = folder / "post.lua"
    script.write_text(
        f'local file = io.open("{folder / "body"}", "rb")\nwrk.method = "POST"\nwrk.body = file:read("*a")\n'
        f'wrk.headers["Content-Type"] = "{headers["Content-Type"]}"\n'
    )
    checks = []
    for connections in (1, 32):
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in urls}
        for _ in range(rounds + 1):
            for name, url in urls.items():
                measured[name].append(run_wrk(url, script, connections))
        alone, cluster = (slices[1:] for slices in measured.values())  # the first slice warms up
        for what, index, unit in (("requests per second", 0, ""), ("median latency", 1, " ms")):
            one, other = (statistics.median(each[index] for each in slices) for slices in (alone, cluster))
            ratio = statistics.median(b[index] / a[index] for a, b in zip(alone, cluster, strict=True))
            text = f"{one:.3g}{unit} alone, {other:.3g}{unit} with Ray, ratio {ratio:.2f}"
            checks.append(Check(f"{what}, {connections} connections", text))
    return checks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a phase of load")
    parser.add_argument("--rounds", type=int, default=5, help="slices per server in the comparison")
    chosen = parser.parse_args()
    if not can_make_namespaces():
        sys.exit("network namespaces need root and the command ip")
    checks: list[Check] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        models = LocalStore(ROOT / "models")
        shutil.copytree(models.root / "resnet", folder / "models/resnet")
        stack.enter_context(ray_environment())
        nodes = stack.enter_context(Nodes([0, 3, 3]))
        settings: dict[str, Any] = {"cluster": "auto", "cluster_max_replicas": "2", "cluster_cpus": "0.5"}
        settings["deadline_s"] = "60"
        with serve(folder, nodes.head, **settings) as server:
            print("autoscaling", flush=True)
            checks += check_autoscaling(nodes, str(server.address))
        nodes.delete_applications()
        with serve(folder, nodes.head, cluster_min_replicas="2", **settings) as server:
            url = str(server.address)
            print("spread", flush=True)
            checks += check_spread(nodes, url, chosen.seconds)
            print("kill", flush=True)
            checks += check_kill(nodes, url, chosen.seconds)
        nodes.delete_applications()
        print("training", flush=True)
        checks += check_training(nodes, folder)
        print("overhead", flush=True)
        alone = stack.enter_context(serve(folder, nodes.head))
        cluster = stack.enter_context(serve(folder, nodes.head, **settings))
        urls = {"alone": str(alone.address), "cluster": str(cluster.address)}
        checks += check_overhead(urls, folder, chosen.rounds)
    ran = f"Three Ray nodes in network namespaces, {CLIENTS} clients, phases of {chosen.seconds:.0f} s"
    return conclude(__file__, ran, checks, whole=is_whole(parser, chosen))


if __name__ == "__main__":
    sys.exit(main())
