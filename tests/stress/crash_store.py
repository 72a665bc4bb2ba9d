"""Test that the model store stays readable, complete and consistent when its writers are killed at any moment.

Two processes publish, promote and prune versions of one model as fast as they can. SIGKILL hits them at random moments
within a tenth of a second. After every two kills the program checks the store from outside. Every version must be
unchanged since it was first seen and must match its card. The live version must exist. No version number may be used
twice. The lock must be free. The test does not cover the effect of a power failure on unwritten pages.

    python tests/stress/crash_store.py [--kills 2000] [--seed 0]

Time: 138 s.
Result: 2,000 kills, 20,841 published versions, no damaged store (AMD EPYC, 2 cores, 2026-11-26).
Table: results/crash_store.md.
"""

import argparse
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

import numpy as np
from results import Check, conclude, is_whole

from training.files import sha256
from training.store import LIVE, MODEL, Evaluation, LocalStore, ModelCard, StoreError

NAME = "resnet"
WRITERS = 2
KEPT = 4
LONGEST_S = 0.1  # several rounds of a writer
BYTES = 100_000


def main(kills: int, seed: int, whole: bool) -> int:
    random = np.random.default_rng(seed)
    context = multiprocessing.get_context("fork")
    faults: list[str] = []
    cut_short: Counter[str] = Counter()
    seen: dict[int, str] = {}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(Path(folder))
        _publish(store, np.random.default_rng(seed))
        for round_ in range(kills // WRITERS):
            writers = [context.Process(target=_write_forever, args=(store, (seed, round_, i))) for i in range(WRITERS)]
            for writer in writers:
                writer.start()
            for writer in writers:
                time.sleep(random.uniform(0, LONGEST_S))
                writer.kill()
            for writer in writers:
                writer.join()
                if writer.exitcode != -9:
                    faults.append(f"round {round_}: a writer ended by itself with {writer.exitcode}")
            faults += [f"round {round_}: {fault}" for fault in _faults(store, seen)]
            cut_short += _cleared(store.root / NAME)
        store.promote(NAME, store.versions(NAME)[-1])  # blocks forever if a killed writer still held the lock
        newest = max(seen)
    for fault in faults[:20]:
        print(fault, file=sys.stderr)
    seconds = time.monotonic() - started
    return conclude(
        __file__,
        f"{WRITERS * (kills // WRITERS):,} kills of {WRITERS} writers (seed {seed}) in {seconds:.0f} s.",
        [
            Check("versions published", f"{newest:,}"),
            Check("kills within a publication or a removal", f"{cut_short['draft']:,}"),
            Check("kills within a promotion", f"{cut_short['live']:,}"),
            Check("stores found damaged", f"{len(faults)}", "0", not faults),
        ],
        whole=whole,
    )


def _write_forever(store: LocalStore, seed: tuple[int, ...]) -> None:
    random = np.random.default_rng(seed)
    while True:
        with suppress(StoreError):  # the other writer may have removed the version
            card = _publish(store, random)
            store.promote(NAME, int(random.choice([card.version, *store.versions(NAME)])))
            store.prune(NAME, KEPT)


def _publish(store: LocalStore, random: np.random.Generator) -> ModelCard:
    measures = Evaluation(images=1, top1=1, top5=1, loss=0, ece=0, per_class=[1])
    card = ModelCard(
        name=NAME,
        version=0,
        created=datetime.now(UTC),
        recipe={},
        classes=["one"],
        superclasses=["all"],
        parameters=0,
        seed=0,
        data="none",
        temperature=1,
        test=measures,
        test_ece_uncalibrated=0,
        curve=[],
        training_seconds=0,
        device="none",
        libraries={},
        commit=None,
        files={},
    )
    with store.draft(NAME) as draft:
        (draft / MODEL).write_bytes(random.bytes(BYTES))
        card = store.publish(draft, card)
    store.promote_if(card, "if-better")
    return card


def _faults(store: LocalStore, seen: dict[int, str]) -> list[str]:
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


def _cleared(model: Path) -> Counter[str]:
    """Remove the files that killed writers left behind.

    Returns:
        Counts of "draft" (killed during a publication or a removal) and "live" (killed during a promotion).
    """
    found: Counter[str] = Counter()
    for path in model.glob(".draft-*"):
        found["draft"] += 1
        shutil.rmtree(path)
    if (pointer := model / f"{LIVE}.partial").exists():
        found["live"] += 1
        pointer.unlink()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.exit(main(given.kills, given.seed, is_whole(parser, given)))
