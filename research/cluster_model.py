"""A discrete-event model of a pool of nodes behind a load balancer, and of its autoscaler.

    arrivals -> balancer -> node, node, ... -> answers
                   ^           | utilization, every interval
                   +-- autoscaler <--+

The balancer chooses a node at random, so the arrivals of each node are a Poisson process if all arrivals are. A `Pool`
may simulate only a slice of its nodes: they get their share of the arrivals, and the autoscaler takes their utilization
for that of all nodes. All times are in seconds.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import simpy
from node_model import Answer, Node, NodeCosts, Waiting

DAY_S = 86_400
_DAY_SHAPE = 1.3  # concentration of the von Mises curve: its peak is 2.5 times its mean

Rate = Callable[[float], float]
"""Requests per second at a time."""


@dataclass(frozen=True)
class ScalingPolicy:
    """The rules of an autoscaler.

    The defaults are those of the Horizontal Pod Autoscaler of Kubernetes. `lag_s` has none, because it depends on the
    cluster.

    Attributes:
        target: Load of a node that the autoscaler aims at.
        lag_s: Time from a decision until a new node answers.
        interval_s: Time between two decisions.
        tolerance: Relative deviation from the target that is accepted.
        growth: Largest factor of the number of nodes in one decision.
        added: Number of nodes that one decision may always add.
        keep_s: Time for which a smaller number must suffice before nodes are removed.
        min_nodes: Smallest number of nodes.
    """

    target: float
    lag_s: float
    interval_s: float = 15.0
    tolerance: float = 0.1
    growth: float = 2.0
    added: int = 4
    keep_s: float = 300.0
    min_nodes: int = 1


class Autoscaler:
    """The number of nodes of a pool, changed at regular decisions.

    Args:
        policy: The rules.
        nodes: Number of nodes that are ready at the start.
    """

    def __init__(self, policy: ScalingPolicy, nodes: int):
        self.ready = nodes
        """Number of nodes that answer requests."""
        self.policy = policy
        self._starting: deque[tuple[float, int]] = deque()  # times at which nodes are ready, and their numbers
        self._wanted: deque[tuple[float, int]] = deque()

    @property
    def nodes(self) -> int:
        """Number of nodes that are ready or starting, all of which are paid for."""
        return self.ready + sum(count for _, count in self._starting)

    def start_nodes(self, now: float) -> None:
        """Count the nodes as ready whose lag has passed."""
        while self._starting and self._starting[0][0] <= now:
            self.ready += self._starting.popleft()[1]

    def decide(self, now: float, load: float) -> None:
        """Change the number of nodes.

        Nodes that are starting count with a load of zero, so that the pool does not grow further because of a load that
        they will take over.

        Args:
            now: The time.
            load: Mean load of the nodes that are ready, in the unit of the target.
        """
        policy, nodes = self.policy, self.nodes
        wanted = max(policy.min_nodes, math.ceil(self.ready * load / policy.target - 1e-9))
        if abs(wanted / nodes - 1) <= policy.tolerance:
            wanted = nodes
        self._wanted.append((now, wanted))
        while self._wanted[0][0] <= now - policy.keep_s:
            self._wanted.popleft()
        if wanted > nodes:
            most = max(math.floor(nodes * policy.growth), nodes + policy.added)
            self._starting.append((now + policy.lag_s, min(wanted, most) - nodes))
        else:
            self._remove(nodes - min(nodes, max(count for _, count in self._wanted)))

    def _remove(self, count: int) -> None:
        """Remove nodes, first those that start last."""
        while count and self._starting:
            time, starting = self._starting.pop()
            if starting > count:
                self._starting.append((time, starting - count))
            count -= min(count, starting)
        self.ready -= count


@dataclass
class PoolRun:
    """The outcome of a simulated pool."""

    answers: list[Answer] = field(default_factory=list)
    paid: list[int] = field(default_factory=list)
    """Number of nodes, ready or starting, after each decision."""
    busy: list[float] = field(default_factory=list)
    """Utilization of the ready nodes before each decision, 0-1."""


class Pool:
    """Nodes behind a balancer, with an autoscaler on their utilization.

    Args:
        env: The simulated time.
        costs: Costs of a node.
        autoscaler: The number of nodes.
        request: Model and kind of picture of all requests.
        slice_nodes: Number of nodes to simulate of the whole pool. None to simulate all of them.
        seed: Seed of the random numbers.
    """

    def __init__(
        self,
        env: simpy.Environment,
        costs: NodeCosts,
        autoscaler: Autoscaler,
        request: tuple[str, str],
        slice_nodes: int | None = None,
        seed: int = 0,
    ):
        self.run = PoolRun()
        self._env = env
        self._costs = costs
        self._autoscaler = autoscaler
        self._request = request
        self._slice_nodes = slice_nodes
        self._random = np.random.default_rng(seed)
        self._nodes: list[Node] = []
        self._resize()

    def simulate(self, rate: Rate, seconds: float) -> PoolRun:
        """Simulate arrivals at the rate of the whole pool for some time."""
        self._env.process(self._arrive(rate))
        self._env.process(self._scale())
        self._env.run(self._env.now + seconds)
        return self.run

    def _arrive(self, rate: Rate) -> Waiting:
        while True:
            share = len(self._nodes) / self._autoscaler.ready
            yield self._env.timeout(self._random.exponential(1 / (rate(self._env.now) * share)))
            self._env.process(self._answer(self._nodes[self._random.integers(len(self._nodes))]))

    def _answer(self, node: Node) -> Waiting:
        answer = yield from node.answer(*self._request)
        self.run.answers.append(answer)

    def _scale(self) -> Waiting:
        """Decide at every interval. New nodes start to answer between two decisions."""
        policy = self._autoscaler.policy
        while True:
            before = {node: node.processors.busy_s for node in self._nodes}
            end = self._env.now + policy.interval_s
            while self._env.now < end:
                yield self._env.timeout(1.0)
                self._autoscaler.start_nodes(self._env.now)
                self._resize()
            used = [(node.processors.busy_s - busy_s) / policy.interval_s for node, busy_s in before.items()]
            utilization = min(1.0, sum(used) / len(used) / self._costs.cores)
            self._autoscaler.decide(self._env.now, utilization)
            self._resize()
            self.run.busy.append(utilization)
            self.run.paid.append(self._autoscaler.nodes)

    def _resize(self) -> None:
        """Let the balancer use as many nodes as are ready, or as the slice has."""
        count = self._slice_nodes or self._autoscaler.ready
        while len(self._nodes) < count:
            self._nodes.append(Node(self._env, self._costs, self._random))
        del self._nodes[count:]


def make_day(mean: float) -> Rate:
    """Return the rate of a day with one smooth peak, which is 2.5 times the mean."""
    scale = mean / float(np.i0(_DAY_SHAPE))
    return lambda now: scale * math.exp(-_DAY_SHAPE * math.cos(2 * math.pi * now / DAY_S))


def make_crowd(base: float, factor: float, start: float, rise_s: float) -> Rate:
    """Return the rate of a flash crowd: from `start` on it rises linearly to `factor` times the base, and stays."""
    return lambda now: base * (1 + (factor - 1) * min(1.0, max(0.0, (now - start) / rise_s)))
