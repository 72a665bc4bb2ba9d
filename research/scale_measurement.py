"""Measure a single node: the costs that `node_model.py` needs, and the rates and latencies that check the model.

The program runs one process of the service on all processors of this machine. It measures these parts alone:

- the time and the CPU time of the engines, by the size of a batch,
- the CPU time of decoding an image,
- the CPU time of the event loop for a request, when requests come alone and when they come together,
- the CPU time of the load generators, because they run on the same processors.

Then it measures whole requests: closed loops with 1, 8 and 32 connections, and open loops with Poisson arrivals at 50 %
and 80 % of the rate of the closed loop with 32 connections. Other processes on the machine spoil a measurement. So a
measurement during which they take more than 5 % of the CPU time is repeated, at most five times, and the one with the
smallest share is kept. The kept figures are medians over the rounds.

    python research/scale_measurement.py [--rounds 3] [--seconds 3] [--data DIR] [--models models]

Needs wrk (`apt-get install wrk`) and CIFAR-100. Linux only.

Time: six minutes if it has the machine for itself.
Result: results/scale_measurement.json, which `scale_simulation.py` reads.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

sys.path.append(str(Path(__file__).parents[1] / "tests/helpers"))
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import numpy as np
import open_loop
from open_loop import Tally
from peers.catalog import OURS
from peers.running import Running, adopt, cpu_ms, drive
from results import describe_run
from serving import JPEG, MEDIA_TYPES, PNG, live, photo, png, request_files

from app.inference.images import encoded
from app.inference.images.encoded import EncodedImage
from app.machine import cpu_count
from app.settings import Settings
from training.dataset import load_dataset
from training.runtimes import selection
from training.store import MODEL, LocalStore

OUTPUT = Path(__file__).parent / "results/scale_measurement.json"
MEMBERS = "resnet", "resnet18"
CASCADE = "cascade"
QUANTILES = 40
SIZES = 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64
CONNECTIONS = 1, 8, 32
LOADS = 0.5, 0.8
OPEN_CONNECTIONS = 200  # one client may not hold many idle connections
PNGS, PHOTOS = 500, 50
LIMITS = Settings().max_image_bytes, Settings().max_image_pixels
ENGINE_S = 0.3
WARMUP_S = 1
MAX_FOREIGN = 0.05  # share of the CPU time that other processes may take during a measurement
ATTEMPTS = 5
MIN_ANSWERED = 0.95

Value = TypeVar("Value")


def measure_undisturbed(measure: Callable[[], Value]) -> tuple[Value, float]:
    """Repeat a measurement until other processes take little CPU time.

    Returns:
        The least disturbed value, and the share of the CPU time that other processes took, 0-1.
    """
    tried: list[tuple[float, Value]] = []
    for _ in range(ATTEMPTS):
        before, own_before, started = _busy_s(), _own_s(), time.perf_counter()
        value = measure()
        seconds = time.perf_counter() - started
        foreign_s = _busy_s() - before - (_own_s() - own_before)
        tried.append((foreign_s / (seconds * cpu_count()), value))
        if tried[-1][0] <= MAX_FOREIGN:
            break
    foreign, value = min(tried, key=lambda each: each[0])
    print(f"{str(value)[:250]} ({foreign:.1%} of the CPU time to other processes, {len(tried)} attempts)", flush=True)
    return value, foreign


def _busy_s() -> float:
    """Return the CPU time of all processes of the machine since it started."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    """Return the CPU time of this process, its ended children and its running descendants."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system + cpu_ms() / 1000


def _ended_children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure_engine(store: LocalStore, model: str) -> dict[str, list[float]]:
    """Return the times of batches by their size.

    Returns:
        The sizes, the mean time and the mean CPU time in milliseconds, and the spread: quantiles of the time divided by
        the mean, of all sizes together.
    """
    engine = selection.load(live(store, model) / MODEL, "cpu", "auto")
    random = np.random.default_rng(0)

    def measure(size: int) -> tuple[float, float, list[float]]:
        batch, times = random.integers(0, 256, (size, 3, 32, 32), np.uint8), list[float]()
        engine(batch)
        cpu_before, end = time.process_time(), time.perf_counter() + ENGINE_S
        while (started := time.perf_counter()) < end:
            engine(batch)
            times.append(time.perf_counter() - started)
        mean_s, cpu_s = statistics.mean(times), (time.process_time() - cpu_before) / len(times)
        return _ms(mean_s), _ms(cpu_s), [seconds / mean_s for seconds in times]

    wall_ms, cpu_ms, ratios = zip(*(measure_undisturbed(partial(measure, size))[0] for size in SIZES), strict=True)
    centers = (np.arange(QUANTILES) + 0.5) / QUANTILES
    spread = np.mean([np.quantile(each, centers) for each in ratios], axis=0)
    return {"sizes": list(SIZES), "wall_ms": list(wall_ms), "cpu_ms": list(cpu_ms), "spread": spread.round(3).tolist()}


def measure_decoding(decode: Callable[[bytes], Any], pictures: Sequence[bytes]) -> float:
    """Return the CPU time of decoding one image in milliseconds, when images are decoded one after the other."""

    decode(pictures[0])

    def measure() -> float:
        started = time.process_time()
        for picture in pictures:
            decode(picture)
        return _ms((time.process_time() - started) / len(pictures))

    return measure_undisturbed(measure)[0]


def decode_small(picture: bytes) -> object:
    """Decode a small image as the service does it with a batch."""
    return encoded.decode(picture, 8 << 10, 64 * 64)


def decode_photo(picture: bytes) -> object:
    """Decode a photo as a decoder thread of the service does it."""
    return EncodedImage(picture, *LIMITS).decode()


@dataclass(frozen=True)
class Case:
    """A load of whole requests, and its measured rate and latencies.

    Attributes:
        connections: Connections of a closed loop; 0 for an open loop.
        offered: Requests per second of an open loop; 0 for a closed loop.
        loop_ms: CPU time of the event loop per request.
        client_ms: CPU time of the load generator per request.
        batch_images: Mean number of images in a batch of the first engine.
        batch_decoding_ms: Mean time of decoding the small images of a batch.
        sent_on: Share of the images of a cascade that its second member computes.
        foreign: Share of the CPU time that other processes of the machine took, 0-1.
    """

    model: str
    picture: str
    connections: int
    offered: float
    rate: float
    p50_ms: float
    p99_ms: float
    loop_ms: float
    client_ms: float
    batch_images: float
    batch_decoding_ms: float
    sent_on: float
    foreign: float = 0.0


class Service:
    """The running service under load.

    Args:
        running: One process of the service.
        pictures: Encoded images, by their kind.
        folder: Folder for request files.
        seconds: Length of a load.
    """

    def __init__(self, running: Running, pictures: dict[str, list[bytes]], folder: Path, seconds: int):
        self._running = running
        self._pictures = pictures
        self._folder = folder
        self._seconds = seconds

    def measure(self, model: str, picture: str, connections: int = 0, offered: float = 0.0) -> Case:
        """Measure one case, see `Case`."""
        requests = request_files(self._running, model, self._pictures[picture], MEDIA_TYPES[picture], self._folder)
        drive(self._running.port, connections or max(CONNECTIONS), requests, WARMUP_S)

        def measure() -> Case:
            before, loop_before = self._metrics(), self._loop_s()
            if connections:
                rate, p50_ms, p99_ms, client_s = self._drive_closed(requests, connections)
            else:
                rate, p50_ms, p99_ms, client_s = self._drive_open(requests, offered)
            count, loop_s = rate * self._seconds, self._loop_s() - loop_before
            change = {key: value - before.get(key, 0.0) for key, value in self._metrics().items()}
            first = MEMBERS[0] if model == CASCADE else model
            batches = change[f'cifar100_batch_images_count{{model="{first}"}}']
            return Case(
                model,
                picture,
                connections,
                offered,
                round(rate, 1),
                round(p50_ms, 3),
                round(p99_ms, 3),
                _ms(loop_s / count),
                _ms(client_s / count),
                round(change[f'cifar100_batch_images_sum{{model="{first}"}}'] / batches, 2),
                _ms(change.get('cifar100_decode_seconds_sum{lane="batch"}', 0.0) / batches),
                round(change.get('cifar100_sent_on_images_total{model="cascade"}', 0.0) / count, 3),
            )

        case, foreign = measure_undisturbed(measure)
        return replace(case, foreign=round(max(0.0, foreign), 3))

    def count_series(self) -> tuple[int, int]:
        """Return the number of series and the number of bytes of `/metrics`."""
        with self._running.client() as http:
            text = http.get("/metrics").text
        return sum(not line.startswith("#") for line in text.splitlines()), len(text)

    def _drive_closed(self, requests: Sequence[Path], connections: int) -> tuple[float, float, float, float]:
        """Return the requests per second, p50 and p99 in milliseconds, and the CPU seconds of the generator."""
        before = _ended_children_s()
        load = drive(self._running.port, connections, requests, self._seconds)
        if load.errors:
            raise RuntimeError(f"{load.errors} errors with {connections} connections")
        return load.requests_per_s, load.p50_ms, load.p99_ms, _ended_children_s() - before

    def _drive_open(self, requests: Sequence[Path], offered: float) -> tuple[float, float, float, float]:
        """Return the same as `_drive_closed`, for Poisson arrivals.

        Raises:
            RuntimeError: The service refuses requests.
        """
        command = [sys.executable, open_loop.__file__, "127.0.0.1", str(self._running.port), *map(str, requests)]
        command += ["--rate", str(offered), "--seconds", str(self._seconds), "--poisson"]
        command += ["--connections", str(OPEN_CONNECTIONS)]
        tally = Tally(**json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        if tally.failed or len(tally.accepted_ms) < MIN_ANSWERED * tally.due:
            raise RuntimeError(
                f"of {tally.due} requests, {len(tally.accepted_ms)} were answered, {tally.failed} failed"
            )
        p50_ms, p99_ms = np.percentile(tally.accepted_ms, [50, 99]).tolist()
        return len(tally.accepted_ms) / self._seconds, p50_ms, p99_ms, tally.cpu_s

    def _loop_s(self) -> float:
        """Return the CPU time of the thread of the event loop, which is the main thread."""
        process = self._running.process.pid
        return int(Path(f"/proc/{process}/task/{process}/schedstat").read_text().split()[0]) / 1e9

    def _metrics(self) -> dict[str, float]:
        with self._running.client() as http:
            lines = [line for line in http.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 4)


def _median(cases: Sequence[Case]) -> dict[str, Any]:
    """Return one case with the medians of the numbers of all rounds."""
    rows = [vars(case) for case in cases]
    return {
        key: value if isinstance(value, str | int) else round(statistics.median(row[key] for row in rows), 4)
        for key, value in rows[0].items()
    }


def measure_cases(service: Service, rounds: int) -> list[dict[str, Any]]:
    """Return the medians of all cases."""
    kinds = [(model, PNG, connections) for model in (*MEMBERS, CASCADE) for connections in CONNECTIONS]
    kinds += [(MEMBERS[0], JPEG, connections) for connections in (min(CONNECTIONS), max(CONNECTIONS))]
    closed = [[service.measure(*kind) for kind in kinds] for _ in range(rounds)]
    medians = [_median(cases) for cases in zip(*closed, strict=True)]
    # The last row of a model has the most connections.
    peaks = {row["model"]: row["rate"] for row in medians if row["picture"] == PNG}
    offered = [(model, load * peak) for model, peak in peaks.items() for load in LOADS]
    opened = [[service.measure(model, PNG, offered=rate) for model, rate in offered] for _ in range(rounds)]
    return medians + [_median(cases) for cases in zip(*opened, strict=True)]


def main(rounds: int, seconds: int, data: str | None, models: Path) -> None:
    adopt()
    store, images = LocalStore(models.resolve()), load_dataset(data).test.images
    pictures = {PNG: [png(image) for image in images[:PNGS]], JPEG: [photo(seed) for seed in range(PHOTOS)]}
    measurement: dict[str, Any] = {
        "run": f"{describe_run()}; {rounds} rounds of {seconds} s, medians",
        "cores": cpu_count(),
        "engines": {model: measure_engine(store, model) for model in MEMBERS},
        "decoding_ms": {
            PNG: measure_decoding(decode_small, pictures[PNG]),
            JPEG: measure_decoding(decode_photo, pictures[JPEG]),
        },
        "model_mib": round(sum(_size(live(store, model)) for model in MEMBERS) / 2**20, 1),
    }
    alone = replace(OURS, name="ours-alone", workers=1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Running(alone, "torchscript", live(store, MEMBERS[0]), MEMBERS[0], pictures[PNG][0], folder) as running:
            service = Service(running, pictures, folder, seconds)
            measurement["start_s"] = round(running.start_s, 1)
            measurement["cases"] = measure_cases(service, rounds)
            measurement["metric_series"], measurement["metrics_bytes"] = service.count_series()
    OUTPUT.write_text(json.dumps(measurement, indent=1) + "\n")


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--data", help="folder of cifar100.npz")
    parser.add_argument("--models", type=Path, default=Path("models"))
    chosen = parser.parse_args()
    main(chosen.rounds, chosen.seconds, chosen.data, chosen.models)
