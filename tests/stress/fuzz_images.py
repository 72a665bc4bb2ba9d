"""Test that `app.inference.images.encoded.EncodedImage` returns pixels or raises a clear problem for any input.

The program damages files of every format and variant (see mutations.py) and decodes them under the service's own
limits, in a process that may have at most 2 GiB more address space than at its start. A crash, or an input that takes
longer than 30 s, ends that process. The program counts that input as failed and continues with the next one in a new
process. It keeps failed inputs in a temporary folder; `--first NUMBER --inputs 1` decodes one of them again.

    python tests/stress/fuzz_images.py [--inputs 100000] [--seed 0] [--first 0]

Time: three minutes for 400,000 files.
Result: 400,000 damaged files (`--inputs 400000 --seed 1`), each decoded or refused with a clear problem; the slowest
took 0.56 s (AMD EPYC, 2 cores, 2026-11-26).
Table: results/fuzz_images.md.
"""

import argparse
import logging
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

import numpy as np
import PIL
from mutations import damaged, samples
from processes import memory_mib
from results import Check, conclude, is_whole

from app.exceptions import Problem
from app.inference.images.encoded import SIZE, EncodedImage
from app.settings import Settings

ROOM_MIB = 2048
GROWTH_MIB = 1024  # decoding an image of 50 million pixels takes up to 16 bytes per pixel
KEPT_MIB = 64
HANG_S = 30
SLOW_S = 5.0


class Outcome(NamedTuple):
    """The result of decoding one input."""

    number: int
    result: str
    """Either "decoded", the name of a problem, or a description of the fault."""
    seconds: float
    failed: bool


class Memory(NamedTuple):
    """Memory of the decoding process in MiB."""

    before: float
    after: float
    peak: float


def main(inputs: int, seed: int, first: int, whole: bool) -> int:
    files = samples()
    results: Counter[str] = Counter()
    slowest: list[Outcome] = []
    failures: list[Outcome] = []
    memories: list[Memory] = []
    started = time.monotonic()
    for outcome in _outcomes(files, seed, first, first + inputs):
        if isinstance(outcome, Memory):
            memories.append(outcome)
            continue
        results[outcome.result] += 1
        slowest = sorted([*slowest, outcome], key=lambda each: -each.seconds)[:3]
        if outcome.failed:
            failures.append(outcome)
    seconds = time.monotonic() - started

    if failures:
        folder = Path(tempfile.mkdtemp(prefix="fuzz-images-"))
        for failure in failures:
            name, data = damaged(files, seed, failure.number)
            (folder / str(failure.number)).write_bytes(data)
            print(f"input {failure.number} ({name}): {failure.result}; kept in {folder}", file=sys.stderr)
    growth = max((memory.peak - memory.before for memory in memories), default=0.0)
    kept = max((memory.after - memory.before for memory in memories), default=0.0)
    shown = ", ".join(f"{each.seconds:.2f} s (input {each.number}, {each.result})" for each in slowest)
    return conclude(
        __file__,
        f"{inputs:,} damaged files (seed {seed}) of {len(files)} kinds, Pillow {PIL.__version__}, "
        f"{inputs / seconds:.0f} inputs/s.",
        [
            *(Check(result, f"{count:,}") for result, count in results.most_common()),
            Check("neither pixels nor a problem", f"{len(failures)}", "0", not failures),
            Check("slowest", shown, f"< {SLOW_S:.0f} s", slowest[0].seconds < SLOW_S),
            Check("memory at most, above the start", f"{growth:.0f} MiB", f"< {GROWTH_MIB} MiB", growth < GROWTH_MIB),
            Check("memory at the end, above the start", f"{kept:.0f} MiB", f"< {KEPT_MIB} MiB", kept < KEPT_MIB),
        ],
        whole=whole,
    )


def _outcomes(files: dict[str, bytes], seed: int, first: int, stop: int) -> Iterator[Outcome | Memory]:
    """Yield the outcome of every input in order, and the memory of every process that ended normally."""
    context = multiprocessing.get_context("fork")
    while first < stop:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_decode_all, args=(theirs, files, seed, first, stop))
        process.start()
        theirs.close()
        try:
            while True:
                outcome = ours.recv()
                if isinstance(outcome, Outcome):
                    first = outcome.number + 1
                yield outcome
        except EOFError:
            process.join()
        if process.exitcode != 0:
            code = process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            yield Outcome(first, f"the process ended: {how}", HANG_S if code == -signal.SIGALRM else 0.0, True)
            first += 1


def _decode_all(results: Connection, files: dict[str, bytes], seed: int, first: int, stop: int) -> None:
    silence()
    settings = Settings()
    for data in files.values():  # load all plugins and buffers before the first measurement
        try:
            EncodedImage(data, settings.max_image_bytes, settings.max_image_pixels).decode()
        except Problem:
            continue
    before = memory_mib(os.getpid())
    space = int((memory_mib(os.getpid(), "VmSize") + ROOM_MIB) * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    for number in range(first, stop):
        _, data = damaged(files, seed, number)
        signal.alarm(HANG_S)
        started = time.perf_counter()
        result, failed = decoded(data, settings)
        seconds = time.perf_counter() - started
        signal.alarm(0)
        results.send(Outcome(number, result, seconds, failed))
    process = os.getpid()
    results.send(Memory(before, memory_mib(process), memory_mib(process, "VmHWM")))


def silence() -> None:
    """Suppress warnings, log lines and stderr for the rest of the process."""
    warnings.simplefilter("ignore")  # Pillow warns about faults that it tolerates
    logging.disable()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # libtiff prints faults to stderr


def decoded(data: bytes, settings: Settings) -> tuple[str, bool]:
    """Return the result of decoding, and whether it is a fault."""
    try:
        pixels = EncodedImage(data, settings.max_image_bytes, settings.max_image_pixels).decode()
    except Problem as problem:
        return type(problem).__name__, not problem.detail
    except BaseException as error:  # the test looks for any unexpected exception
        return f"{type(error).__name__}: {error}", True
    right = pixels.dtype == np.uint8 and pixels.shape == (3, SIZE, SIZE)
    return ("decoded", False) if right else (f"{pixels.dtype} {pixels.shape}", True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    given = parser.parse_args()
    sys.exit(main(given.inputs, given.seed, given.first, is_whole(parser, given) and given.first == 0))
