"""Test decoding in a separate process: it returns the same pixels, enforces hard limits and leaves no process."""

import os
import signal
import time
from collections.abc import Callable, Iterator

import jpegs
import numpy as np
import pytest
from PIL import Image
from server import wait_for

from app import images
from app.decode_cost import MIB
from app.decode_process import DecodeProcess
from app.exceptions import DamagedImage, TooLarge, UnsupportedImage

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


def test_the_pixels_are_those_of_the_server(start: Start) -> None:
    data = jpegs.with_scans(3, 600)
    pixels, cpu_s = start().decode(data)
    np.testing.assert_array_equal(pixels, images.decode(data, MIB, MIB))
    assert cpu_s >= 0


def test_one_process_decodes_many_images_and_keeps_running_after_errors(start: Start) -> None:
    process = start()
    kinds = [type(process.decode(data)[0]) for data in (b"hello", b"", jpegs.with_scans(3, 40), bytes(MIB + 1))]
    assert kinds == [UnsupportedImage, DamagedImage, np.ndarray, TooLarge]
    before = pid(process)
    process.decode(COSTLY)
    assert pid(process) == before


def test_an_image_that_takes_too_long_ends_the_process_and_the_next_one_is_decoded(start: Start) -> None:
    process = start(max_cpu_s=0.02)
    problem, cpu_s = process.decode(COSTLY)
    assert isinstance(problem, TooLarge)
    assert "more than 0.02 s of CPU time" in problem.detail
    assert cpu_s == 0.02
    assert isinstance(process.decode(jpegs.with_scans(3, 40))[0], np.ndarray)


@pytest.mark.skipif(not hasattr(signal, "SIGPROF") or not os.path.exists("/proc"), reason="needs Linux")  # noqa: PTH110
def test_an_image_that_takes_too_much_memory_is_a_problem(start: Start) -> None:
    problem, _ = start(max_memory_bytes=64 * MIB).decode(jpegs.with_scans(3, 7000))
    assert isinstance(problem, TooLarge | DamagedImage)


def test_a_decoder_that_crashes_is_a_problem_of_its_image(start: Start) -> None:
    process = start()
    process.decode(jpegs.with_scans(3, 40))
    os.kill(pid(process), signal.SIGSEGV)
    time.sleep(0)
    outcomes = [process.decode(jpegs.with_scans(3, 40))[0] for _ in range(2)]
    assert isinstance(outcomes[-1], np.ndarray)
    assert all(isinstance(each, np.ndarray | DamagedImage) for each in outcomes)


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
    process.decode(Image.new("RGB", (40, 40)).tobytes())
    assert os.getpriority(os.PRIO_PROCESS, pid(process)) > os.getpriority(os.PRIO_PROCESS, 0)
