"""What a program has measured: printed as a table, kept in benchmarks/results/, told by a proof's exit status."""

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from app.workers import processors
from training.provenance import commit

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Check:
    """One line of a table.

    Attributes:
        what: was measured.
        measured: the value, with its unit.
        target: what it should be; empty for a mere observation.
        met: whether it is; None where there is no target or it could not be tried.
    """

    what: str
    measured: str
    target: str = ""
    met: bool | None = None


def keep(name: str, lines: Iterable[str], whole: bool = True) -> None:
    """Print lines of markdown, and write them to `results/NAME.md` unless a part is left out."""
    text = "\n".join(lines)
    print(text, flush=True)
    if whole:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text(text + "\n")


def conclude(name: str, ran: str, checks: list[Check], workers: int = 1, whole: bool = True) -> int:
    """Keep a table as `results/NAME.md`, or for several workers as `results/NAME_workers.md`.

    Args:
        name: of the program.
        ran: what was run, in a sentence.
        workers: processes of the service.
        whole: whether it is kept.

    Returns:
        The exit status: 1 if a target was missed.
    """
    missed = [check for check in checks if check.met is False]
    if workers > 1:
        name, ran = f"{name}_workers", f"{workers} workers: {ran}"
    keep(name, [f"{ran} {occasion()}.", "", *table(checks)], whole)
    return 1 if missed else 0


def table(checks: Iterable[Check]) -> list[str]:
    """Lines of markdown."""
    answers = {True: "yes", False: "**no**", None: ""}
    return [
        "| what | measured | target | met |",
        "| --- | --- | --- | --- |",
        *(f"| {check.what} | {check.measured} | {check.target} | {answers[check.met]} |" for check in checks),
    ]


def occasion() -> str:
    """When, of which commit and on what machine something is measured."""
    sha, dash, dirty = (commit() or "").partition("-")
    of = f", commit {sha[:7]}{dash}{dirty}" if sha else ""
    return f"{datetime.now(UTC):%Y-%m-%d}{of}, {machine()}"


def machine() -> str:
    """Its processor, how many of it this process may use, and its GPU."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{next(names, platform.processor() or platform.machine())}, {processors()} cores{gpu}"
