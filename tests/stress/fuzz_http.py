"""Test that the service answers every broken request with a clear problem and stays available.

A real server gets damaged images (see mutations.py) as raw bodies, as one or several files of a form, in damaged forms,
with wrong content types, and in intact and damaged zips for POST /evaluate. The last request is a zip of a few hundred
bytes that unpacks to a gigabyte but declares one byte. No answer may be a 5xx other than 503 with Retry-After. Every
error must be a problem+json with status, title and detail. The server must stay alive, ready and within its memory
limit.

    python tests/stress/fuzz_http.py [--inputs 10000] [--seed 0] [--workers 1]

Time: 19 s.
Result: 10,000 requests, each with a result or a clear problem; memory at most 112 MiB above the start (AMD EPYC, 2
cores, 2026-11-26).
Table: results/fuzz_http.md, results/fuzz_http_workers.md (`--workers 2`).
"""

import argparse
import bz2
import io
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

import httpx
import numpy as np
import tiny_models
from mutations import damaged, damaged_bytes, samples
from results import Check, conclude, is_whole
from server import Server

CLIENTS = 8
MAX_FILES = 5
GROWTH_MIB = 1024  # decoding an image of 50 million pixels takes up to 16 bytes per pixel
KEPT_MIB = 256
CONTENT_TYPES = (
    "",
    "text/plain",
    "application/json",
    "application/x-www-form-urlencoded",
    "multipart/form-data",
    "multipart/form-data; boundary=",
    "multipart/form-data; boundary=\xff\"';",
    "multipart/mixed; boundary=x",
    "image/",
    "image/png; charset=\x80",
    "IMAGE/JPEG",
)


@dataclass(frozen=True)
class Input:
    """The path, body and content type of one request."""

    path: str
    body: bytes
    content_type: str


Random = np.random.Generator
Images = Callable[[], bytes]


def raw(image: Images, _: Random) -> Input:
    return Input("/predict", image(), "image/jpeg")


def form(image: Images, _: Random) -> Input:
    return _form("/predict", [("photo.jpg", image())])


def form_of_several(image: Images, random: Random) -> Input:
    return _form("/predict", [(f"{number}.jpg", image()) for number in range(random.integers(2, MAX_FILES + 1))])


def damaged_form(image: Images, random: Random) -> Input:
    whole = _form("/predict", [("photo.jpg", image())])
    return Input(whole.path, damaged_bytes(whole.body, whole.body, random), whole.content_type)


def wrong_content_type(image: Images, random: Random) -> Input:
    return Input(str(random.choice(["/predict", "/evaluate?limit=5"])), image(), str(random.choice(CONTENT_TYPES)))


def archive(image: Images, random: Random) -> Input:
    return _form("/evaluate", [("photos.zip", _zip(image, random))])


def damaged_archive(image: Images, random: Random) -> Input:
    whole = _zip(image, random)
    return _form("/evaluate", [("photos.zip", damaged_bytes(whole, whole, random))])


KINDS = (raw, raw, form, form_of_several, damaged_form, wrong_content_type, archive, damaged_archive)


def make(files: dict[str, bytes], seed: int, number: int) -> tuple[str, Input]:
    """Return the kind of input `number`, and the input."""
    random = np.random.default_rng((seed, number))
    kind = KINDS[number % len(KINDS)]

    def image() -> bytes:
        if random.random() < 0.3:  # intact images among the damaged ones
            return files[str(random.choice(sorted(files)))]
        return damaged(files, seed, int(random.integers(1 << 40)))[1]

    return kind.__name__, kind(image, random)


def fault(response: httpx.Response) -> str | None:
    """Return the fault of an answer, or None if the answer is as it should be."""
    if response.is_success:
        return None
    if response.status_code >= 500 and not (response.status_code == 503 and "Retry-After" in response.headers):
        return f"{response.status_code}: {response.text[:200]}"
    if response.headers.get("content-type") != "application/problem+json":
        return f"{response.status_code} as {response.headers.get('content-type')}: {response.text[:200]}"
    problem = response.json()
    if problem.get("status") != response.status_code or not problem.get("title") or not problem.get("detail"):
        return f"{response.status_code} with {problem}"
    return None


def main(inputs: int, seed: int, workers: int, whole: bool) -> int:
    files = samples()
    answers: dict[str, Counter[int]] = {kind.__name__: Counter() for kind in KINDS}
    faults: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fuzz-http-") as name:
        folder = Path(name)
        store = tiny_models.make_store(folder)
        with (
            Server(store.root, folder / "runs", folder / "log", workers=str(workers)) as server,
            server.client() as http,
        ):

            def send(number: int) -> None:
                kind, made = make(files, seed, number)
                headers = {b"Content-Type": made.content_type.encode("latin-1")} if made.content_type else {}
                try:
                    response = http.post(made.path, content=made.body, headers=headers)
                except httpx.HTTPError as error:
                    faults.append(f"input {number} ({kind}): {type(error).__name__}: {error}")
                    return
                answers[kind][response.status_code] += 1
                if wrong := fault(response):
                    faults.append(f"input {number} ({kind}): {wrong}")

            with ThreadPoolExecutor(CLIENTS) as clients:
                list(clients.map(send, range(len(KINDS) * 20)))  # load lazy modules before the first measurement
                before, files_before = server.memory_mib(), server.open_files()
                started = time.monotonic()
                list(clients.map(send, range(len(KINDS) * 20, inputs)))
                seconds = time.monotonic() - started
            bomb = _form("/evaluate", [("photos.zip", _bomb())])
            refused = http.post(bomb.path, content=bomb.body, headers={"Content-Type": bomb.content_type})
            if not refused.is_client_error or fault(refused):
                faults.append(f"the bomb: {refused.status_code} {refused.text[:200]}")
            kept, peak = server.memory_mib() - before, server.memory_mib("VmHWM") - before
            files_after = server.open_files()
            well = server.process.poll() is None and http.get("/health/ready").status_code == 200
            traces = (folder / "log").read_text().count("Traceback")
    most, most_kept = GROWTH_MIB * workers, KEPT_MIB * workers
    for each in faults[:20]:
        print(each, file=sys.stderr)
    return conclude(
        __file__,
        f"{inputs:,} requests (seed {seed}) by {CLIENTS} clients, {inputs / seconds:.0f} a second.",
        [
            *(
                Check(kind, ", ".join(f"{count:,} x {status}" for status, count in sorted(counts.items())))
                for kind, counts in answers.items()
            ),
            Check("answers other than a result or a clear problem", f"{len(faults)}", "0", not faults),
            Check("errors with a traceback in the log", f"{traces}", "0", traces == 0),
            Check("alive and ready at the end", "yes" if well else "no", "yes", well),
            Check("memory at most, above the start", f"{peak:.0f} MiB", f"< {most} MiB", peak < most),
            Check("memory at the end, above the start", f"{kept:.0f} MiB", f"< {most_kept} MiB", kept < most_kept),
            Check("open files, start and end", f"{files_before}, {files_after}"),
        ],
        workers,
        whole=whole,
    )


def _form(path: str, files: list[tuple[str, bytes]]) -> Input:
    request = httpx.Request("POST", "http://any", files=[("file", file) for file in files])
    return Input(path, request.read(), request.headers["content-type"])


def _zip(image: Images, random: Random) -> bytes:
    folders = ("red_disc", "Orange Disc", "__MACOSX", "", "no class")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if random.random() < 0.5 else zipfile.ZIP_STORED) as made:
        for number in range(random.integers(4)):
            made.writestr(f"{random.choice(folders, p=(0.5, 0.35, 0.05, 0.05, 0.05))}/{number}.png", image())
    return buffer.getvalue()


def _bomb() -> bytes:
    """Return a zip with a bzip2 member that declares one byte and unpacks to 2**30 bytes."""
    packer = bz2.BZ2Compressor()
    packed = b"".join(packer.compress(bytes(1 << 24)) for _ in range(1 << 6)) + packer.flush()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        made.writestr("red_disc/0.png", packed)
    data = bytearray(buffer.getvalue())
    directory = data.index(b"PK\x01\x02")
    for method, size in ((8, 22), (directory + 10, directory + 24)):
        data[method : method + 2] = struct.pack("<H", zipfile.ZIP_BZIP2)
        data[size : size + 4] = struct.pack("<I", 1)
    return bytes(data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    sys.exit(main(given.inputs, given.seed, given.workers, is_whole(parser, given)))
