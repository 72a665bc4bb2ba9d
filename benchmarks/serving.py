"""Compare our service with its peers: requests per second, latency, CPU, memory and start time, at the same accuracy.

The program starts each server in turn, requests the top-1 of some images, drives the server with wrk in each scenario,
and stops it. Two servers never run at once. A server whose answers differ from TorchScript's in float32 is left out of
the comparison. A round visits each server once; the tables show medians over the rounds. Peers run the same `model.pt`
twice: with TorchScript, as their documentation shows, and with OpenVINO in the precision that our service uses without
int8. In the second case the serving path is the only difference. If the store has a live cascade that is at least as
accurate on the test set as `resnet18`, our service also answers with it where the others serve `resnet18`. Finally the
program overloads our service with requests that leave on schedule, and measures it during training. It prints the
tables and, if all servers took part, writes them to benchmarks/results/serving.md.

    python benchmarks/serving.py [--servers ours mosec ...] [--rounds 3] [--seconds 3] [--models models]
        [--image-size 224]

Needs wrk (`apt-get install wrk`) and, for the peers, `.venv-peers`; `make serving` makes that first.

Time: forty minutes.
Result: over 32 connections the service answers 2.21 times as many requests for small images as the best peer (AMD
EPYC, 2 cores, 2026-11-26).
Table: results/serving.md, results/serving_224.md (`--image-size 224`).
"""

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests/helpers"))

import httpx
import numpy as np
import open_loop
import torch
from numpy.typing import NDArray
from open_loop import Tally
from peers.catalog import CASCADE, OURS, ROOT, SERVERS, Server
from peers.catalog import HERE as PEERS
from peers.running import Load, Running, adopt, drive, resident_mib
from PIL import Image, ImageDraw
from results import Check, describe_run, format_table, keep
from server import wait_for
from throughput import measure_images_per_s

from app.machine import cpu_affinity
from app.settings import Settings
from training.cascade import NAME
from training.dataset import Dataset, load_dataset
from training.export import quantization_images
from training.networks import build
from training.recipes import parse_recipe
from training.runtimes import selection, torchscript
from training.runtimes.openvino import quantize
from training.store import MODEL, LocalStore

ENGINES = {
    "torchscript": "The peers with TorchScript, as their documentation shows, ours as it comes; none logs requests",
    "openvino": "All with the same engine: `model.pt` in OpenVINO, in one precision",
}
SHIPPED = "torchscript"
PICTURES = 50  # distinct, so that no cache helps
PNGS = 500  # enough that a cascade sends on about its usual share
CHECKED = {"resnet": 1000, "resnet18": 200}  # number of images whose top-1 is compared
SAME = 0.95  # smallest share of images with TorchScript's top-1
WARMUP_S = 1
OVERLOAD = 5.0
OVERLOAD_S = 10.0  # long enough that requests still waiting at the end matter little
TRAINING = {"recipe": "resnet", "overrides": {"epochs": 100}, "promote": "never"}
TRAINING_STARTS_S = 120.0
BESIDE_S = 6  # length of each load during training; a job reports its progress every five seconds
FAILURES = (
    *(RuntimeError, OSError, subprocess.SubprocessError, httpx.HTTPError),
    *(LookupError, TypeError, ValueError),  # an answer that cannot be parsed
)


@dataclass(frozen=True)
class Scenario:
    """A load: the model, the kind of picture and the number of connections."""

    model: str
    picture: str
    connections: int

    def __str__(self) -> str:
        many = "connections" if self.connections > 1 else "connection"
        return f"`{self.model}`, {self.picture}, {self.connections} {many}"


PNG, JPEG = "32x32 PNG", "500x375 JPEG"
MEDIA_TYPES = {PNG: "image/png", JPEG: "image/jpeg"}
PEAK = Scenario("resnet", PNG, 32)
SCENARIOS = (
    Scenario("resnet", PNG, 1),
    PEAK,
    Scenario("resnet", JPEG, 32),
    Scenario("resnet18", PNG, 8),
    Scenario("resnet18", PNG, 32),
)
REPLACED = "resnet18"
"""Model whose place a cascade takes."""


@dataclass
class Measured:
    """The measurements of a server with one engine over all rounds."""

    loads: dict[Scenario, list[Load]] = field(default_factory=lambda: defaultdict(list))
    start_s: list[float] = field(default_factory=list)
    """Seconds from the command to the first answer, with the first model."""
    memory_mib: list[float] = field(default_factory=list)
    """Memory of all processes after the load; shared pages count once."""
    engines: dict[str, str] = field(default_factory=dict)
    """Engine that our service chose, by model."""
    agreement: dict[str, float] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)
    error: str = ""

    def median(self, scenario: Scenario, of: Callable[[Load], float]) -> float:
        return statistics.median(of(load) for load in self.loads[scenario])


def png(image: NDArray[np.uint8]) -> bytes:
    """Encode an RGB image [H, W, 3] as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def photo(seed: int) -> bytes:
    """Return a 500x375 JPEG of quality 90 that is as hard to decode as a photo.

    It has 1/f noise, as natural images have, and some objects.
    """
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500)[None, :])
    frequency[0, 0] = np.inf
    common, *own = (
        np.fft.irfft2(np.fft.rfft2(random.normal(size=(375, 500))) / frequency, (375, 500)) for _ in range(4)
    )
    noise = np.stack([common + 0.3 * channel for channel in own], -1)
    image = Image.fromarray((128 + 45 * noise / noise.std()).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, width, height = random.uniform((0, 0, 20, 20), (450, 330, 200, 150))
        colour = tuple(int(value) for value in random.integers(0, 256, 3))
        shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
        shape((x, y, x + width, y + height), fill=colour)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def at_size(store: LocalStore, folder: Path, size: int, dataset: Dataset) -> tuple[LocalStore, str]:
    """Export the live `resnet18` again for images upsampled to another size.

    The exported model is as fast as one trained at that size. It has an int8 form; only its speed is meaningful, its
    accuracy is unknown.

    Returns:
        A store with that model, and a note about it for the report.
    """
    card = store.card("resnet18", store.live("resnet18") or 0)
    resized = parse_recipe(card.recipe).from_scratch.model_copy(update={"image_size": size})
    classifier = build(resized, len(card.classes)).eval()
    classifier.load_state_dict(torchscript.load_weights(live(store, "resnet18") / MODEL))
    samples, _ = quantization_images(resized, dataset)
    copy = LocalStore(folder / "models")
    with copy.draft("resnet18") as draft:
        torchscript.save(classifier, draft / MODEL)
        quantize(draft / MODEL, samples, float_layers=[0])
        copy.promote("resnet18", copy.publish(draft, card).version)
    engine = selection.load(live(copy, "resnet18") / MODEL, "cpu", "auto")
    rate = statistics.median(measure_images_per_s(engine, 32, 2) for _ in range(3))
    return copy, (
        f"resnet18/1 is here version {card.version} with images upsampled to {size} pixels, not "
        f"{card.recipe['image_size']}. Its engine alone ({engine.name}) computes {rate:.0f} images a second in batches "
        "of 32."
    )


def live(store: LocalStore, model: str) -> Path:
    """Return the folder of a model's live version."""
    return store.folder(model, store.live(model) or 0).resolve()


def reference(store: LocalStore, model: str, images: NDArray[np.uint8]) -> list[str]:
    """Return the labels that TorchScript gives images [N, 32, 32, 3] in float32."""
    folder = live(store, model)
    module = torchscript.load(folder / MODEL)
    with torch.inference_mode():
        batches = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().split(50)
        best = torch.cat([module(batch).argmax(1) for batch in batches])
    classes = store.card(model, int(folder.name)).classes
    return [classes[number] for number in best.tolist()]


@dataclass(frozen=True)
class Checks:
    """Images as PNGs, with TorchScript's top-1 and the true label of each."""

    images: list[bytes]
    expected: list[str]
    truth: list[str]

    def of(self, running: Running) -> tuple[float, float]:
        """Return the server's agreement with TorchScript in float32, and its accuracy."""
        labels = running.labels(self.images)
        return _share(labels, self.expected), _share(labels, self.truth)


def _share(labels: Sequence[str], right: Sequence[str]) -> float:
    return sum(one == other for one, other in zip(labels, right, strict=True)) / len(right)


class Benchmark:
    """The measurements of all servers.

    Args:
        store: LocalStore with a live version of the models.
        dataset: Data set whose test images are sent.
        seconds: Length of every load.
        folder: Folder for logs and requests.
        models: Names of the models under test.
    """

    def __init__(self, store: LocalStore, dataset: Dataset, seconds: int, folder: Path, models: Sequence[str]):
        self.store = store
        self.seconds = seconds
        self.folder = folder
        self.measured: dict[tuple[Server, str], Measured] = defaultdict(Measured)
        images = dataset.test.images
        self.pictures = {
            PNG: [png(image) for image in images[:PNGS]],
            JPEG: [photo(seed) for seed in range(PICTURES)],
        }
        self.checks = {
            model: Checks(
                [png(image) for image in images[:count]],
                reference(store, model, images[:count]),
                [dataset.classes[label] for label in dataset.test.labels[:count]],
            )
            for model, count in CHECKED.items()
            if model in models
        }
        self.scenarios = [scenario for scenario in SCENARIOS if scenario.model in models]
        self.without_int8 = {
            model: selection.load(live(store, model) / MODEL, "cpu", "openvino").name for model in self.checks
        }

    def visit(self, server: Server, engine: str) -> None:
        """Start a server for each model and drive it in every scenario.

        A failure is recorded and ends the server's visits.
        """
        models = [REPLACED] if server.cascade else list(self.checks)
        if server.cascade and (engine != SHIPPED or REPLACED not in self.checks):
            return
        measured = self.measured[server, engine]
        first, *_ = self.checks
        for model in models:
            if measured.error:
                return
            try:
                with self._running(server, engine, model) as running:
                    if model not in measured.agreement:
                        measured.agreement[model], measured.accuracy[model] = self.checks[model].of(running)
                        if not server.cascade and measured.agreement[model] < SAME:
                            raise RuntimeError(f"only {measured.agreement[model]:.1%} of its answers are TorchScript's")
                    if server.workers is not None:
                        measured.engines[model] = engine_of(running, NAME if server.cascade else model)
                    for scenario in self.scenarios:
                        if scenario.model == model:
                            load = self._drive(running, scenario)
                            measured.loads[scenario].append(load)
                            _progress(f"{server.name} {engine}: {scenario}: {load.requests_per_s:.0f} req/s")
                    if model == first:
                        measured.start_s.append(running.start_s)
                        measured.memory_mib.append(resident_mib())
            except FAILURES as error:
                measured.error = " ".join(str(error).split())
                _progress(f"{server.name} {engine}: {error}")

    def overload(self, rounds: int) -> list[Check]:
        """Send our service five times the requests that it can answer, on schedule.

        The service has one processor and the load generator has the others, so that neither slows the other down.
        """
        mine, *others = sorted(os.sched_getaffinity(0))
        with cpu_affinity({mine}):
            overloaded = self._running(OURS, SHIPPED, PEAK.model)
        with overloaded as running, cpu_affinity(set(others) or {mine}):
            peaks, tallies = zip(*(self._overloaded(running) for _ in range(rounds)), strict=True)
        goodput = sorted(tally.on_time / tally.seconds / peak for tally, peak in zip(tallies, peaks, strict=True))
        accepted, refused = [tally.accepted_ms for tally in tallies], [tally.refused_ms for tally in tallies]
        deadline_ms = 1000 * Settings().deadline_s
        due = statistics.median(tally.due / tally.seconds for tally in tallies)
        share = f"{statistics.median(goodput):.0%} ({goodput[0]:.0%}-{goodput[-1]:.0%})"
        refusals, advised = sum(map(len, refused)), sum(tally.advised for tally in tallies)
        unsent, failed = sum(tally.unsent for tally in tallies), sum(tally.failed for tally in tallies)
        in_time, soon = _percentile(accepted, 99) < deadline_ms, _percentile(refused, 99) < 50
        return [
            Check("requests due", f"{due:,.0f}/s, {OVERLOAD:g} times the peak of {statistics.median(peaks):,.0f}/s"),
            Check("not sent, as all connections of the generator were waiting", f"{unsent:,}"),
            Check("answered 200 within the time, of the peak", share, ">= 90 %", statistics.median(goodput) >= 0.9),
            Check("accepted: p50, p99, slowest", _latencies(accepted), f"< {deadline_ms:,.0f} ms", in_time),
            Check("refused (503): p50, p99, slowest", _latencies(refused), "p99 < 50 ms", soon),
            Check("refusals with Retry-After", f"{advised:,} of {refusals:,}", "all", advised == refusals),
            Check("other answers, broken connections", f"{failed}", "0", failed == 0),
        ]

    def _overloaded(self, running: Running) -> tuple[float, Tally]:
        """Return the peak in requests per second, and the outcomes of `OVERLOAD` times as many."""
        peak = self._drive(running, PEAK).requests_per_s
        program = [sys.executable, open_loop.__file__, "127.0.0.1", str(running.port)]
        program += [str(path) for path in self._requests(running, PEAK)]
        program += ["--rate", str(OVERLOAD * peak), "--seconds", str(OVERLOAD_S)]
        told = subprocess.run(program, check=True, capture_output=True, text=True).stdout
        return peak, Tally(**json.loads(told))

    def beside_training(self) -> list[Check]:
        """Drive our service in every scenario, first without and then with a training job on the same processors."""
        with self._running(OURS, SHIPPED, PEAK.model) as running, running.client() as http:
            quiet = [self._drive(running, scenario, BESIDE_S) for scenario in self.scenarios]
            job = f"/train/{http.post('/train', json=TRAINING).raise_for_status().json()['id']}"
            started = wait_for(lambda: _first_steps(http.get(job).json()), TRAINING_STARTS_S)
            busy = [self._drive(running, scenario, BESIDE_S) for scenario in self.scenarios]
            trained = http.delete(job).raise_for_status().json()
        steps = trained["progress"]["step"] - started  # all steps are in the first epoch
        errors = sum(load.errors for load in quiet + busy)
        checks = []
        for scenario, before, beside in zip(self.scenarios, quiet, busy, strict=True):
            growth = beside.p99_ms / max(before.p99_ms, 1e-3)
            told = f"{before.p99_ms:.1f} to {beside.p99_ms:.1f} ms, {growth:.1f} times; "
            told += f"{before.requests_per_s:,.0f} to {beside.requests_per_s:,.0f} req/s"
            checks.append(Check(f"p99, {scenario}", told, "<= 3 times", growth <= 3))
        return [
            *checks,
            Check("errors", str(errors), "0", errors == 0),
            Check("training steps, meanwhile", str(steps), "> 0", steps > 0),
        ]

    def _drive(self, running: Running, scenario: Scenario, seconds: int | None = None) -> Load:
        requests = self._requests(running, scenario)
        drive(running.port, scenario.connections, requests, WARMUP_S)
        return drive(running.port, scenario.connections, requests, seconds or self.seconds)

    def _running(self, server: Server, engine: str, model: str) -> Running:
        if engine != SHIPPED:
            engine = self.without_int8[model]
        return Running(server, engine, live(self.store, model), model, self.pictures[PNG][0], self.folder)

    def _requests(self, running: Running, scenario: Scenario) -> list[Path]:
        pictures, media_type = self.pictures[scenario.picture], MEDIA_TYPES[scenario.picture]
        return request_files(running, scenario.model, pictures, media_type, self.folder)


def request_files(running: Running, model: str, pictures: Sequence[bytes], media_type: str, folder: Path) -> list[Path]:
    """Write one file per picture with a complete request to a model."""
    paths = []
    for number, picture in enumerate(pictures):
        path = folder / f"request-{number}"
        path.write_bytes(running.server.request(running.port, model, picture, media_type))
        paths.append(path)
    return paths


def has_cascade(store: LocalStore) -> bool:
    """Return whether a cascade is live that is at least as accurate on the test set as the live `resnet18`."""
    version, replaced = store.live(NAME), store.live(REPLACED)
    if version is None or replaced is None:
        return False
    return store.card(NAME, version).test.top1 >= store.card(REPLACED, replaced).test.top1


def engine_of(running: Running, model: str) -> str:
    """Return the engine that our service uses for a model."""
    with running.client() as http:
        return str(http.get("/health").json()["models"][model]["engine"])


def _first_steps(job: dict[str, Any]) -> int:
    """Return the number of steps that a training job has done, or 0 before its first progress report."""
    progress = job["progress"]
    return progress["step"] if progress and progress["event"] == "tick" else 0


def unless_it_fails(measure: Callable[[], list[Check]]) -> list[Check]:
    """Return the measurements, or one failed check with the reason why there are none."""
    try:
        return measure()
    except FAILURES as error:
        return [Check("not measured", " ".join(str(error).split()), met=False)]


def report(benchmark: Benchmark, rounds: int, checks: dict[str, list[Check]], notes: str) -> list[str]:
    """Return the whole report as lines of markdown.

    Args:
        checks: Further tables by title.
    """
    versions = dict(line.split("==") for line in (PEERS / "requirements.txt").read_text().splitlines() if "==" in line)
    names = [*benchmark.checks, *([NAME] if (CASCADE, SHIPPED) in benchmark.measured else [])]
    served = " and ".join(f"{model}/{live(benchmark.store, model).name}" for model in names)
    lines = [
        "# Our service and its peers",
        "",
        f"{describe_run()}; {served}; {rounds} rounds of {benchmark.seconds} s, medians, and least to most. "
        f"PyTorch {torch.__version__}, OpenVINO {version('openvino')}. {notes}".rstrip(),
    ]
    for engine, title in ENGINES.items():
        rows = {
            server: benchmark.measured[server, engine] for server in SERVERS if (server, engine) in benchmark.measured
        }
        lines += ["", f"## {title}"]
        for scenario in benchmark.scenarios:
            lines += ["", f"### {scenario}", "", *_loads(rows, scenario)]
        lines += ["", "### Start, memory, accuracy", "", *_servers(rows, versions, list(benchmark.checks))]
    for title, rows_of_checks in checks.items():
        lines += ["", f"## {title}", "", *format_table(rows_of_checks)]
    return lines


def _loads(rows: dict[Server, Measured], scenario: Scenario) -> list[str]:
    """Return the table of a scenario, and the lead of our service over the best peer."""
    lines = [
        "| server | req/s | p50 ms | p99 ms | CPU ms per request | errors |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    rates, medians = {}, {}
    for server, measured in rows.items():
        if server.cascade and scenario.model != REPLACED:
            continue
        if not measured.loads[scenario]:
            lines.append(f"| {server.title} | {_cell(measured.error or 'not measured')} | | | | |")
            continue
        rates[server] = measured.median(scenario, lambda load: load.requests_per_s)
        medians[server] = measured.median(scenario, lambda load: load.p50_ms)
        p99 = measured.median(scenario, lambda load: load.p99_ms)
        cpu = measured.median(scenario, lambda load: load.cpu_ms)
        errors = sum(load.errors for load in measured.loads[scenario])
        every = sorted(load.requests_per_s for load in measured.loads[scenario])
        rate = f"{rates[server]:.0f} ({every[0]:.0f}-{every[-1]:.0f})"
        lines.append(f"| {server.title} | {rate} | {medians[server]:.1f} | {p99:.1f} | {cpu:.2f} | {errors} |")
    peers = [server for server in rates if server.workers is None]
    for ours, name in ((OURS, "Ours"), (CASCADE, "Our `cascade`")):
        if ours in rates and peers:
            most = max(peers, key=rates.__getitem__)
            soonest = min(peers, key=medians.__getitem__)
            ahead, wait = rates[ours] / rates[most], medians[ours] / medians[soonest]
            lines += [
                "",
                f"{name}, with {rows[ours].engines[scenario.model]}, answers **{ahead:.2f} times** as many requests as "
                f"the best peer, {most.title}; its p50 is **{wait:.2f}** of that of the quickest, {soonest.title}.",
            ]
    if OURS in rates and CASCADE in rates:
        lines += ["", f"Our `cascade` answers **{rates[CASCADE] / rates[OURS]:.2f} times** as many as `{REPLACED}`."]
    return lines


def _servers(rows: dict[Server, Measured], versions: dict[str, str], models: list[str]) -> list[str]:
    heads = [f"{what}, `{model}`" for model in models for what in ("top-1 as TorchScript float32", "accuracy")]
    lines = [
        f"| server | version | start s | memory MiB | {' | '.join(heads)} |",
        "| --- | --- " + "| --: " * (2 + len(heads)) + "|",
    ]
    failed = [f"{server.title} failed: {_cell(measured.error)}." for server, measured in rows.items() if measured.error]
    for server, measured in rows.items():
        start = f"{statistics.median(measured.start_s):.1f}" if measured.start_s else ""
        memory = f"{statistics.median(measured.memory_mib):.0f}" if measured.memory_mib else ""
        shares = [
            f"{share[model]:.1%}" if model in share else ""
            for model in models
            for share in (measured.agreement, measured.accuracy)
        ]
        lines.append(
            f"| {server.title} | {versions.get(server.package, '')} | {start} | {memory} | {' | '.join(shares)} |"
        )
    return [*lines, "", *failed] if failed else lines


def _cell(text: str) -> str:
    return text.replace(str(ROOT), ".").replace("|", "/")


def _percentile(rounds: Sequence[Sequence[float]], percent: int) -> float:
    """Return the median over the rounds of each round's percentile."""
    return statistics.median(float(np.percentile(values, percent)) if values else 0.0 for values in rounds)


def _latencies(rounds: Sequence[Sequence[float]]) -> str:
    told = ", ".join(f"{_percentile(rounds, percent):.0f}" for percent in (50, 99, 100))
    return f"{told} ms ({sum(map(len, rounds)):,})"


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(names: Sequence[str], rounds: int, seconds: int, models: Path, image_size: int | None) -> None:
    if not shutil.which("wrk"):
        sys.exit("wrk is missing: apt-get install wrk")
    adopt()
    chosen = [server for server in SERVERS if server.name in names]
    with tempfile.TemporaryDirectory(prefix="serving-") as name:
        store, dataset, notes = LocalStore(models.resolve()), load_dataset(), ""
        if image_size:
            store, notes = at_size(store, Path(name), image_size, dataset)
        if not has_cascade(store):
            chosen = [server for server in chosen if not server.cascade]
        benchmark = Benchmark(store, dataset, seconds, Path(name), ["resnet18"] if image_size else list(CHECKED))
        for _ in range(rounds):
            for server in chosen:
                for engine in ENGINES:
                    benchmark.visit(server, engine)
        checks = {}
        if OURS in chosen and not image_size:
            checks = {
                "Overload of ours on one processor, the load on the other": unless_it_fails(
                    lambda: benchmark.overload(rounds)
                ),
                "Ours beside a training job": unless_it_fails(benchmark.beside_training),
            }
        lines = report(benchmark, rounds, checks, notes)
    keep(__file__, lines, set(names) == {server.name for server in SERVERS}, f"_{image_size}" if image_size else "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [server.name for server in SERVERS]
    parser.add_argument("--servers", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3, help="of every load")
    parser.add_argument("--models", type=Path, default=ROOT / "models", help="the model store")
    parser.add_argument("--image-size", type=int, help="only `resnet18`, upsampled to this, into serving_SIZE.md")
    options = parser.parse_args()
    main(options.servers, options.rounds, options.seconds, options.models, options.image_size)
