"""Measure the service over HTTP on a machine with a GPU.

The program starts the service as one process and as several. For each live model, wrk posts 32x32 PNGs over many
connections. The program prints the medians of the rounds, including the start time, and writes them to
benchmarks/results/serving_gpu.md. The table of benchmarks/engines.py has the limits of the engines alone.

    python benchmarks/serving_gpu.py [--workers 1 8] [--rounds 3] [--seconds 2] [--models models] [--data FOLDER]

Needs wrk (`apt-get install wrk`).

No table is kept yet.
"""

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests/helpers"))

from peers.catalog import OURS
from peers.running import Load, Running, adopt, drive
from results import describe_run, keep
from serving import MEDIA_TYPES, PICTURES, PNG, WARMUP_S, engine_of, live, png, request_files

from training.dataset import load_dataset
from training.store import LocalStore

CONNECTIONS = (1, 64, 256)
WRK_THREADS = 4


def loads(running: Running, pictures: list[bytes], seconds: int, folder: Path) -> Iterator[tuple[int, Load]]:
    """Yield each number of connections with the load that a running server answers over them."""
    files = request_files(running, running.model, pictures, MEDIA_TYPES[PNG], folder)
    for connections in CONNECTIONS:
        threads = min(WRK_THREADS, connections)
        drive(running.port, connections, files, WARMUP_S, threads)
        yield connections, drive(running.port, connections, files, seconds, threads)


def main(workers: list[int], rounds: int, seconds: int, models: Path, source: str | None) -> None:
    adopt()
    pictures = [png(image) for image in load_dataset(source).test.images[:PICTURES]]
    store = LocalStore(models)
    measured: dict[tuple[str, str, int, int], list[Load]] = defaultdict(list)
    starts_s: dict[int, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for _ in range(rounds):
            for count in workers:
                for name in store.names():
                    server = replace(OURS, workers=count, device="auto")
                    with Running(server, "torchscript", live(store, name), name, pictures[0], folder) as running:
                        starts_s[count].append(running.start_s)
                        engine = engine_of(running, name)
                        for connections, load in loads(running, pictures, seconds, folder):
                            measured[name, engine, count, connections].append(load)
    lines = [
        "# Over HTTP, with a GPU",
        "",
        f"32x32 PNGs; {describe_run()}; {rounds} rounds of {seconds} s, medians. CPU time is that of all processes.",
        "",
        "| model | engine | processes | connections | requests/s | p50, ms | p99, ms | CPU, ms a request | errors |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for (name, engine, count, connections), each in measured.items():
        rate, p50, p99, cpu = (
            statistics.median(getattr(load, field) for load in each)
            for field in ("requests_per_s", "p50_ms", "p99_ms", "cpu_ms")
        )
        errors = sum(load.errors for load in each)
        lines.append(
            f"| `{name}` | {engine} | {count} | {connections} | {rate:,.0f} | {p50:.2f} | {p99:.2f} | {cpu:.2f} "
            f"| {errors} |"
        )
    starts = (f"{statistics.median(each):.1f} s with {count}" for count, each in starts_s.items())
    lines += ["", f"From the command to the first answer, by the number of processes: {', '.join(starts)}."]
    keep(__file__, lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--data", help="folder of cifar100.npz, or synthetic:N")
    chosen = parser.parse_args()
    main(chosen.workers, chosen.rounds, chosen.seconds, chosen.models, chosen.data)
