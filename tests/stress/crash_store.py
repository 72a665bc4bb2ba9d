"""Test that the model store stays readable, complete and consistent when its writers are killed at any moment.

Two processes publish, promote and prune versions of one model as fast as they can. SIGKILL hits them at random moments
within a tenth of a second. After every two kills the program checks the store from outside. Every version must be
unchanged since it was first seen and must match its card. The live version must exist. No version number may be used
twice. The lock must be free. The test does not cover the effect of a power failure on unwritten pages.

With `--s3` the store is on an S3 server (moto's) that is not killed, and the moments are within a second. There is
no lock: a removal that was begun must not stand in the way of the writers that follow.

    python tests/stress/crash_store.py [--s3] [--kills 2000] [--seed 0]  # 500 kills with --s3

Time: 138 s, with `--s3` nine minutes.
Result: 2,000 kills, 20,841 published versions, no damaged store (AMD EPYC, 2 cores, 2026-11-26).
With `--s3`: 500 kills, 701 published versions, no damaged store (Intel Xeon, 2 cores, 2026-11-30).
Table: results/crash_store.md, results/crash_store_s3.md (`--s3`).
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

import numpy as np
from results import Check, conclude, is_whole
from s3_server import make_bucket, open_files, run_s3
from stores import make_card

from training.files import sha256
from training.store import CARD, LIVE, MODEL, ModelCard, Store, StoreError, make_store
from training.store.objects import CACHE_VARIABLE

NAME = "resnet"
WRITERS = 2
KEPT = 4
LONGEST_S = 0.1  # several rounds of a writer
LONGEST_S3_S = 1.0  # a writer needs a fifth of a second for a round
BUCKET = "crash-store"
KILLS, KILLS_S3 = 2000, 500
BYTES = 100_000


def main(kills: int, seed: int, on_s3: bool, whole: bool) -> int:
    random = np.random.default_rng(seed)
    context = multiprocessing.get_context("fork")
    faults: list[str] = []
    cut_short: Counter[str] = Counter()
    seen: dict[int, str] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if on_s3:
            os.environ |= stack.enter_context(run_s3(folder)).environment | {CACHE_VARIABLE: str(folder / "cache")}
            make_bucket(BUCKET)
        location = f"s3://{BUCKET}/models" if on_s3 else str(folder)
        store = make_store(location)
        _publish(store, np.random.default_rng(seed))
        started = time.monotonic()
        for round_ in range(kills // WRITERS):
            seeds = [(seed, round_, index) for index in range(WRITERS)]
            writers = [context.Process(target=_write_forever, args=(location, each)) for each in seeds]
            for writer in writers:
                writer.start()
            for writer in writers:
                time.sleep(random.uniform(0, LONGEST_S3_S if on_s3 else LONGEST_S))
                writer.kill()
            for writer in writers:
                writer.join()
                if writer.exitcode != -9:
                    faults.append(f"round {round_}: a writer ended by itself with {writer.exitcode}")
            store = make_store(location)
            faults += [f"round {round_}: {fault}" for fault in _faults(store, seen)]
            cut_short += _clear_objects(store) if on_s3 else _clear_folder(folder / NAME)
        store.promote(NAME, store.versions(NAME)[-1])  # blocks forever if a killed writer still held the lock
        newest = max(seen)
        seconds = time.monotonic() - started
    for fault in faults[:20]:
        print(fault, file=sys.stderr)
    return conclude(
        __file__,
        f"{WRITERS * (kills // WRITERS):,} kills of {WRITERS} writers (seed {seed}) in {seconds:.0f} s.",
        [
            Check("versions published", f"{newest:,}"),
            *(Check(f"kills within {moment}", f"{count:,}") for moment, count in sorted(cut_short.items())),
            Check("stores found damaged", f"{len(faults)}", "0", not faults),
        ],
        whole=whole,
        suffix="_s3" if on_s3 else "",
    )


def _write_forever(location: str, seed: tuple[int, ...]) -> None:
    random, store = np.random.default_rng(seed), make_store(location)
    while True:
        with suppress(StoreError):  # the other writer may have removed the version
            card = _publish(store, random)
            store.promote(NAME, int(random.choice([card.version, *store.versions(NAME)])))
            store.prune(NAME, KEPT)


def _publish(store: Store, random: np.random.Generator) -> ModelCard:
    with store.draft(NAME) as draft:
        (draft / MODEL).write_bytes(random.bytes(BYTES))
        card = store.publish(draft, make_card(name=NAME))
    store.promote_if(card, "if-better")
    return card


def _faults(store: Store, seen: dict[int, str]) -> list[str]:
    """Return the faults of a store that has no writer.

    Args:
        seen: Checksums of all versions so far, by number. The function adds the new versions.
    """
    faults = []
    try:
        versions, live = store.versions(NAME), store.live(NAME)
        if live not in versions:
            faults.append(f"version {live} is live, there are {versions}")
        if seen and versions[-1] < max(seen):
            faults.append(f"version {max(seen)} is gone, the newest is {versions[-1]}")
        for version in versions:
            checksum = sha256(store.verify(store.card(NAME, version)) / MODEL)
            if seen.setdefault(version, checksum) != checksum:
                faults.append(f"version {version} has changed")
    except (StoreError, OSError) as error:
        faults.append(f"{type(error).__name__}: {error}")
    return faults


def _clear_folder(model: Path) -> Counter[str]:
    """Remove the files that killed writers left behind. Count them by the operation that was killed."""
    found: Counter[str] = Counter()
    for path in model.glob(".draft-*"):
        found["a publication or a removal"] += 1
        shutil.rmtree(path)
    if (pointer := model / f"{LIVE}.partial").exists():
        found["a promotion"] += 1
        pointer.unlink()
    return found


def _clear_objects(store: Store) -> Counter[str]:
    """Remove the objects of versions without a card, except their claims. Count them, and the marks of removals."""
    found: Counter[str] = Counter()
    files, root = open_files(store.location)
    versions: dict[str, set[str]] = {}
    for path in files.find(f"{root}/{NAME}"):
        version, _, file = path.removeprefix(f"{root}/{NAME}/").partition("/")
        versions.setdefault(version, set()).add(file)
    for version, present in versions.items():
        if any(file.startswith("removing") for file in present):
            found["a removal"] += 1
        elif version.isdecimal() and CARD not in present and present != {"claim"}:
            found["a publication"] += 1
            for file in present - {"claim"}:
                files.rm_file(f"{root}/{NAME}/{version}/{file}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--s3", action="store_true")
    parser.add_argument("--kills", type=int, default=KILLS_S3 if "--s3" in sys.argv else KILLS)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.exit(main(given.kills, given.seed, given.s3, is_whole(parser, given)))
