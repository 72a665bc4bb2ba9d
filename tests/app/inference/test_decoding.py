"""Test decoding for many clients: the lane of an image, the order of waiting clients, and refused images."""

import asyncio
import io
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from app.exceptions import TooManyRequests, Unavailable, UnsupportedImage
from app.inference import decoding
from app.inference.decoding import Decoders, File, QuickImage
from app.inference.images.cost import DecodeCost
from app.inference.images.encoded import CostlyImage
from app.machine import MIB
from app.settings import Settings

COSTS = {b"quick": 1, b"medium": 30, b"costly": 500, b"apart": 1}


def files(*contents: bytes) -> list[File]:
    return [(content.decode(), io.BytesIO(content)) for content in contents]


def soon() -> float:
    return time.monotonic() + 60


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  counters signal no event
            await asyncio.sleep(0.005)


class Gate:
    """A replacement for the decoders. An image's name gives its cost, and decoding waits until the gate is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.begun: list[bytes] = []
        self.lanes: dict[bytes, str] = {}
        self.entered = threading.Event()
        self.open = threading.Event()
        gate = self

        class Image:
            def __init__(self, data: bytes, max_bytes: int, max_pixels: int):
                assert max_bytes < max_pixels
                if data == b"damaged":
                    raise UnsupportedImage("no image")
                self.data = data
                self.cost = DecodeCost(COSTS[data.rstrip(b"0123456789")], MIB)
                self.needs_process = data.startswith(b"apart")
                self.warnings = [f"a warning about {data.decode()}"]

            def decode(self) -> NDArray[np.uint8]:
                return gate.wait(self.data)

        class Process:
            def __init__(self, *_: Any):
                self.cpu_s = 0.0

            def decode(self, data: bytes) -> tuple[NDArray[np.uint8], list[str]]:
                self.cpu_s += 0.5
                return gate.wait(data), [f"a warning about {data.decode()}"]

            def close(self) -> None:
                pass

        monkeypatch.setattr(decoding, "EncodedImage", Image)
        monkeypatch.setattr(decoding, "DecodeProcess", Process)

    def wait(self, data: bytes) -> NDArray[np.uint8]:
        self.begun.append(data)
        self.lanes[data] = threading.current_thread().name.partition("_")[0]
        self.entered.set()
        assert self.open.wait(10)
        return np.full((3, 32, 32), data[-1], np.uint8)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


@pytest.fixture
def two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.inference.decoding.cpu_count", lambda: 2)


def test_an_image_takes_the_lane_of_its_cost(gate: Gate) -> None:
    async def scenario() -> None:
        gate.open.set()
        names = (b"quick1", b"medium2", b"costly3", b"apart4")
        pixels, warnings, _ = await Decoders(Settings()).decode(files(*names), "a", soon())
        assert pixels[:, 0, 0, 0].tolist() == [ord("1"), ord("2"), ord("3"), ord("4")]
        assert warnings == [[f"a warning about {name.decode()}"] for name in names]
        lanes = ("decoder", "medium-decoder", "costly-decoder", "costly-decoder")
        assert gate.lanes == dict(zip(names, lanes, strict=True))

    asyncio.run(scenario())


def encode(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (48, 48), 90).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "is_small"),
    [
        (encode("PNG"), True),
        (encode("JPEG", progressive=True), True),
        (encode("BMP"), True),
        (encode("WEBP"), True),
        (encode("JPEG")[:2] + 1_600 * b"\xff\xfe\0\2" + encode("JPEG")[2:], False),
        (encode("PNG", icc_profile=b"compressed"), False),
        (encode("GIF"), False),
        (encode("TIFF"), False),
        (encode("PNG") + bytes(8 << 10), False),
    ],
    ids=["PNG", "JPEG", "BMP", "WebP", "JPEG of many segments", "PNG with a profile", "GIF", "TIFF", "large"],
)
def test_only_small_images_with_a_short_header_are_decoded_with_their_batch(
    content: bytes, is_small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.inference.decoding.cpu_count", lambda: 2)
    decode = Decoders(Settings()).small_image_decoder([("a", io.BytesIO(content))])
    assert (decode is not None) == is_small
    if decode:
        assert decode().mean() == pytest.approx(90, abs=1)


def quick_image(decoders: Decoders, name: bytes, deadline: float | None = None) -> QuickImage:
    return QuickImage(decoders, io.BytesIO(name), "a", deadline or soon())


class Delivery:
    """The result that a decoder thread delivers, and the name of the thread."""

    def __init__(self) -> None:
        self.result: NDArray[np.uint8] | Exception | None = None
        self.thread = ""

    def __call__(self, result: NDArray[np.uint8] | Exception) -> None:
        self.thread = threading.current_thread().name.partition("_")[0]
        self.result = result


def test_the_thread_that_decodes_a_lone_image_delivers_it(gate: Gate) -> None:
    async def scenario() -> None:
        decoders, delivery = Decoders(Settings()), Delivery()
        image = quick_image(decoders, b"quick1")
        image.start(delivery)
        await until(lambda: gate.begun == [b"quick1"])
        assert decoders.waiting == 1
        gate.open.set()
        await until(lambda: delivery.result is not None)
        assert delivery.result is image.pixels
        assert (image.pixels.shape, image.pixels[0, 0, 0, 0]) == ((1, 3, 32, 32), ord("1"))
        assert (delivery.thread, image.warnings, decoders.waiting) == ("decoder", ["a warning about quick1"], 0)
        assert image.decoding_s > 0
        image.stop()
        assert decoders.waiting == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("name", [b"medium1", b"costly1", b"apart1"])
def test_a_lone_image_of_another_lane_is_decoded_there_and_its_header_is_read_once(
    name: bytes, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        gate.open.set()
        decoders, delivery = Decoders(Settings()), Delivery()
        image = quick_image(decoders, name)
        image.start(delivery)
        await until(lambda: delivery.result is not None)
        image.stop()
        assert isinstance(delivery.result, CostlyImage)
        assert gate.begun == []
        monkeypatch.delattr(decoding, "EncodedImage")
        pixels, *_ = await decoders.decode(files(name), "a", soon(), opened=image.opened)
        assert (pixels[0, 0, 0, 0], decoders.waiting) == (ord("1"), 0)

    asyncio.run(scenario())


def test_a_lone_image_is_refused_if_it_is_late_and_forgotten_if_it_is_stopped(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.inference.decoding.cpu_count", lambda: 1)

    async def scenario() -> None:
        decoders, deliveries = Decoders(Settings(max_queue=4)), [Delivery() for _ in range(3)]
        first, late, stopped = (
            quick_image(decoders, b"quick1"),
            quick_image(decoders, b"quick2", time.monotonic() + 0.1),
            quick_image(decoders, b"quick3"),
        )
        first.start(deliveries[0])
        await until(lambda: gate.begun == [b"quick1"])
        late.start(deliveries[1])
        stopped.start(deliveries[2])
        with pytest.raises(Unavailable, match="waiting to be decoded already"):
            quick_image(decoders, b"quick4").start(Delivery())
        stopped.stop()
        await until(lambda: isinstance(deliveries[1].result, Unavailable))
        assert decoders.waiting == 1
        gate.open.set()
        await until(lambda: deliveries[0].result is not None)
        assert (gate.begun, deliveries[2].result, decoders.waiting) == ([b"quick1"], None, 0)

    asyncio.run(scenario())


def test_costly_images_delay_only_each_other(gate: Gate) -> None:
    async def scenario() -> None:
        decoders = Decoders(Settings())
        costly = [asyncio.create_task(decoders.decode(files(b"costly1", b"quick2"), "a", soon())) for _ in range(10)]
        await until(lambda: decoders.held_up == 20 and len(gate.begun) == 2)
        assert decoders.waiting == 0
        assert set(gate.begun) == {b"costly1"}  # each of the two processes decodes one
        quick = asyncio.create_task(decoders.decode(files(b"quick3", b"quick4"), "a", soon()))
        await until(lambda: b"quick3" in gate.begun)
        gate.open.set()
        assert (await quick).pixels[:, 0, 0, 0].tolist() == [ord("3"), ord("4")]
        for each in await asyncio.gather(*costly):
            assert each.pixels[:, 0, 0, 0].tolist() == [ord("1"), ord("2")]
        assert (decoders.waiting, decoders.held_up) == (0, 0)

    asyncio.run(scenario())


@pytest.mark.usefixtures("two_processors")
def test_another_clients_image_is_next_however_many_images_one_client_has(gate: Gate) -> None:
    async def scenario() -> None:
        decoders = Decoders(Settings())
        many = [asyncio.create_task(decoders.decode(files(b"costly1"), "a", soon())) for _ in range(10)]
        await until(lambda: len(gate.begun) >= 2)
        one = asyncio.create_task(decoders.decode(files(b"costly2"), "b", soon()))
        await until(lambda: decoders.held_up >= 11)
        gate.open.set()
        await one
        assert b"costly2" in gate.begun[:4]
        await asyncio.gather(*many)

    asyncio.run(scenario())


@pytest.mark.parametrize(("kind", "what"), [(b"quick", "waiting"), (b"costly", "wait for costly")])
def test_images_above_the_limit_are_refused(
    gate: Gate, kind: bytes, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.inference.decoding.cpu_count", lambda: 1)

    async def scenario() -> None:
        decoders = Decoders(Settings(max_queue=4))
        first = asyncio.create_task(decoders.decode(files(kind + b"1", b"quick2"), "a", soon()))
        assert await asyncio.to_thread(gate.entered.wait, 10)
        late = asyncio.create_task(decoders.decode(files(kind + b"3"), "a", time.monotonic() + 0.2))
        await until(lambda: (decoders.held_up if kind == b"costly" else decoders.waiting) >= 3)
        with pytest.raises(Unavailable, match=f"3 images .*{what}"):
            await decoders.decode(files(kind + b"4"), "a", soon())
        with pytest.raises(Unavailable, match="deadline"):
            await late
        gate.open.set()
        await first
        assert gate.begun[0] == kind + b"1"
        assert kind + b"3" not in gate.begun
        assert (decoders.waiting, decoders.held_up) == (0, 0)

    asyncio.run(scenario())


def test_a_client_is_refused_above_its_share_and_another_one_is_not(gate: Gate) -> None:
    async def scenario() -> None:
        decoders = Decoders(Settings(max_queue=8))
        waiting = [asyncio.create_task(decoders.decode(files(*[b"quick1"] * 3), "a", soon())) for _ in range(2)]
        await asyncio.sleep(0)
        assert decoders.waiting == 6
        assert decoders.is_full_for("a")
        assert not decoders.is_full_for("b")
        waiting.append(asyncio.create_task(decoders.decode(files(b"quick2"), "b", soon())))
        await asyncio.sleep(0)
        assert decoders.waiting == 7
        assert not decoders.is_full_for("b")  # it uses one of its two places
        with pytest.raises(Unavailable):
            await decoders.decode(files(b"quick3", b"quick3"), "b", soon())
        gate.open.set()
        await asyncio.gather(*waiting)
        assert not decoders.is_full_for("a")

    asyncio.run(scenario())


def test_a_client_with_too_many_costly_images_is_refused_before_its_next_body(gate: Gate) -> None:
    async def scenario() -> None:
        decoders = Decoders(Settings(max_queue=8))
        names = [b"costly1", *[b"quick2"] * 5]
        waiting = asyncio.create_task(decoders.decode(files(*names), "a", soon()))
        await until(lambda: decoders.held_up == 6)
        assert decoders.is_full_for("a")
        assert not decoders.is_full_for("b")
        gate.open.set()
        await waiting
        assert not decoders.is_full_for("a")

    asyncio.run(scenario())


def test_an_image_whose_client_leaves_is_not_decoded(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.inference.decoding.cpu_count", lambda: 1)

    async def scenario() -> None:
        decoders = Decoders(Settings())
        first, gone = (
            asyncio.create_task(decoders.decode(files(name), "a", soon())) for name in (b"costly1", b"costly2")
        )
        assert await asyncio.to_thread(gate.entered.wait, 10)
        await until(lambda: decoders.held_up >= 2)
        gone.cancel()
        await asyncio.wait([gone])
        assert decoders.waiting + decoders.held_up == 1
        gate.open.set()
        await first
        assert gate.begun == [b"costly1"]
        assert (decoders.waiting, decoders.held_up) == (0, 0)

    asyncio.run(scenario())


def test_the_turn_of_a_client_that_leaves_lasts_until_its_thread_has_finished(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.inference.decoding.cpu_count", lambda: 1)

    async def scenario() -> None:
        decoders = Decoders(Settings())
        gone = asyncio.create_task(decoders.decode(files(b"medium1"), "a", soon()))
        assert await asyncio.to_thread(gate.entered.wait, 10)
        gone.cancel()
        await asyncio.wait([gone])
        late = asyncio.create_task(decoders.decode(files(b"medium2"), "a", soon()))
        await asyncio.sleep(0.1)
        assert gate.begun == [b"medium1"]
        gate.open.set()
        await late
        assert gate.begun == [b"medium1", b"medium2"]

    asyncio.run(scenario())


def test_a_request_is_charged_a_unit_for_each_10_ms_of_estimated_decoding(gate: Gate) -> None:
    async def scenario() -> None:
        gate.open.set()
        decoders, units = Decoders(Settings()), list[int]()
        await decoders.decode(files(b"quick1"), "a", soon(), units.append)
        assert units == []  # the request itself is charged the first unit
        await decoders.decode(files(*[b"quick1"] * 9, b"medium2", b"costly3"), "a", soon(), units.append)
        assert sum(units) == 54 - 1  # 539 ms

    asyncio.run(scenario())


def test_a_costly_image_beyond_the_rate_limit_is_not_decoded(gate: Gate) -> None:
    def refuse(_: int) -> None:
        raise TooManyRequests("too many", 1)

    async def scenario() -> None:
        with pytest.raises(TooManyRequests):
            await Decoders(Settings()).decode(files(b"costly1"), "a", soon(), refuse)
        assert gate.begun == []

    asyncio.run(scenario())


def test_a_damaged_image_among_several_is_named(gate: Gate) -> None:
    async def scenario() -> None:
        gate.open.set()
        decoders = Decoders(Settings())
        with pytest.raises(UnsupportedImage) as failed:
            await decoders.decode(files(b"quick1", b"damaged", b"quick2"), "a", soon())
        assert failed.value.detail == "damaged: no image"
        assert (decoders.waiting, decoders.held_up) == (0, 0)

    asyncio.run(scenario())
