"""What a proof has measured: printed as a table, kept in benchmarks/results/, told by the exit status."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

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


def conclude(name: str, ran: str, checks: list[Check], workers: int = 1) -> int:
    """Print the table and write it to `results/NAME.md`, or for several workers to `results/NAME_workers.md`.

    Args:
        name: of the program.
        ran: what was run, in a sentence.
        workers: processes of the service.

    Returns:
        The exit status: 1 if a target was missed.
    """
    missed = [check for check in checks if check.met is False]
    if workers > 1:
        name, ran = f"{name}_workers", f"{workers} workers: {ran}"
    lines = [f"{ran} {datetime.now(UTC):%Y-%m-%d}, {machine()}.", "", *table(checks)]
    print("\n".join(lines), flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    return 1 if missed else 0


def table(checks: Iterable[Check]) -> list[str]:
    """Lines of markdown."""
    answers = {True: "yes", False: "**no**", None: ""}
    return [
        "| what | measured | target | met |",
        "| --- | --- | --- | --- |",
        *(f"| {check.what} | {check.measured} | {check.target} | {answers[check.met]} |" for check in checks),
    ]


def machine() -> str:
    facts = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    processor = next(
        (value.strip() for key, value in facts.items() if key.strip() == "model name"), "unknown processor"
    )
    return f"{processor}, {os.cpu_count()} cores"
