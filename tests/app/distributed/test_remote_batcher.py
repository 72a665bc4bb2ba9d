"""Test the batcher that sends images to replicas, with a handle that needs no cluster."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray")

from ray.exceptions import ActorDiedError

from app.distributed.remote_batcher import RemoteBatcher
from app.distributed.replica import Answer, Refusal
from app.exceptions import Unavailable
from app.inference.batching import BatchTimes, Images, Scores

Replica = Callable[[Images], Awaitable[Any]]

IMAGE = np.full((1, 3, 32, 32), 7, np.uint8)


def answer(pixels: Images) -> Answer:
    logits = pixels.mean((1, 2, 3), dtype=np.float32)[:, None]
    return Answer(logits, 0.25, BatchTimes(1e9, len(pixels), [0.25], False, 0.0, 0.5), True)


class FakeHandle:
    """A handle whose calls are awaited in this process, one replica after the other."""

    def __init__(self, *replicas: Replica):
        self.replicas = list(replicas)
        self.cancelled = 0
        self.infer = self.infer_in_background = self

    def remote(self, pixels: Images, _: float | None) -> "FakeResponse":
        return FakeResponse(self, self.replicas.pop(0)(pixels))


class FakeResponse:
    def __init__(self, handle: FakeHandle, result: Awaitable[Any]):
        self.handle = handle
        self.result = result

    def __await__(self) -> Any:
        return self.result.__await__()

    def cancel(self) -> None:
        self.handle.cancelled += 1


async def healthy(pixels: Images) -> Answer:
    return answer(pixels)


async def dying(_: Images) -> Answer:
    raise ActorDiedError


async def stuck(_: Images) -> Answer:
    await asyncio.sleep(600)
    raise AssertionError


def make_batcher(*replicas: Replica, **arguments: Any) -> tuple[RemoteBatcher, FakeHandle]:
    handle = FakeHandle(*replicas)
    arguments = {"max_batch": 4, "max_queue": 4} | arguments
    return RemoteBatcher(handle, "application", "torchscript", **arguments), handle


def test_a_request_of_a_dead_replica_is_sent_once_more() -> None:
    batcher, handle = make_batcher(dying, healthy)
    assert asyncio.run(batcher.run(IMAGE)).logits.tolist() == [[7]]
    assert not handle.replicas


def test_a_request_whose_second_replica_dies_is_refused() -> None:
    batcher, handle = make_batcher(dying, dying, healthy)
    with pytest.raises(Unavailable, match="2 replicas"):
        asyncio.run(batcher.run(IMAGE))
    assert len(handle.replicas) == 1
    assert batcher.waiting == 0


def test_a_small_image_is_decoded_here_and_its_error_is_raised() -> None:
    def fail() -> Images:
        raise OSError("no image")

    decodings: list[tuple[float, float]] = []
    batcher, _ = make_batcher(healthy, observe_decoding=lambda *times: decodings.append(times))
    assert asyncio.run(batcher.run(lambda: IMAGE[0])).logits.tolist() == [[7]]
    assert len(decodings) == 1
    with pytest.raises(OSError, match="no image"):
        asyncio.run(batcher.run(fail))
    assert batcher.queued == 0


def test_images_beyond_the_limit_in_flight_are_refused_unless_they_are_accepted() -> None:
    async def check() -> None:
        batcher, _ = make_batcher(stuck, healthy, max_queue=1)
        first = asyncio.create_task(batcher.run(IMAGE))
        await asyncio.sleep(0)
        assert batcher.queued == 1
        with pytest.raises(Unavailable, match="1 images are waiting") as refused:
            await batcher.run(IMAGE)
        assert refused.value.reason == "queue_full"
        with pytest.raises(Unavailable):
            await batcher.run_in_background(IMAGE)
        await batcher.run(IMAGE, accepted=True)
        first.cancel()

    asyncio.run(check())


def test_a_request_whose_client_has_left_is_cancelled_in_the_cluster() -> None:
    async def check() -> None:
        batcher, handle = make_batcher(stuck)
        task = asyncio.create_task(batcher.run(IMAGE))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (handle.cancelled, batcher.queued) == (1, 0)

    asyncio.run(check())


def test_images_gather_while_two_calls_per_replica_are_in_progress() -> None:
    async def check(replicas: int) -> list[int]:
        sizes, release = list[int](), asyncio.Event()

        async def wait(pixels: Images) -> Answer:
            sizes.append(len(pixels))
            await release.wait()
            return answer(pixels)

        batcher, _ = make_batcher(*[wait] * 9, max_queue=100)
        batcher.replicas = replicas
        images = [np.full((1, 3, 32, 32), number, np.uint8) for number in range(9)]
        tasks = [asyncio.create_task(batcher.run(image)) for image in images]
        await asyncio.sleep(0.01)
        tasks[8].cancel()
        release.set()
        scores = await asyncio.gather(*tasks, return_exceptions=True)
        assert [each.logits.item() for each in scores[:8] if isinstance(each, Scores)] == list(range(8))
        assert isinstance(scores[8], asyncio.CancelledError)
        assert batcher.queued == 0
        return sizes

    assert asyncio.run(check(replicas=1)) == [1, 1, 4, 2]
    assert asyncio.run(check(replicas=2)) == [1, 1, 1, 1, 4]


def test_a_gathered_request_is_refused_at_its_deadline_and_not_sent() -> None:
    async def check() -> None:
        batcher, handle = make_batcher(stuck, stuck, healthy)
        tasks = [asyncio.create_task(batcher.run(IMAGE)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="deadline"):
            await batcher.run(IMAGE, time.monotonic() + 0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.01)
        assert len(handle.replicas) == 1
        assert handle.cancelled == 2

    asyncio.run(check())


def test_an_error_of_a_call_is_that_of_each_of_its_requests() -> None:
    async def check() -> None:
        batcher, _ = make_batcher(dying, dying, dying, dying, max_queue=100)
        results = await asyncio.gather(*(batcher.run(IMAGE) for _ in range(2)), return_exceptions=True)
        assert [type(each) for each in results] == [Unavailable] * 2

    asyncio.run(check())


def test_a_late_answer_is_refused_here_or_by_the_replica() -> None:
    async def refuse(_: Images) -> Refusal:
        return Refusal("too late")

    batcher, handle = make_batcher(stuck, refuse)
    with pytest.raises(Unavailable, match="deadline") as refused:
        asyncio.run(batcher.run(IMAGE, time.monotonic() + 0.05))
    assert (refused.value.reason, handle.cancelled) == ("deadline", 1)
    with pytest.raises(Unavailable, match="too late") as refused:
        asyncio.run(batcher.run(IMAGE))
    assert refused.value.reason == "deadline"


def test_the_first_request_of_a_batch_reports_its_times_on_the_local_clock() -> None:
    async def follow(pixels: Images) -> Answer:
        return answer(pixels)._replace(is_first=False)

    batches: list[BatchTimes] = []
    traces: list[tuple[float, BatchTimes]] = []
    batcher, _ = make_batcher(
        healthy, follow, observe=batches.append, trace=lambda sent, times: traces.append((sent, times))
    )
    before = time.perf_counter()
    for _ in range(2):
        asyncio.run(batcher.run(IMAGE))
    assert len(batches) == 1
    assert [times.started - sent for sent, times in traces] == pytest.approx([0.25, 0.25], abs=0.1)
    assert before <= traces[0][0] <= traces[1][0] <= time.perf_counter()
    assert batches[0].computing_s == 0.5
