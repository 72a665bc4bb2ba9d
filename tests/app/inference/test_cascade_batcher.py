"""Test the batcher of a cascade, with a second engine that computes only when the test lets it."""

import asyncio
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from app.exceptions import Unavailable
from app.inference.batching import Batcher
from app.inference.cascade import CascadeBatcher
from training.runtimes.engine import Engine
from training.store import Cascade, PinnedMember

CLASSES = 4
CONFIDENT, UNSURE = 200, 100  # first pixels
MEMBER = PinnedMember(name="resnet", version=1, files={})
CASCADE = Cascade(members=(MEMBER, MEMBER), threshold=0.8, weights=(0.25, 0.75), temperature=1.0)


class PixelEngine(Engine):
    """An engine whose confidence in a class grows with the first pixel of an image. It waits until its gate is open."""

    name = "pixel"
    tolerance = 0.0
    sizes = (1,)

    def __init__(self, favored: int) -> None:
        self.favored = favored
        self.batches: list[list[int]] = []
        self.started = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.batches.append(images[:, 0, 0, 0].tolist())
        self.started.set()
        assert self.gate.wait(10)
        logits = np.zeros((len(images), CLASSES), np.float32)
        logits[:, self.favored] = images[:, 0, 0, 0] / 50
        return logits


def pictures(*values: int) -> NDArray[np.uint8]:
    return np.array(values, np.uint8)[:, None, None, None] * np.ones((1, 3, 32, 32), np.uint8)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    exponentials = np.exp(logits.astype(np.float64))
    result: NDArray[np.float64] = exponentials / exponentials.sum(1, keepdims=True)
    return result


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  the engine threads send no event
            await asyncio.sleep(0.001)


class Setup:
    """A cascade with its engines and the counts that it reports."""

    def __init__(self, max_batch: int = 8, max_queue: int = 8) -> None:
        self.first, self.second = PixelEngine(0), PixelEngine(1)
        self.observed: list[tuple[int, int]] = []
        self.first_batcher = Batcher(self.first, max_batch, max_queue)
        self.second_batcher = Batcher(self.second, max_batch, max_queue)
        self.batcher = CascadeBatcher(
            CASCADE, self.first_batcher, self.second_batcher, lambda *counts: self.observed.append(counts)
        )


def test_confident_images_never_reach_the_second_member() -> None:
    async def scenario() -> None:
        setup = Setup()
        scores = await setup.batcher.run(pictures(CONFIDENT, CONFIDENT))
        np.testing.assert_array_equal(scores.logits, PixelEngine(0)(pictures(CONFIDENT, CONFIDENT)))
        assert setup.second.batches == []
        assert setup.observed == [(2, 0)]

    asyncio.run(scenario())


def test_other_images_get_the_weighted_mean_of_both_members() -> None:
    async def scenario() -> None:
        setup = Setup()
        scores = await setup.batcher.run(pictures(CONFIDENT, UNSURE, UNSURE))
        assert setup.second.batches == [[UNSURE, UNSURE]]
        assert setup.observed == [(3, 2)]
        first, second = (softmax(PixelEngine(favored)(pictures(CONFIDENT, UNSURE, UNSURE))) for favored in (0, 1))
        expected = np.concatenate([first[:1], 0.25 * first[1:] + 0.75 * second[1:]])
        np.testing.assert_allclose(softmax(scores.logits), expected, rtol=1e-5)
        order, probabilities = scores.ranking
        assert order[:, 0].tolist() == [0, 1, 1]
        np.testing.assert_allclose(probabilities[:, 0], expected.max(1), rtol=1e-5)

    asyncio.run(scenario())


def test_full_familiarity_is_the_energy_of_the_mean_of_both_members_and_leaves_the_answer() -> None:
    async def scenario() -> None:
        setup = Setup()
        images = pictures(CONFIDENT, UNSURE)
        fast = await setup.batcher.run(images)
        full = await setup.batcher.run(images, full_familiarity=True)
        assert setup.second.batches == [[UNSURE], [CONFIDENT, UNSURE]]
        assert setup.observed == [(2, 1), (2, 2)]
        np.testing.assert_array_equal(full.logits, fast.logits)
        first, second = (PixelEngine(favored)(images) for favored in (0, 1))
        for scores, logits in ((fast, first), (full, (first + second) / 2)):
            np.testing.assert_allclose(scores.familiarity, np.log(np.exp(logits).sum(1)), rtol=1e-6)

    asyncio.run(scenario())


def test_an_image_that_is_decoded_with_its_batch_is_decoded_once() -> None:
    def decode() -> NDArray[np.uint8]:
        decoded.append(UNSURE)
        picture: NDArray[np.uint8] = pictures(UNSURE)[0]
        return picture

    async def scenario() -> None:
        setup = Setup()
        assert (await setup.batcher.run(decode)).logits.shape == (1, CLASSES)
        assert setup.second.batches == [[UNSURE]]

    decoded: list[int] = []
    asyncio.run(scenario())
    assert decoded == [UNSURE]


def test_an_image_that_is_sent_on_does_not_delay_the_rest_of_its_batch() -> None:
    async def scenario() -> None:
        setup = Setup()
        setup.second.gate.clear()
        unsure = asyncio.create_task(setup.batcher.run(pictures(UNSURE)))
        sure = asyncio.create_task(setup.batcher.run(pictures(CONFIDENT)))
        await asyncio.wait_for(sure, 10)
        assert setup.first.batches == [[UNSURE, CONFIDENT]]  # both were in one batch
        await asyncio.to_thread(setup.second.started.wait, 10)
        await asyncio.wait_for(setup.batcher.run(pictures(CONFIDENT)), 10)
        assert not unsure.done()
        setup.second.gate.set()
        assert (await unsure).ranking[0][0, 0] == 1

    asyncio.run(scenario())


def test_images_that_wait_for_either_member_fill_the_queue() -> None:
    async def scenario() -> None:
        setup = Setup(max_queue=3)
        setup.second.gate.clear()
        computed = asyncio.create_task(setup.batcher.run(pictures(UNSURE)))
        await asyncio.to_thread(setup.second.started.wait, 10)
        waiting = [asyncio.create_task(setup.second_batcher.run(pictures(UNSURE))) for _ in range(2)]
        await asyncio.sleep(0)
        assert setup.batcher.queued == 2
        await setup.batcher.run(pictures(CONFIDENT))
        with pytest.raises(Unavailable, match="2 images are waiting"):
            await setup.batcher.run(pictures(CONFIDENT, CONFIDENT))
        assert setup.first.batches == [[UNSURE], [CONFIDENT]]  # the refused images cost nothing
        setup.second.gate.set()
        await asyncio.gather(computed, *waiting)

    asyncio.run(scenario())


def test_an_accepted_image_is_sent_on_even_if_the_second_queue_has_filled_meanwhile() -> None:
    async def scenario() -> None:
        setup = Setup(max_queue=1)
        setup.first.gate.clear()
        accepted = asyncio.create_task(setup.batcher.run(pictures(UNSURE)))
        await asyncio.to_thread(setup.first.started.wait, 10)
        setup.second.gate.clear()
        others = [asyncio.create_task(setup.second_batcher.run(pictures(UNSURE)))]
        await asyncio.to_thread(setup.second.started.wait, 10)
        others.append(asyncio.create_task(setup.second_batcher.run(pictures(UNSURE))))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="1 images are waiting"):
            await setup.batcher.run(pictures(UNSURE))
        setup.first.gate.set()
        await until(lambda: setup.batcher.queued == 2)  # the first member has sent its image on
        setup.second.gate.set()
        assert (await accepted).ranking[0][0, 0] == 1
        await asyncio.gather(*others)

    asyncio.run(scenario())


def test_the_deadline_holds_for_the_second_member() -> None:
    async def scenario() -> None:
        setup = Setup()
        setup.second.gate.clear()
        computed = asyncio.create_task(setup.batcher.run(pictures(UNSURE)))
        await asyncio.to_thread(setup.second.started.wait, 10)
        deadline = time.monotonic() + 0.3
        late = asyncio.create_task(setup.batcher.run(pictures(UNSURE), deadline))
        await until(lambda: late.done() or setup.second_batcher.queued > 0)
        assert not late.done()
        await until(lambda: time.monotonic() > deadline)
        setup.second.gate.set()
        with pytest.raises(Unavailable, match="deadline"):
            await late
        await computed
        assert setup.second.batches == [[UNSURE]]

    asyncio.run(scenario())


def test_a_cancelled_request_leaves_the_queue_of_the_second_member() -> None:
    async def scenario() -> None:
        setup = Setup()
        setup.second.gate.clear()
        computed = asyncio.create_task(setup.batcher.run(pictures(UNSURE)))
        await asyncio.to_thread(setup.second.started.wait, 10)
        gone = asyncio.create_task(setup.batcher.run(pictures(UNSURE)))
        await until(lambda: setup.second_batcher.queued > 0)
        gone.cancel()
        await asyncio.wait([gone])
        assert setup.batcher.queued == 0
        setup.second.gate.set()
        await computed
        assert setup.second.batches == [[UNSURE]]

    asyncio.run(scenario())
