"""Test decoding in a separate process: it returns the same pixels, enforces hard limits and leaves no process."""

import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress

import jpegs
import numpy as np
import pytest
from PIL import Image
from server import wait_for

from app.exceptions import DamagedImage, Problem, TooLarge, UnsupportedImage
from app.inference.decode_process import DecodeProcess
from app.inference.images import encoded
from app.machine import MIB

Start = Callable[..., DecodeProcess]
COSTLY = jpegs.with_scans(200, 4000)


@pytest.fixture
def start() -> Iterator[Start]:
    started = []

    def start(**limits: float) -> DecodeProcess:
        started.append(DecodeProcess(MIB, 50_000_000, **limits))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for process in started:
        process.close()


def pid(process: DecodeProcess) -> int:
    assert process._process
    return process._process.pid


def error_of(process: DecodeProcess, data: bytes) -> type[Problem]:
    with pytest.raises(Problem) as raised:
        process.decode(data)
    return raised.type


def test_the_pixels_are_those_of_the_server(start: Start) -> None:
    data, process = jpegs.with_scans(3, 600), start()
    pixels, warnings = process.decode(data)
    np.testing.assert_array_equal(pixels, encoded.decode(data, MIB, MIB))
    assert warnings == []
    assert process.cpu_s > 0


def test_the_warnings_are_those_of_the_server(start: Start) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(buffer, "JPEG")
    image = encoded.EncodedImage(buffer.getvalue()[:-2], MIB, MIB)
    expected = image.decode()
    pixels, warnings = start().decode(buffer.getvalue()[:-2])
    np.testing.assert_array_equal(pixels, expected)
    assert warnings == image.warnings == ["the JPEG is cut off: its end is missing; the picture is whole"]


def test_one_process_decodes_many_images_and_keeps_running_after_errors(start: Start) -> None:
    process = start()
    assert [error_of(process, data) for data in (b"hello", b"")] == [UnsupportedImage, DamagedImage]
    before = pid(process)
    process.decode(jpegs.with_scans(3, 40))
    assert error_of(process, bytes(MIB + 1)) == TooLarge
    process.decode(COSTLY)
    assert pid(process) == before


def test_an_image_that_takes_too_long_ends_the_process_and_the_next_one_is_decoded(start: Start) -> None:
    process = start(max_cpu_s=0.02)
    with pytest.raises(TooLarge, match=r"more than 0\.02 s of CPU time"):
        process.decode(COSTLY)
    assert process.cpu_s == 0.02
    assert process.decode(jpegs.with_scans(3, 40))[0].shape == (3, 32, 32)


@pytest.mark.skipif(not hasattr(signal, "SIGPROF") or not os.path.exists("/proc"), reason="needs Linux")  # noqa: PTH110
def test_an_image_that_takes_too_much_memory_is_a_problem(start: Start) -> None:
    with pytest.raises((TooLarge, DamagedImage)):
        start(max_memory_bytes=64 * MIB).decode(jpegs.with_scans(3, 7000))


def test_a_decoder_that_crashes_is_a_problem_of_its_image(start: Start) -> None:
    process = start()
    process.decode(jpegs.with_scans(3, 40))
    os.kill(pid(process), signal.SIGSEGV)
    with suppress(DamagedImage):  # if the process has not ended before it gets the image
        process.decode(jpegs.with_scans(3, 40))
    assert process.decode(jpegs.with_scans(3, 40))[0].shape == (3, 32, 32)


def test_the_process_ends_with_the_server(start: Start) -> None:
    process = start()
    process.decode(jpegs.with_scans(3, 40))
    child = process._process
    assert child
    assert child.stdin
    child.stdin.close()  # the kernel does this when the server is killed
    assert wait_for(lambda: child.poll() is not None, 30)


@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="needs Linux")  # noqa: PTH110
def test_it_does_not_know_the_api_keys(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR100_API_KEYS", "the-secret-of-this-test")
    process = start()
    process.decode(jpegs.with_scans(3, 40))
    with open(f"/proc/{pid(process)}/environ", "rb") as environment:  # noqa: PTH123
        assert b"the-secret-of-this-test" not in environment.read()


def test_it_runs_at_low_priority_without_the_servers_memory(start: Start) -> None:
    process = start()
    process.decode(jpegs.with_scans(3, 40))
    assert os.getpriority(os.PRIO_PROCESS, pid(process)) == min(os.getpriority(os.PRIO_PROCESS, 0) + 10, 19)
