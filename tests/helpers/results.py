"""Print a script's measurements as a table, keep them in `results` beside it, and compute the exit status."""

import argparse
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from app.machine import cpu_count
from training.provenance import find_commit


@dataclass(frozen=True)
class Check:
    """One row of a table.

    Attributes:
        what: Name of the measurement.
        measured: Value with its unit.
        target: Required value; empty for an observation.
        met: True if the value meets the target; None without a target or if it could not be measured.
    """

    what: str
    measured: str
    target: str = ""
    met: bool | None = None


def is_whole(parser: argparse.ArgumentParser, given: argparse.Namespace) -> bool:
    """Return whether a run is at least as large as a run without options, so that its table may be kept.

    Args:
        parser: Parser of the script's options.
        given: Parsed options. A number may be above its default; other options must have their default.
    """
    defaults = vars(parser.parse_args([]))
    return all(
        value >= defaults[name] if isinstance(value, int | float) else value == defaults[name]
        for name, value in vars(given).items()
    )


def keep(script: str, lines: Iterable[str], whole: bool = True, suffix: str = "") -> None:
    """Print lines of markdown, and write them to `results/NAME.md` beside the script NAME.py.

    Args:
        script: Path of the script, its `__file__`.
        whole: True to write the file, False to print only. `is_whole` finds it out from the script's options.
        suffix: Text to append to the name of the file, such as "_gpu".
    """
    text = "\n".join(lines)
    print(text, flush=True)
    if whole:
        path = Path(script)
        folder = path.parent / "results"
        folder.mkdir(exist_ok=True)
        (folder / f"{path.stem}{suffix}.md").write_text(text + "\n")


def conclude(script: str, ran: str, checks: list[Check], workers: int = 1, whole: bool = True, suffix: str = "") -> int:
    """Print and keep a table as `results/NAME.md`, or as `results/NAME_workers.md` with several workers.

    Args:
        script: Path of the script, its `__file__`.
        ran: Sentence that describes the run.
        workers: Number of processes of the service.
        whole: True to write the file, False to print only. `is_whole` finds it out from the script's options.
        suffix: Text to append to the name of the file, such as "_postgresql".

    Returns:
        The exit status: 1 if a target was missed, else 0.
    """
    missed = [check for check in checks if check.met is False]
    if workers > 1:
        ran = f"{workers} workers: {ran}"
    lines = [f"{ran} {describe_run()}.", "", *format_table(checks)]
    keep(script, lines, whole, "_workers" if workers > 1 else suffix)
    return 1 if missed else 0


def format_table(checks: Iterable[Check]) -> list[str]:
    """Return the checks as lines of a markdown table."""
    answers = {True: "yes", False: "**no**", None: ""}
    return [
        "| what | measured | target | met |",
        "| --- | --- | --- | --- |",
        *(f"| {check.what} | {check.measured} | {check.target} | {answers[check.met]} |" for check in checks),
    ]


def describe_run() -> str:
    """Return the date, the commit and the machine of a measurement."""
    sha, dash, dirty = (find_commit() or "").partition("-")
    of = f", commit {sha[:7]}{dash}{dirty}" if sha else ""
    return f"{datetime.now(UTC):%Y-%m-%d}{of}, {describe_machine()}"


def describe_machine() -> str:
    """Return the processor's name, the number of cores that this process may use, and the GPU's name."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{next(names, platform.processor() or platform.machine())}, {cpu_count()} cores{gpu}"
