"""Simulate the service on one node and on many, and find out what limits it at 10, 1,000 and 100,000 times the load.

The program reads the costs of a node from results/scale_measurement.json. First it simulates the load of the
measurement, and compares rate and latencies. The load generator takes part, because it ran on the same processors, and
the processors are slower by the share that other processes took of them. Then the program simulates nodes without a
load generator: the capacity of one node, a day, and a flash crowd.

A day of a large pool has too many requests for a simulation. Two reductions make it small. For a day, the autoscaler
runs with the simulated utilization of a node at each rate, and the latencies are those of a node at that rate. For a
flash crowd, a slice of two nodes stands for the pool. A pool of 10 nodes is simulated in full as well, to check this.

    python research/scale_simulation.py [--price 0.10] [--lag 46]

Needs SimPy, which the extra `dev` installs.

Time: 15 minutes.
Result: one node serves 318 images/s of the cascade at 60 % utilization. In a flash crowd of five times the load, 2 % of
the requests are refused, because the autoscaler is late (Intel Xeon with AMX, 2 cores, 2026-11-30).
Table: results/scale_simulation.md.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests/helpers"))

import numpy as np
import simpy
from cluster_model import DAY_S, Autoscaler, Pool, PoolRun, Rate, ScalingPolicy, make_crowd, make_day
from node_model import CASCADE, FIRST, JPEG, PNG, SECOND, EngineCosts, Node, NodeCosts, Thread, Waiting
from numpy.typing import NDArray
from results import describe_run, keep

MEASUREMENT = Path(__file__).parent / "results/scale_measurement.json"
POLL_S = 1e-3  # the open load generator looks at its schedule so often, see tests/helpers/open_loop.py
WARMUP_S = 1.0
CHECK_S = 20.0
TOLERANCES = 0.15, 0.15, 0.3  # relative deviations of rate, p50 and p99
POINT_S = 20.0
CALLERS = 64  # callers that keep a node saturated
REQUEST = CASCADE, PNG
UTILIZATION = 0.6  # base load of a node, and target of the autoscaler
SCALES = 10, 1_000, 100_000
CROWD, CROWD_START_S, CROWD_RISE_S, CROWD_S = 5.0, 30.0, 60.0, 420.0
CROWD_CHECK_S = 135.0
SLICE_NODES = 2

# Figures that this repository does not measure.
LIST_PRICE = 0.005 / 1000  # US dollars for a request that lists an object store
STORE_RATE = 5500  # reading requests per second and prefix that Amazon S3 promises
DATABASE_CONNECTIONS = 100  # default of PostgreSQL
CONNECTIONS_PER_PROCESS = 5  # pool of SQLAlchemy
SERIES_BYTES = 3 << 10  # memory of Prometheus for a series
SCRAPE_S = 15.0
CLUSTER_NODES = 5_000  # nodes that Kubernetes supports in a cluster
RAY_NODES = 250  # nodes in Ray's own benchmark of its scalability
IMAGE_MIB = 1_786  # container image of the CPU build, see docs/operations.md
LOG_BYTES = 230  # log line of a request, see docs/operations.md
REQUEST_BYTES, ANSWER_BYTES = 2_700, 900  # a PNG with its head, and the answer
GPU_RATES = {FIRST: 188_312, SECOND: 60_978}  # images per second with the batcher, benchmarks/results/engines_gpu.md
GPU_CORES = 16


def read_costs(measurement: dict[str, Any]) -> NodeCosts:
    """Return the costs of a node. `sent_on` is the measured share of the cascade."""

    def find(model: str, picture: str, connections: int) -> dict[str, Any]:
        key = model, picture, connections
        return next(c for c in measurement["cases"] if (c["model"], c["picture"], c["connections"]) == key)

    alone, together, cascade = find(FIRST, PNG, 1), find(FIRST, PNG, 32), find(CASCADE, PNG, 32)
    photos = find(FIRST, JPEG, 32)
    # A lone request wakes the loop twice: when it arrives, and when it is computed. A batch of requests does it once.
    wake_ms = (alone["loop_ms"] - together["loop_ms"]) / (1 - 1 / together["batch_images"]) / 2
    loop_ms = {
        PNG: alone["loop_ms"] - 2 * wake_ms,
        JPEG: photos["loop_ms"] - 2 * wake_ms / photos["batch_images"],
    }
    decoding_ms = measurement["decoding_ms"]
    return NodeCosts(
        cores=measurement["cores"],
        engines={
            model: EngineCosts(
                tuple(times["sizes"]),
                tuple(ms / 1000 for ms in times["wall_ms"]),
                tuple(ms / 1000 for ms in times["cpu_ms"]),
                tuple(times["spread"]),
            )
            for model, times in measurement["engines"].items()
        },
        loop_s={picture: ms / 1000 for picture, ms in loop_ms.items()},
        loop_wake_s=wake_ms / 1000,
        decoding_s={picture: ms / 1000 for picture, ms in decoding_ms.items()},
        batch_s=(alone["batch_decoding_ms"] - decoding_ms[PNG]) / 1000,
        sending_on_s=(cascade["loop_ms"] - together["loop_ms"]) / cascade["sent_on"] / 1000,
        sent_on=cascade["sent_on"],
    )


@dataclass(frozen=True)
class Load:
    """The rate and the latencies of a simulated load."""

    rate: float
    p50_ms: float
    p99_ms: float


class CheckedNode:
    """A node with the load generator of a measured case on its processors."""

    def __init__(self, costs: NodeCosts, case: dict[str, Any]):
        self._env = simpy.Environment()
        self._random = np.random.default_rng(0)
        self._node = Node(self._env, costs, self._random, 1 - case["foreign"])
        self._client = Thread(self._env, self._node.processors)
        self._half_s = case["client_ms"] / 2000
        self._case = case
        self._latencies: list[float] = []

    def simulate(self) -> Load:
        """Simulate the case."""
        if self._case["connections"]:
            for _ in range(self._case["connections"]):
                self._env.process(self._connect())
        else:
            self._env.process(self._send_on_schedule())
        self._env.run(WARMUP_S)
        self._latencies.clear()
        self._env.run(WARMUP_S + CHECK_S)
        p50, p99 = np.percentile(self._latencies, [50, 99]).tolist()
        return Load(len(self._latencies) / CHECK_S, p50 * 1000, p99 * 1000)

    def _connect(self) -> Waiting:
        while True:
            yield from self._request(self._env.now)

    def _send_on_schedule(self) -> Waiting:
        due = 0.0
        while True:
            due += self._random.exponential(1 / self._case["offered"])
            sent = math.ceil(due / POLL_S) * POLL_S
            if sent > self._env.now:
                yield self._env.timeout(sent - self._env.now)
            self._env.process(self._request(due))

    def _request(self, due: float) -> Waiting:
        yield self._client.run(self._half_s)
        yield from self._node.answer(self._case["model"], self._case["picture"])
        yield self._client.run(self._half_s)
        self._latencies.append(self._env.now - due)


@dataclass(frozen=True)
class Point:
    """One node at one rate of Poisson arrivals."""

    offered: float
    utilization: float
    latencies: NDArray[np.float64]
    """Latencies of the accepted requests, sorted, in seconds."""
    refused: float
    """Share of the refused requests."""


def simulate_point(costs: NodeCosts, request: tuple[str, str], offered: float) -> Point:
    """Simulate a node without a load generator."""
    env, generator = simpy.Environment(), np.random.default_rng(0)
    node, answers = Node(env, costs, generator), list[tuple[float, bool]]()

    def arrive() -> Waiting:
        while True:
            yield env.timeout(generator.exponential(1 / offered))
            env.process(answer())

    def answer() -> Waiting:
        given = yield from node.answer(*request)
        answers.append((given.latency, given.refused))

    env.process(arrive())
    env.run(WARMUP_S)
    answers.clear()
    busy_s = node.processors.busy_s
    env.run(WARMUP_S + POINT_S)
    utilization = (node.processors.busy_s - busy_s) / POINT_S / costs.cores
    accepted = np.sort([latency for latency, refused in answers if not refused])
    return Point(offered, utilization, accepted, 1 - len(accepted) / len(answers))


def find_capacity(costs: NodeCosts, request: tuple[str, str]) -> float:
    """Return the requests per second that a node answers when `CALLERS` callers always wait for an answer."""
    env, answered = simpy.Environment(), list[float]()
    node = Node(env, costs, np.random.default_rng(0))

    def call() -> Waiting:
        while True:
            yield from node.answer(*request)
            answered.append(env.now)

    for _ in range(CALLERS):
        env.process(call())
    env.run(WARMUP_S + POINT_S)
    return sum(now > WARMUP_S for now in answered) / POINT_S


def simulate_points(costs: NodeCosts, request: tuple[str, str], capacity: float) -> list[Point]:
    """Return a node at rates from 5 to 200 % of its capacity."""
    shares = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.2, 2.0)
    return [simulate_point(costs, request, share * capacity) for share in shares]


def find_rate(points: list[Point], utilization: float) -> float:
    """Return the rate at which a node has this utilization."""
    return float(np.interp(utilization, [p.utilization for p in points], [p.offered for p in points]))


@dataclass(frozen=True)
class Outcome:
    """A pool over a scenario.

    Attributes:
        mean: Mean number of paid nodes.
        peak: Largest number of paid nodes.
        p99_ms: p99 of the accepted requests.
        refused: Share of the refused requests.
        requests: Number of answered requests of the whole pool.
        seconds: Length of the scenario.
    """

    mean: float
    peak: int
    p99_ms: float
    refused: float
    requests: float
    seconds: float

    def cost(self, price: float) -> float:
        """Return the cost of a million predictions at a price per node and hour."""
        return self.mean * self.seconds / 3600 * price / self.requests * 1e6


def simulate_day(points: list[Point], policy: ScalingPolicy, mean: float) -> Outcome:
    """Run the autoscaler over a day. The nodes behave at each rate as in `points`."""
    rate, rates = make_day(mean), [point.offered for point in points]
    utilizations = [point.utilization for point in points]
    scaler = Autoscaler(policy, max(1, math.ceil(rate(0.0) / find_rate(points, policy.target))))
    sizes, weights = list[int](), np.zeros(len(points))
    for step in range(int(DAY_S / policy.interval_s)):
        now = step * policy.interval_s
        scaler.start_nodes(now)
        per_node = rate(now) / scaler.ready
        weights[int(np.searchsorted(rates[:-1], per_node))] += rate(now) * policy.interval_s
        scaler.decide(now, float(np.interp(per_node, rates, utilizations)))
        sizes.append(scaler.nodes)
    refused = float(np.dot(weights, [point.refused for point in points]) / weights.sum())
    return Outcome(
        float(np.mean(sizes)),
        max(sizes),
        1000 * _mix_p99(points, weights),
        refused,
        float(weights.sum()) * (1 - refused),
        DAY_S,
    )


def _mix_p99(points: list[Point], weights: NDArray[np.float64]) -> float:
    """Return the p99 of requests that are spread over the points by weights."""
    latencies = np.concatenate([point.latencies for point in points])
    shares = [weight * (1 - p.refused) / len(p.latencies) for weight, p in zip(weights, points, strict=True)]
    weight = np.concatenate([np.full(len(p.latencies), share) for share, p in zip(shares, points, strict=True)])
    order = np.argsort(latencies)
    cumulated = np.cumsum(weight[order])
    return float(latencies[order][np.searchsorted(cumulated, 0.99 * cumulated[-1])])


def simulate_crowd(
    costs: NodeCosts, policy: ScalingPolicy, base: float, nodes: int, seconds: float, slice_nodes: int | None
) -> Outcome:
    """Simulate a flash crowd on a pool that has the right number of nodes before.

    Args:
        base: Requests per second of the pool before the crowd.
        nodes: Number of nodes before the crowd.
        slice_nodes: Number of nodes to simulate; None for all of them.
    """
    rate = make_crowd(base, CROWD, CROWD_START_S, CROWD_RISE_S)
    pool = Pool(simpy.Environment(), costs, Autoscaler(policy, nodes), REQUEST, slice_nodes)
    run = pool.simulate(rate, seconds)
    return _summarize(run, rate, seconds)


def _summarize(run: PoolRun, rate: Rate, seconds: float) -> Outcome:
    accepted = [answer.latency for answer in run.answers if not answer.refused]
    refused = _refused_share(run, rate)
    offered = sum(rate(second) for second in range(int(seconds)))
    p99_ms = 1000 * float(np.percentile(accepted, 99))
    return Outcome(float(np.mean(run.paid)), max(run.paid), p99_ms, refused, offered * (1 - refused), seconds)


def _refused_share(run: PoolRun, rate: Rate) -> float:
    """Return the refused share of the pool. A slice sees fewer arrivals in the seconds in which the pool is larger."""
    seconds = int(max(answer.arrived for answer in run.answers)) + 1
    counts, refusals = np.zeros(seconds), np.zeros(seconds)
    for answer in run.answers:
        counts[int(answer.arrived)] += 1
        refusals[int(answer.arrived)] += answer.refused
    rates = np.array([rate(second) for second in range(seconds)])
    return float(np.sum(rates * refusals / np.maximum(counts, 1)) / rates.sum())


def format_check(costs: NodeCosts, cases: list[dict[str, Any]]) -> list[str]:
    """Return the table of measured and simulated rates and latencies."""
    lines = [
        "| load | requests/s | p50 ms | p99 ms | all targets met |",
        "| --- | --: | --: | --: | --- |",
    ]
    for case in cases:
        load = CheckedNode(costs, case).simulate()
        ratios = load.rate / case["rate"], load.p50_ms / case["p50_ms"], load.p99_ms / case["p99_ms"]
        missed = [
            name
            for name, ratio, limit in zip(("rate", "p50", "p99"), ratios, TOLERANCES, strict=True)
            if abs(ratio - 1) > limit
        ]
        arrivals = f"{case['connections']} connections" if case["connections"] else f"open, {case['offered']:.0f}/s"
        lines.append(
            f"| `{case['model']}`, {case['picture']}, {arrivals} "
            f"| {case['rate']:.0f}, {load.rate:.0f}, {ratios[0]:.2f} "
            f"| {case['p50_ms']:.1f}, {load.p50_ms:.1f}, {ratios[1]:.2f} "
            f"| {case['p99_ms']:.1f}, {load.p99_ms:.1f}, {ratios[2]:.2f} "
            f"| {'**no**: ' + ', '.join(missed) if missed else 'yes'} |"
        )
    return lines


def format_capacity(costs: NodeCosts) -> list[str]:
    """Return the table of the capacity of a node, of one core and of a GPU."""
    lines = ["| node | model | picture | images/s, saturated | per core |", "| --- | --- | --- | --: | --: |"]
    for model in (FIRST, SECOND, CASCADE):
        for picture in (PNG, JPEG):
            rate = find_capacity(costs, (model, picture))
            lines.append(f"| {costs.cores} cores | `{model}` | {picture} | {rate:,.0f} | {rate / costs.cores:,.0f} |")
    cascade = 1 / (1 / GPU_RATES[FIRST] + costs.sent_on / GPU_RATES[SECOND])
    http = GPU_CORES / (costs.loop_s[PNG] + costs.decoding_s[PNG])
    for model, rate in (GPU_RATES | {CASCADE: cascade}).items():
        lines.append(f"| H200, without HTTP and decoding | `{model}` | pixels | {rate:,.0f} | |")
    lines.append(f"| {GPU_CORES} cores for HTTP and decoding only, one process each | any | {PNG} | {http:,.0f} | |")
    return lines


def format_points(points: list[Point]) -> list[str]:
    """Return the table of a node at several rates."""
    lines = ["| requests/s | utilization | p50 ms | p99 ms | refused |", "| --: | --: | --: | --: | --: |"]
    for point in points:
        p50, p99 = (np.percentile(point.latencies, [50, 99]) * 1000).tolist()
        lines.append(f"| {point.offered:.0f} | {point.utilization:.0%} | {p50:.1f} | {p99:.1f} | {point.refused:.1%} |")
    return lines


def format_outcomes(outcomes: dict[str, Outcome], price: float) -> list[str]:
    """Return the table of the scenarios."""
    lines = [
        "| scenario | nodes, mean | nodes, peak | p99 ms | refused | cost of a million predictions |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for name, outcome in outcomes.items():
        lines.append(
            f"| {name} | {outcome.mean:,.1f} | {outcome.peak:,} | {outcome.p99_ms:,.1f} | {outcome.refused:.1%} "
            f"| ${outcome.cost(price):.4f} |"
        )
    return lines


def format_limits(measurement: dict[str, Any], base: float, nodes: dict[int, int]) -> list[str]:
    """Return the table of the demands of a pool on its surroundings at the peak of the flash crowd.

    Args:
        base: Requests per second of a node at the base load.
        nodes: Largest number of nodes, by scale.
    """
    series, model_mib = measurement["metric_series"], measurement["model_mib"]

    def describe(scale: int) -> Iterator[str]:
        count, added, rate = nodes[scale], nodes[scale] - scale, CROWD * base * scale
        yield f"{count:,}"
        yield f"{rate:,.0f}"
        yield f"{rate * (REQUEST_BYTES + ANSWER_BYTES) * 8 / 1e9:,.2f} Gbit/s"
        yield f"{count:,}/s, ${count * DAY_S * LIST_PRICE:,.0f} a day"
        yield f"{count * CONNECTIONS_PER_PROCESS:,}"
        yield f"{count * series:,}"
        yield f"{count * series * SERIES_BYTES / 2**30:,.1f} GiB, {count * series / SCRAPE_S:,.0f} samples/s"
        yield f"{added * model_mib / 1024:,.1f} GiB"
        yield f"{added * IMAGE_MIB / 1024:,.0f} GiB"
        yield f"{rate * LOG_BYTES * DAY_S / 2**40:,.2f} TiB a day"

    names = (
        ("nodes", f"Kubernetes {CLUSTER_NODES:,}, Ray {RAY_NODES} tested"),
        ("requests/s", ""),
        ("network at the balancer", ""),
        ("polls of an object store", f"S3: {STORE_RATE:,}/s for a prefix"),
        ("connections to PostgreSQL", f"{DATABASE_CONNECTIONS} by default"),
        ("series of Prometheus", ""),
        ("memory and samples of Prometheus", ""),
        ("models that new nodes load", ""),
        ("container images that new nodes load", ""),
        ("log lines", ""),
    )
    columns = [list(describe(scale)) for scale in SCALES]
    lines = [
        f"| demand | {' | '.join(f'{scale:,}x' for scale in SCALES)} | limit |",
        f"| --- | {'--: | ' * len(SCALES)}--- |",
    ]
    rows = zip(names, zip(*columns, strict=True), strict=True)
    return lines + [f"| {name} | {' | '.join(values)} | {limit} |" for (name, limit), values in rows]


def main(price: float, lag_s: float, whole: bool) -> None:
    measurement = json.loads(MEASUREMENT.read_text())
    costs = read_costs(measurement)
    points = simulate_points(costs, REQUEST, find_capacity(costs, REQUEST))
    base = find_rate(points, UTILIZATION)
    policy = ScalingPolicy(UTILIZATION, lag_s)
    outcomes, peaks = dict[str, Outcome](), dict[int, int]()
    for scale in SCALES:
        outcomes[f"{scale:,}x, day"] = simulate_day(points, policy, scale * base)
        crowd = simulate_crowd(costs, policy, scale * base, scale, CROWD_S, SLICE_NODES)
        outcomes[f"{scale:,}x, flash crowd"], peaks[scale] = crowd, crowd.peak
    small = min(SCALES)
    reduced = {
        f"{small}x, flash crowd, {CROWD_CHECK_S:.0f} s, {name}": simulate_crowd(
            costs, policy, small * base, small, CROWD_CHECK_S, count
        )
        for name, count in (("all nodes", None), (f"slice of {SLICE_NODES}", SLICE_NODES))
    }
    prepared = {
        f"target {target:.0%}, lag {lag:.0f} s": simulate_crowd(
            costs, ScalingPolicy(target, lag), 1000 * base, math.ceil(1000 * UTILIZATION / target), CROWD_S, SLICE_NODES
        )
        for target, lag in ((UTILIZATION, 15.0), (0.3, lag_s), (0.15, lag_s))
    }
    lines = [
        f"Simulated from a measurement: {measurement['run']}. Table: {describe_run()}.",
        "",
        "## Check",
        "",
        "Measured, simulated and their ratio. Targets: rate and p50 within 15 %, p99 within 30 %.",
        "",
        *format_check(costs, measurement["cases"]),
        "",
        "## Capacity",
        "",
        *format_capacity(costs),
        "",
        f"## One node, `{CASCADE}`, {PNG}",
        "",
        f"The base load is {base:.0f} images/s: {UTILIZATION:.0%} utilization.",
        "",
        *format_points(points),
        "",
        "## Scales",
        "",
        f"Price of a node: ${price:.2f} an hour. Target of the autoscaler: {UTILIZATION:.0%} utilization, every "
        f"{policy.interval_s:.0f} s; a new node answers after {lag_s:.0f} s.",
        "",
        *format_outcomes(outcomes, price),
        "",
        "## Reduction",
        "",
        *format_outcomes(reduced, price),
        "",
        "## Preparation for the flash crowd at 1,000x",
        "",
        *format_outcomes(prepared, price),
        "",
        "## Demands at the peak of the flash crowd",
        "",
        *format_limits(measurement, base, peaks),
    ]
    keep(__file__, lines, whole)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--price", type=float, default=0.10, help="US dollars for a node and an hour")
    parser.add_argument("--lag", type=float, default=46.0, help="seconds from a decision until a new node answers")
    chosen = parser.parse_args()
    main(chosen.price, chosen.lag, whole=chosen == parser.parse_args([]))
