"""A discrete-event model of one node: processors, the threads of the service, queues and batches.

    request -> event loop -> [decoder threads] -> queue -> engine -> event loop -> answer
                                              ^  (cascade)  |
                                              +-------------+

Input: `NodeCosts`, which `scale_measurement.py` measures, and arrivals. Output: one `Answer` for each request.
`scale_simulation.py` compares the model with the measured service and runs it. All times are in seconds.
"""

import math
from collections import deque
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

Waiting = Generator[simpy.Event, Any, None]
"""A process of SimPy."""

PNG, JPEG = "32x32 PNG", "500x375 JPEG"
FIRST, SECOND, CASCADE = "resnet", "resnet18", "cascade"
GATHERED = 16  # images for which a batch waits while photos keep all processors busy, see app/inference/batching.py
MAX_GATHERING_S = 0.02
_ROUNDING_S = 1e-12


@dataclass(frozen=True)
class EngineCosts:
    """The mean duration and the mean CPU time of a batch on idle processors, by its number of images.

    `spread` has equally probable ratios of a duration to the mean.
    """

    sizes: tuple[int, ...]
    wall_s: tuple[float, ...]
    cpu_s: tuple[float, ...]
    spread: tuple[float, ...] = (1.0,)

    def of(self, images: int) -> tuple[float, float]:
        """Return the mean duration and CPU time of a batch, interpolated between the measured sizes."""
        return float(np.interp(images, self.sizes, self.wall_s)), float(np.interp(images, self.sizes, self.cpu_s))


@dataclass(frozen=True)
class NodeCosts:
    """The costs of one node with one process of the service.

    Attributes:
        cores: Number of processors.
        engines: Costs of the engines, by model.
        loop_s: CPU time of the event loop for a request, by kind of picture.
        loop_wake_s: CPU time for which the event loop needs more after a pause.
        decoding_s: CPU time of decoding one image, by kind of picture.
        batch_s: CPU time of the engine thread for a batch, beside decoding and the engine.
        sending_on_s: CPU time of the event loop for an image that is sent on to the second member of a cascade.
        sent_on: Share of the images that is sent on.
        max_batch: Images in a batch.
        max_queue: Images that wait for one model.
        deadline_s: Time after which a waiting request is refused.
    """

    cores: int
    engines: Mapping[str, EngineCosts]
    loop_s: Mapping[str, float]
    loop_wake_s: float
    decoding_s: Mapping[str, float]
    batch_s: float
    sending_on_s: float
    sent_on: float
    max_batch: int = 64
    max_queue: int = 256
    deadline_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request: its arrival, its latency, and whether it was refused with 503."""

    arrived: float
    latency: float
    refused: bool


@dataclass(eq=False, slots=True)
class _Computation:
    left_s: float
    width: float
    lock: str | None
    done: simpy.Event
    rate: float = 0.0


class Processors:
    """Processors that runnable threads share evenly.

    A computation has a width, the number of threads that run it. If it has several, they wait for the slowest of them
    after each layer of the network, so the computation is as fast as the thread on the processor with the most threads.
    Computations that hold the same lock take turns on one thread, as Python code in the threads of a process does.

    Args:
        env: The simulated time.
        count: Number of processors.
        speed: Speed of a processor. It is below 1 if other processes take a share of the CPU time.
    """

    def __init__(self, env: simpy.Environment, count: int, speed: float = 1.0):
        self.busy_s = 0.0
        """Time for which processors were busy. A thread that waits for a slower one keeps its processor busy."""
        self._env = env
        self._count = count
        self._speed = speed
        self._running: list[_Computation] = []
        self._busy = 0  # processors with a runnable thread
        self._updated = 0.0
        self._alarm = 0  # number of the latest alarm; earlier ones are ignored

    def compute(self, cpu_s: float, width: float = 1.0, lock: str | None = None) -> simpy.Event:
        """Return the event that `cpu_s` seconds of CPU time have been computed."""
        computation = _Computation(max(cpu_s, _ROUNDING_S), width, lock, self._env.event())
        self._advance()
        self._running.append(computation)
        self._share()
        return computation.done

    def _advance(self) -> None:
        """Account for the time since the last change."""
        elapsed, self._updated = self._env.now - self._updated, self._env.now
        self.busy_s += self._busy * elapsed
        for each in self._running:
            each.left_s -= each.rate * elapsed

    def _share(self) -> None:
        """Share the processors among the threads, and set the alarm for the next computation that ends."""
        self._alarm += 1
        self._busy = 0
        if not self._running:
            return
        holders: dict[str, int] = {}
        threads = 0
        for each in self._running:
            if each.lock is None:
                threads += round(each.width)
            else:
                holders[each.lock] = holders.get(each.lock, 0) + 1
        threads += len(holders)
        self._busy = min(threads, self._count)
        share = self._speed * min(1.0, self._count / threads)
        slowest = self._speed / math.ceil(threads / self._count)
        for each in self._running:
            if each.lock is not None:
                each.rate = share / holders[each.lock]
            else:
                each.rate = each.width * (slowest if each.width > 1 else share)
        delay = max(0.0, min(each.left_s / each.rate for each in self._running))
        alarm = self._env.timeout(delay, self._alarm)
        assert alarm.callbacks is not None  # noqa: S101  it has not been processed
        alarm.callbacks.append(self._end)

    def _end(self, alarm: simpy.Event) -> None:
        if alarm.value != self._alarm:
            return
        self._advance()
        ended = [each for each in self._running if each.left_s <= _ROUNDING_S + 1e-12 * self._env.now]
        for each in ended:
            self._running.remove(each)
            each.done.succeed()
        self._share()


class Thread:
    """A thread that runs tasks one after the other. It needs `wake_s` more for the first task after a pause.

    A turn consists of the tasks that wait at its start, as in an event loop.
    """

    def __init__(self, env: simpy.Environment, processors: Processors, lock: str | None = None, wake_s: float = 0.0):
        self.turn = env.event()
        """Event that the current turn, or the next one after a pause, has ended."""
        self._env = env
        self._processors = processors
        self._lock = lock
        self._wake_s = wake_s
        self._tasks: deque[tuple[float, simpy.Event]] = deque()
        self._is_running = False

    def run(self, cpu_s: float) -> simpy.Event:
        """Return the event that the thread has run a task of `cpu_s` seconds of CPU time."""
        done = self._env.event()
        self._tasks.append((cpu_s, done))
        if not self._is_running:
            self._is_running = True
            self._env.process(self._run())
        return done

    def _run(self) -> Waiting:
        extra_s = self._wake_s
        while self._tasks:
            for _ in range(len(self._tasks)):
                cpu_s, done = self._tasks.popleft()
                yield self._processors.compute(cpu_s + extra_s, lock=self._lock)
                extra_s = 0.0
                done.succeed()
            yield self._env.timeout(0)  # processes that wait for the last task still see this turn
            ended, self.turn = self.turn, self._env.event()
            ended.succeed()
        self._is_running = False


@dataclass(eq=False, slots=True)
class _Image:
    arrived: float
    decoding_s: float
    """CPU time of decoding it with its batch; 0 if it is decoded."""
    computed: simpy.Event
    """Its value is True if the image was computed, False if its deadline has passed."""


class Engine:
    """The queue of one engine, and the thread that computes its batches, see `app.inference.batching.Batcher`."""

    def __init__(
        self,
        env: simpy.Environment,
        processors: Processors,
        costs: NodeCosts,
        model: str,
        generator: np.random.Generator,
    ):
        self.waiting: deque[_Image] = deque()
        """Images in the queue."""
        self.photos = 0
        """Photos in decoding."""
        self._env = env
        self._processors = processors
        self._costs = costs
        self._times = costs.engines[model]
        self._random = generator
        self._is_busy = False

    def compute(self, decoding_s: float, turn: simpy.Event | None = None) -> simpy.Event:
        """Append an image to the queue. Returns the event that it was computed or that it is too late.

        Args:
            decoding_s: CPU time of decoding it with its batch.
            turn: Event until which an idle engine waits for more images. None to start at once.
        """
        image = _Image(self._env.now, decoding_s, self._env.event())
        self.waiting.append(image)
        if not self._is_busy:
            self._is_busy = True
            self._env.process(self._run(turn))
        return image.computed

    def _run(self, turn: simpy.Event | None) -> Waiting:
        """Compute batches until the queue is empty."""
        if turn:
            yield turn
        while self.waiting:
            if self.photos > self._costs.cores and len(self.waiting) < GATHERED:
                yield from self._gather()
            batch = self._take()
            if not batch:
                continue
            decoding_s = sum(image.decoding_s for image in batch)
            yield self._processors.compute(self._costs.batch_s + decoding_s, lock="python")
            wall_s, cpu_s = self._times.of(len(batch))
            ratio = self._times.spread[self._random.integers(len(self._times.spread))]
            yield self._processors.compute(cpu_s * ratio, width=cpu_s / wall_s)
            for image in batch:
                image.computed.succeed(True)
        self._is_busy = False

    def _gather(self) -> Waiting:
        """Wait for more photos, while they keep all processors busy."""
        end = self._env.now + MAX_GATHERING_S
        while self.photos > self._costs.cores and len(self.waiting) < GATHERED and self._env.now < end:
            yield self._env.timeout(min(1e-3, end - self._env.now))

    def _take(self) -> list[_Image]:
        """Take the next batch from the queue. Images that are too late are refused."""
        batch: list[_Image] = []
        while self.waiting and len(batch) < self._costs.max_batch:
            image = self.waiting.popleft()
            if self._env.now - image.arrived > self._costs.deadline_s:
                image.computed.succeed(False)
            else:
                batch.append(image)
        return batch


class Node:
    """One node: a process of the service on its processors.

    Args:
        env: The simulated time.
        costs: Costs of the node.
        generator: Random numbers.
        speed: See `Processors`.
    """

    def __init__(self, env: simpy.Environment, costs: NodeCosts, generator: np.random.Generator, speed: float = 1.0):
        self.env = env
        self.processors = Processors(env, costs.cores, speed)
        self.in_progress = 0
        """Number of requests that have arrived and are not answered."""
        self.engines = {model: Engine(env, self.processors, costs, model, generator) for model in costs.engines}
        self._costs = costs
        self._random = generator
        self._loop = Thread(env, self.processors, "python", costs.loop_wake_s)
        self._decoders = simpy.Resource(env, costs.cores)

    def answer(self, model: str, picture: str) -> Generator[simpy.Event, Any, Answer]:
        """Answer a request with one image. Use it as a process or with `yield from`."""
        arrived = self.env.now
        self.in_progress += 1
        is_computed = yield from self._compute(model, picture)
        self.in_progress -= 1
        return Answer(arrived, self.env.now - arrived, not is_computed)

    def _compute(self, model: str, picture: str) -> Generator[simpy.Event, Any, bool]:
        """Compute a request. Half of the event loop's time is for its arrival, and half for its answer."""
        costs = self._costs
        half_s = costs.loop_s[picture] / 2
        members = [self.engines[each] for each in ((FIRST, SECOND) if model == CASCADE else (model,))]
        yield self._loop.run(half_s)
        if sum(len(each.waiting) for each in members) >= costs.max_queue:
            return False
        first = members[0]
        if picture == JPEG:
            yield from self._decode(first, costs.decoding_s[picture])
            is_computed = yield first.compute(0.0)
        else:
            is_computed = yield first.compute(costs.decoding_s[picture], self._loop.turn)
        if is_computed and len(members) > 1 and self._random.random() < costs.sent_on:
            yield self._loop.run(costs.sending_on_s)
            is_computed = yield members[1].compute(0.0, self._loop.turn)
        yield self._loop.run(half_s)
        return bool(is_computed)

    def _decode(self, engine: Engine, cpu_s: float) -> Waiting:
        """Decode a photo in a decoder thread."""
        engine.photos += 1
        with self._decoders.request() as turn:
            yield turn
            yield self.processors.compute(cpu_s)
        engine.photos -= 1
