"""Test the model of nodes and of a pool against queueing theory, and with costs that make every result exact."""

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("simpy", reason="SimPy is not installed")
sys.path.append(str(Path(__file__).parents[1] / "research"))

import numpy as np
import scale_simulation
import simpy
from cluster_model import Autoscaler, Pool, ScalingPolicy
from node_model import FIRST, PNG, Answer, EngineCosts, Node, NodeCosts, Processors, Waiting

REQUEST = FIRST, PNG
SERVICE_S = 0.01
# One image takes 10 ms of one processor, and everything else takes no time.
COSTS = NodeCosts(
    cores=1,
    engines={FIRST: EngineCosts((1, 64), (SERVICE_S, 64 * SERVICE_S), (SERVICE_S, 64 * SERVICE_S))},
    loop_s={PNG: 0.0},
    loop_wake_s=0.0,
    decoding_s={PNG: 0.0},
    batch_s=0.0,
    sending_on_s=0.0,
    sent_on=0.0,
)


class Traffic:
    """Poisson arrivals at a node, the answers, and the numbers of requests in progress at regular times."""

    def __init__(self, costs: NodeCosts, rate: float, seconds: float):
        self.arrivals = 0
        self.answers: list[Answer] = []
        self.in_progress: list[int] = []
        self._env = simpy.Environment()
        self._node = Node(self._env, costs, np.random.default_rng(1))
        self._env.process(self._arrive(rate))
        self._env.process(self._observe())
        self._env.run(seconds)

    @property
    def mean_latency(self) -> float:
        return statistics.mean(answer.latency for answer in self.answers)

    def _arrive(self, rate: float) -> Waiting:
        generator = np.random.default_rng(2)
        while True:
            yield self._env.timeout(generator.exponential(1 / rate))
            self.arrivals += 1
            self._env.process(self._answer())

    def _answer(self) -> Waiting:
        self.answers.append((yield from self._node.answer(*REQUEST)))

    def _observe(self) -> Waiting:
        while True:
            yield self._env.timeout(SERVICE_S / 3)
            self.in_progress.append(self._node.in_progress)


def answer_burst(costs: NodeCosts, count: int) -> list[Answer]:
    """Send requests at the same time, and return the answers in their order."""
    env, answers = simpy.Environment(), list[Answer]()
    node = Node(env, costs, np.random.default_rng(0))

    def request() -> Waiting:
        answers.append((yield from node.answer(*REQUEST)))

    for _ in range(count):
        env.process(request())
    env.run()
    return answers


@pytest.mark.parametrize("utilization", [0.3, 0.7])
def test_without_batches_the_latency_is_that_of_an_m_d_1_queue(utilization: float) -> None:
    traffic = Traffic(replace(COSTS, max_batch=1), utilization / SERVICE_S, 300)
    waiting_s = utilization * SERVICE_S / (2 * (1 - utilization))  # Pollaczek-Khinchine
    assert traffic.mean_latency == pytest.approx(SERVICE_S + waiting_s, rel=0.05)


def test_requests_in_progress_obey_littles_law() -> None:
    traffic = Traffic(replace(COSTS, max_batch=8, loop_s={PNG: 0.001}), 60, 200)
    expected = len(traffic.answers) / 200 * traffic.mean_latency
    assert statistics.mean(traffic.in_progress) == pytest.approx(expected, rel=0.02)


def test_overload_refuses_what_exceeds_the_queue_and_loses_no_request() -> None:
    traffic = Traffic(replace(COSTS, max_batch=1, max_queue=5), 3 / SERVICE_S, 20)
    refused = sum(answer.refused for answer in traffic.answers)
    assert refused / len(traffic.answers) == pytest.approx(2 / 3, abs=0.02)
    assert traffic.arrivals - len(traffic.answers) <= 6  # those that wait or are computed at the end
    assert max(answer.latency for answer in traffic.answers) <= 6 * SERVICE_S + 1e-6


def test_request_that_waits_longer_than_its_deadline_is_refused() -> None:
    answers = answer_burst(replace(COSTS, max_batch=1, deadline_s=2.5 * SERVICE_S), 5)
    assert [answer.refused for answer in answers].count(True) == 2
    assert max(answer.latency for answer in answers if not answer.refused) == pytest.approx(3 * SERVICE_S)


def test_batch_takes_what_has_queued_up_to_its_limit() -> None:
    latencies = [answer.latency for answer in answer_burst(replace(COSTS, max_batch=2), 3)]
    assert latencies == pytest.approx([2 * SERVICE_S, 2 * SERVICE_S, 3 * SERVICE_S])


@pytest.mark.parametrize(
    ("lock", "count", "seconds"),
    [(None, 1, 2.0), (None, 4, 4.0), ("python", 2, 4.0)],
    ids=["a thread has one processor", "four threads share two", "a lock leaves one"],
)
def test_threads_share_the_processors(lock: str | None, count: int, seconds: float) -> None:
    env = simpy.Environment()
    processors = Processors(env, 2)
    env.run(env.all_of([processors.compute(2.0, lock=lock) for _ in range(count)]))
    assert env.now == pytest.approx(seconds)
    assert processors.busy_s == pytest.approx(2.0 * count)


def test_autoscaler_waits_for_nodes_that_start_and_keeps_nodes_after_a_peak() -> None:
    scaler = Autoscaler(ScalingPolicy(target=0.5, lag_s=40.0, keep_s=100.0), nodes=10)
    scaler.decide(0, 1.0)
    assert (scaler.ready, scaler.nodes) == (10, 20)
    scaler.decide(15, 1.0)
    assert scaler.nodes == 20, "the load of ten busy nodes has been counted once already"
    scaler.start_nodes(40)
    assert scaler.ready == 20
    scaler.decide(45, 0.1)
    assert scaler.nodes == 20
    scaler.decide(120, 0.1)
    assert scaler.nodes == 4


def test_slice_of_a_pool_has_the_utilization_and_latency_of_the_whole_pool() -> None:
    runs = []
    for slice_nodes in (None, 2):
        scaler = Autoscaler(ScalingPolicy(target=0.6, lag_s=0.0, tolerance=0.5), 4)
        pool = Pool(simpy.Environment(), replace(COSTS, max_batch=1), scaler, REQUEST, slice_nodes)
        runs.append(pool.simulate(lambda _: 4 * 0.6 / SERVICE_S, 60))
    whole, part = runs
    assert statistics.mean(part.busy) == pytest.approx(statistics.mean(whole.busy), rel=0.05)
    latencies = [statistics.mean(answer.latency for answer in run.answers) for run in runs]
    assert latencies[1] == pytest.approx(latencies[0], rel=0.1)


def test_kept_measurement_has_all_costs_of_a_node() -> None:
    costs = scale_simulation.read_costs(json.loads(scale_simulation.MEASUREMENT.read_text()))
    times = [*costs.loop_s.values(), *costs.decoding_s.values(), costs.loop_wake_s, costs.batch_s, costs.sending_on_s]
    assert all(0 < seconds < 0.01 for seconds in times)
    assert 0 < costs.sent_on < 1
