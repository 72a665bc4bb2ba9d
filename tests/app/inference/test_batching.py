"""Test the batcher, with an engine that computes only when the test lets it."""

import asyncio
import io
import os
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from app.exceptions import DamagedImage, Unavailable, UnsupportedImage
from app.inference import batching
from app.inference.batching import Batcher, BatchOutput, Scores
from app.inference.decoding import Decoders, QuickImage
from app.settings import Settings
from training.runtimes.engine import Engine


class SlowEngine(Engine):
    """An engine that returns the first pixel of each image and waits until the test opens the gate."""

    name = "slow"
    tolerance = 0.0
    sizes = (1,)

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.started = threading.Event()
        self.gate = threading.Event()

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.batches.append(len(images))
        self.started.set()
        assert self.gate.wait(10)
        if (images[:, 0, 0, 0] == 255).any():
            raise RuntimeError("poisoned")
        return images[:, :1, 0, 0].astype(np.float32)


def pictures(*values: int) -> NDArray[np.uint8]:
    return np.array(values, np.uint8)[:, None, None, None] * np.ones((1, 3, 32, 32), np.uint8)


async def busy(batcher: Batcher, engine: SlowEngine) -> "asyncio.Task[Scores]":
    """Occupy the engine until its gate opens."""
    task = asyncio.create_task(batcher.run(pictures(0)))
    await asyncio.to_thread(engine.started.wait, 10)
    return task


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  counters signal no event
            await asyncio.sleep(0.005)


def test_a_lone_request_is_computed_at_once() -> None:
    async def scenario() -> None:
        engine = SlowEngine()
        engine.gate.set()
        assert (await Batcher(engine, 8, 8).run(pictures(3, 4))).logits.tolist() == [[3], [4]]
        assert engine.batches == [2]

    asyncio.run(scenario())


def test_a_lone_image_is_computed_in_the_loop_where_the_thread_has_no_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class NotingEngine(Engine):
        name = "noting"
        tolerance = 0.0
        sizes = (1,)
        takes_s = 0.0

        def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
            in_loop.append(threading.current_thread() is threading.main_thread())
            time.sleep(self.takes_s)
            return images[:, :1, 0, 0].astype(np.float32)

    async def scenario() -> None:
        engine = NotingEngine()
        batcher = Batcher(engine, 8, 8, shares_cpu=True)

        async def answered(*values: int) -> None:
            scores = await asyncio.gather(*(batcher.run(pictures(value)) for value in values))
            assert [each.logits.item() for each in scores] == list(values)
            await asyncio.wrap_future(batcher._thread.submit(int))  # the thread has checked the queue once more

        await answered(1)
        await answered(2)
        await answered(3, 4)
        engine.takes_s = 0.6
        await answered(5)
        await answered(6)

    in_loop: list[bool] = []
    monkeypatch.setattr(batching, "_BRIEF_S", 0.5)
    asyncio.run(scenario())
    # The thread gets the first image because its duration is unknown yet. It also gets several images at once, and an
    # image after a slow one.
    assert in_loop == [False, True, False, True, False]


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness of their own")
def test_the_engine_thread_has_a_lower_priority_on_a_single_cpu() -> None:
    class NotingEngine(SlowEngine):
        def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
            niceness.append(os.getpriority(os.PRIO_PROCESS, 0))
            return super().__call__(images)

    niceness: list[int] = []
    engine = NotingEngine()
    engine.gate.set()
    own = os.getpriority(os.PRIO_PROCESS, 0)
    asyncio.run(Batcher(engine, 8, 8, shares_cpu=True).run(pictures(1)))
    assert niceness == [min(own + 5, 19)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


def test_what_queues_while_the_engine_is_busy_is_computed_together() -> None:
    async def scenario() -> None:
        engine = SlowEngine()
        batcher = Batcher(engine, max_batch=8, max_queue=100)
        first = await busy(batcher, engine)
        others = [asyncio.create_task(batcher.run(pictures(*range(n, n + 3)))) for n in (1, 11, 21)]
        await asyncio.sleep(0)
        assert batcher.queued == 9
        engine.gate.set()
        await first
        assert [(await other).logits[:, 0].tolist() for other in others] == [[1, 2, 3], [11, 12, 13], [21, 22, 23]]
        assert engine.batches == [1, 6, 3]  # a batch never splits a request
        assert batcher.queued == 0

    asyncio.run(scenario())


def test_images_are_decoded_with_their_batch_and_only_a_damaged_one_fails() -> None:
    def decoding(value: int) -> Callable[[], NDArray[np.uint8]]:
        def decode() -> NDArray[np.uint8]:
            decoded.append((value, engine.batches.copy()))
            if value < 0:
                raise DamagedImage("truncated")
            picture: NDArray[np.uint8] = pictures(value)[0]
            return picture

        return decode

    async def scenario() -> None:
        batcher = Batcher(engine, max_batch=8, max_queue=4)
        first = await busy(batcher, engine)
        images = (decoding(1), decoding(-2), pictures(3), decoding(4))
        others = [asyncio.create_task(batcher.run(each)) for each in images]
        await asyncio.sleep(0)
        assert batcher.queued == 4
        assert decoded == []
        with pytest.raises(Unavailable, match="4 images are waiting"):
            await batcher.run(decoding(5))
        engine.gate.set()
        await first
        with pytest.raises(DamagedImage, match="truncated"):
            await others.pop(1)
        assert [(await other).logits.item() for other in others] == [1, 3, 4]
        with pytest.raises(DamagedImage):  # a batch of damaged images only
            await batcher.run(decoding(-6))
        assert (await batcher.run(decoding(7))).logits.item() == 7

    engine = SlowEngine()
    decoded: list[tuple[int, list[int]]] = []
    asyncio.run(scenario())
    assert decoded == [(1, [1]), (-2, [1]), (4, [1]), (-6, [1, 3]), (7, [1, 3])]
    assert engine.batches == [1, 3, 1]


def test_images_that_decoder_threads_deliver_join_the_queue_and_only_a_damaged_one_fails() -> None:
    def image(value: int, content: bytes | None = None) -> QuickImage:
        file = io.BytesIO()
        Image.new("RGB", (40, 40), (value, 0, 0)).save(file, "PNG")
        return QuickImage(decoders, io.BytesIO(content or file.getvalue()), "a", time.monotonic() + 60)

    async def scenario() -> None:
        batcher = Batcher(engine, max_batch=8, max_queue=2)
        first = await busy(batcher, engine)
        others = [asyncio.create_task(batcher.run(image(value))) for value in (1, 2)]
        await until(lambda: batcher.queued == 2)
        with pytest.raises(Unavailable, match="2 images are waiting"):
            await batcher.run(image(3))
        with pytest.raises(UnsupportedImage):
            await batcher.run(image(4, b"no image"))
        gone = asyncio.create_task(batcher.run(image(5)))
        await asyncio.sleep(0)
        gone.cancel()
        engine.gate.set()
        await first
        assert sorted([(await other).logits.item() for other in others]) == [1, 2]
        assert (await batcher.run(image(6))).logits.item() == 6
        assert (decoders.waiting, batcher.queued) == (0, 0)

    engine, decoders = SlowEngine(), Decoders(Settings())
    asyncio.run(scenario())
    assert engine.batches == [1, 2, 1]


def test_classes_are_ranked_for_the_whole_batch() -> None:
    logits = np.array([[0, 2, 1], [3, 3, -700], [-1, -2, 0]], np.float32)
    computed = BatchOutput(logits)
    order, probabilities = Scores(computed, slice(1, 3)).ranking
    assert order.tolist() == [[0, 1, 2], [2, 0, 1]]  # equal logits keep the order of their classes
    softmax = np.exp(logits[1:].astype(float)) / np.exp(logits[1:].astype(float)).sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities, -np.sort(-softmax))
    assert computed.ranking is computed.ranking
    np.testing.assert_allclose(
        Scores(computed, slice(1, 3)).familiarity, np.log(np.exp(logits[1:].astype(float)).sum(1))
    )


def test_a_full_queue_refuses_at_once() -> None:
    async def scenario() -> None:
        engine = SlowEngine()
        batcher = Batcher(engine, max_batch=4, max_queue=4)
        first = await busy(batcher, engine)
        waiting = asyncio.create_task(batcher.run(pictures(1, 2, 3)))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="3 images are waiting"):
            await batcher.run(pictures(4, 5))
        engine.gate.set()
        await asyncio.gather(first, waiting)

    asyncio.run(scenario())


def test_work_past_its_deadline_is_refused_and_not_computed() -> None:
    async def scenario() -> None:
        engine = SlowEngine()
        batcher = Batcher(engine, max_batch=4, max_queue=100)
        first = await busy(batcher, engine)
        late = asyncio.create_task(batcher.run(pictures(1), time.monotonic() + 0.001))
        patient = asyncio.create_task(batcher.run(pictures(2), time.monotonic() + 60))
        await asyncio.sleep(0.05)
        engine.gate.set()
        with pytest.raises(Unavailable, match="deadline"):
            await late
        assert (await patient).logits.tolist() == [[2]]
        await first
        assert engine.batches == [1, 1]

    asyncio.run(scenario())


def test_what_cannot_be_counted_is_computed_all_the_same() -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    async def scenario() -> None:
        engine = SlowEngine()
        engine.gate.set()
        batcher = Batcher(engine, 8, 8, full)
        for _ in range(2):
            assert (await asyncio.wait_for(batcher.run(pictures(3)), 10)).logits.tolist() == [[3]]

    asyncio.run(scenario())


def test_a_batch_that_cannot_be_put_together_fails_and_the_next_one_is_computed() -> None:
    async def scenario() -> None:
        engine = SlowEngine()
        batcher = Batcher(engine, 8, 8)
        first = await busy(batcher, engine)
        others = [asyncio.create_task(batcher.run(each)) for each in (pictures(1), pictures(2)[:, :, :5])]
        await asyncio.sleep(0)
        engine.gate.set()
        await first
        for other in others:
            with pytest.raises(ValueError, match="dimension"):
                await other
        assert (await asyncio.wait_for(batcher.run(pictures(3)), 10)).logits.tolist() == [[3]]

    asyncio.run(scenario())


def test_a_cancelled_request_costs_nothing() -> None:
    async def scenario() -> None:
        engine = SlowEngine()
        batcher = Batcher(engine, max_batch=4, max_queue=2)
        first = await busy(batcher, engine)
        gone = asyncio.create_task(batcher.run(pictures(1, 2)))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        stays = asyncio.create_task(batcher.run(pictures(3)))  # takes the queue places of the cancelled request
        await asyncio.sleep(0)
        engine.gate.set()
        assert (await stays).logits.tolist() == [[3]]
        await first
        assert engine.batches == [1, 1]

    asyncio.run(scenario())


def test_an_engine_failure_reaches_its_batch_only() -> None:
    async def scenario() -> None:
        engine = SlowEngine()
        engine.gate.set()
        batcher = Batcher(engine, max_batch=4, max_queue=100)
        with pytest.raises(RuntimeError, match="poisoned"):
            await batcher.run(pictures(255))
        assert (await batcher.run(pictures(7))).logits.tolist() == [[7]]

    asyncio.run(scenario())


def test_background_work_waits_until_no_prediction_does() -> None:
    async def scenario() -> None:
        engine = SlowEngine()
        batcher = Batcher(engine, max_batch=8, max_queue=100)
        first = await busy(batcher, engine)
        background = asyncio.create_task(batcher.run_in_background(pictures(*range(20))))
        await asyncio.sleep(0)
        predictions = [asyncio.create_task(batcher.run(pictures(*range(6)))) for _ in range(2)]
        await asyncio.sleep(0)
        assert (batcher.queued, batcher.queued_in_background, batcher.waiting) == (12, 20, 32)
        engine.gate.set()
        await asyncio.gather(first, *predictions)
        assert (await background).tolist() == [[1]] * 20  # the engine of this test has one class
        assert engine.batches == [1, 6, 6, 8, 8, 4]
        assert batcher.waiting == 0

    asyncio.run(scenario())


def test_background_work_takes_no_place_of_a_prediction_and_is_refused_if_the_queue_is_full() -> None:
    async def scenario() -> None:
        engine = SlowEngine()
        batcher = Batcher(engine, max_batch=4, max_queue=8)
        first = await busy(batcher, engine)
        background = asyncio.create_task(batcher.run_in_background(pictures(*range(6))))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="6 images are waiting"):
            await batcher.run_in_background(pictures(1, 2, 3))
        predictions = [asyncio.create_task(batcher.run(pictures(value, value))) for value in range(4)]
        await asyncio.sleep(0)
        assert batcher.waiting == 14
        engine.gate.set()
        await asyncio.gather(first, background, *predictions)

    asyncio.run(scenario())


def test_background_work_that_is_late_cancelled_or_fails_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        engine = SlowEngine()
        batcher = Batcher(engine, max_batch=4, max_queue=100)
        first = await busy(batcher, engine)
        late = asyncio.create_task(batcher.run_in_background(pictures(*range(6)), time.monotonic() - 1))
        failing = asyncio.create_task(batcher.run_in_background(pictures(255, *range(8))))
        gone = asyncio.create_task(batcher.run_in_background(pictures(*range(6))))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait([gone])
        assert batcher.queued_in_background == 15
        engine.gate.set()
        await first
        with pytest.raises(Unavailable, match="deadline"):
            await late
        with pytest.raises(RuntimeError, match="poisoned"):
            await failing
        assert (await batcher.run(pictures(3))).logits.tolist() == [[3]]
        assert batcher.waiting == 0

    asyncio.run(scenario())


class Photo(QuickImage):
    """A photo that is decoded when the test says so."""

    def __init__(self, value: int) -> None:
        self.decoded: NDArray[np.uint8] | Exception = pictures(value)
        self.is_delivered = False

    def start(self, deliver: Callable[[NDArray[np.uint8] | Exception], None]) -> None:
        self.deliver = deliver

    def stop(self) -> bool:
        return not self.is_delivered

    async def finish(self) -> None:
        """Deliver the photo from another thread, as a decoder does."""
        self.is_delivered = True
        await asyncio.to_thread(self.deliver, self.decoded)


async def start_photos(batcher: Batcher, count: int) -> tuple[list[Photo], "list[asyncio.Task[Scores]]"]:
    photos = [Photo(value) for value in range(1, count + 1)]
    tasks = [asyncio.create_task(batcher.run(photo)) for photo in photos]
    await asyncio.sleep(0)
    return photos, tasks


@pytest.fixture
def open_engine(monkeypatch: pytest.MonkeyPatch) -> SlowEngine:
    """An engine that computes at once, for batches that wait for photos without a limit of time."""
    monkeypatch.setattr(batching, "_MAX_GATHERING_S", 60.0)
    engine = SlowEngine()
    engine.gate.set()
    return engine


def test_a_batch_waits_for_more_photos_while_they_keep_all_cpus_busy(open_engine: SlowEngine) -> None:
    async def scenario() -> None:
        batcher = Batcher(open_engine, 8, 8, busy_photos=1)
        photos, tasks = await start_photos(batcher, 4)
        for photo in photos:
            await photo.finish()
        scores = await asyncio.gather(*tasks)
        assert [each.logits.item() for each in scores] == [1, 2, 3, 4]
        # The third photo leaves one in decoding, which does not keep the CPUs busy. The fourth may join its batch.
        assert open_engine.batches in ([3, 1], [4])

    asyncio.run(scenario())


def test_a_batch_of_enough_images_does_not_wait(open_engine: SlowEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(batching, "_ENOUGH_IMAGES", 2)
        photos, tasks = await start_photos(Batcher(open_engine, 8, 8, busy_photos=1), 5)
        await photos[0].finish()
        assert not open_engine.started.is_set()
        await photos[1].finish()
        await asyncio.gather(*tasks[:2])
        assert open_engine.batches == [2]
        for task in tasks[2:]:
            task.cancel()

    asyncio.run(scenario())


def test_a_batch_waits_for_photos_only_for_a_limited_time(
    open_engine: SlowEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(batching, "_MAX_GATHERING_S", 0.01)
        photos, tasks = await start_photos(Batcher(open_engine, 8, 8, busy_photos=1), 5)
        await photos[0].finish()
        assert (await tasks[0]).logits.item() == 1
        for task in tasks[1:]:
            task.cancel()

    asyncio.run(scenario())


def test_a_batch_does_not_wait_for_photos_that_fail_or_that_nobody_wants(open_engine: SlowEngine) -> None:
    async def scenario() -> None:
        photos, tasks = await start_photos(Batcher(open_engine, 8, 8, busy_photos=1), 4)
        await photos[0].finish()
        photos[1].decoded = DamagedImage("cut off")
        await photos[1].finish()
        with pytest.raises(DamagedImage, match="cut off"):
            await tasks[1]
        assert not open_engine.started.is_set()
        tasks[2].cancel()
        assert (await tasks[0]).logits.item() == 1
        tasks[3].cancel()

    asyncio.run(scenario())
