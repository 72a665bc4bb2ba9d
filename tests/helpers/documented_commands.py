"""Find the commands of Markdown documents, run them, and compare their output with the documents.

    document -> blocks in ``` fences -> commands -> output --compare--> the output in the document

A block `console` or `pycon` shows commands with their output. The output must have the same shape: numbers, times and
ids may differ, and `…` stands for anything. A block `sh` or `python` shows commands alone, which must succeed.
"""

import code
import contextlib
import io
import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

ELLIPSIS = "…"
TIMEOUT_S = 60

_BLOCK = re.compile(r"^( *)```(console|pycon|sh|python)\n(.*?)^ *```", flags=re.MULTILINE | re.DOTALL)
_PROMPTS = {"console": ("$ ", "> "), "pycon": (">>> ", "... ")}
# Ids, numbers and times, and the runtimes of this processor
_CHANGING = re.compile(r"\b[0-9a-f]{8,}\b|\d+(?:[.,:]\d+)*(?:e[-+]?\d+)?|(?:openvino|torchscript)-\w+")
_MOMENTARY = {"files", "phase", "progress", "started", "state", "training"}  # members that change while a job runs
_COMMENT = re.compile(r"\s+#\s.*$")


@dataclass(frozen=True)
class Command:
    """A command of a document.

    Attributes:
        document: Path of the document.
        line: Number of its line in the document.
        language: Language of its block.
        text: The command, which may have several lines.
        output: Output that the document shows. None if the block shows none.
    """

    document: Path
    line: int
    language: str
    text: str
    output: str | None = None

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}: {self.text.splitlines()[0]}"


def list_commands(document: Path) -> list[Command]:
    """Return the commands of a document in their order."""
    content = document.read_text()
    commands = list[Command]()
    for block in _BLOCK.finditer(content):
        indent, language, body = block.groups()
        lines = [line.removeprefix(indent) for line in body.splitlines()]
        first = content.count("\n", 0, block.start()) + 2
        if language in _PROMPTS:
            commands += _list_prompted(document, first, language, lines)
        elif language == "python":
            commands.append(Command(document, first, language, "\n".join(lines)))
        else:
            commands += _list_plain(document, first, lines)
    return commands


def _list_prompted(document: Path, first: int, language: str, lines: list[str]) -> Iterator[Command]:
    prompt, continuation = _PROMPTS[language]
    text, output, start = "", list[str](), first
    for number, line in enumerate([*lines, prompt], first):
        if line.startswith(prompt):
            if text:
                yield Command(document, start, language, text, "\n".join(output))
            text, output, start = line.removeprefix(prompt), [], number
        elif line.startswith(continuation) and not output:
            text += "\n" + line.removeprefix(continuation)
        else:
            output.append(line)


def _list_plain(document: Path, first: int, lines: list[str]) -> Iterator[Command]:
    text, start = "", first
    for number, line in enumerate(lines, first):
        if not text:
            start = number
        text += line
        if text.endswith("\\"):
            text += "\n"
        elif text:
            stripped = _COMMENT.sub("", text).strip()
            if stripped and not stripped.startswith("#"):
                yield Command(document, start, "sh", stripped)
            text = ""


def run_shell(text: str, folder: Path, environment: dict[str, str], preamble: str = "") -> tuple[int, str]:
    """Run a command of a shell.

    Returns:
        The exit status, and the output: stdout with the errors of stderr, or all of stderr if stdout is empty.
    """
    done = subprocess.run(
        ["bash", "-c", f"{preamble}\n{text}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    errors = [line for line in done.stderr.splitlines(keepends=True) if line.startswith("error: ")]
    return done.returncode, "".join([done.stdout, *errors]) if done.stdout else done.stderr


class PythonSession:
    """An interpreter whose variables last from one command to the next."""

    def __init__(self) -> None:
        self._console = code.InteractiveConsole()

    def close(self) -> None:
        """Close the clients among the variables."""
        for value in self._console.locals.values():
            if isinstance(close := getattr(value, "close", None), MethodType):
                close()

    def run(self, command: Command, text: str) -> str:
        """Run a command and return its output. An error prints its last line only, as documents show it.

        Raises:
            Exception: A block of the language python fails.
        """
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            if command.language == "python":
                exec(compile(text, str(command), "exec"), self._console.locals)  # noqa: S102
            else:
                with contextlib.redirect_stderr(output):
                    for line in [*text.split("\n"), *([""] if "\n" in text else [])]:
                        self._console.push(line)
        printed = output.getvalue()
        return printed.rstrip().rpartition("\n")[2] if printed.startswith("Traceback") else printed


def differs(expected: str, actual: str) -> str | None:
    """Return the first difference between the shapes of two outputs, or None."""
    try:
        expected_values = [json.loads(line) for line in _join(expected)]
        actual_values = [json.loads(line) for line in _join(actual)]
    except ValueError:
        return _differs_as_text(expected.strip(), actual.strip())
    return _compare(expected_values, actual_values, "")


def _join(text: str) -> list[str]:
    """Return the JSON documents of an output: one, or one in each line."""
    try:
        json.loads(text)
    except ValueError:
        return text.strip().splitlines()
    return [text]


def _compare(expected: Any, actual: Any, place: str) -> str | None:
    if expected == ELLIPSIS:
        return None
    if isinstance(expected, dict) and isinstance(actual, dict):
        keys = [key for key in expected if key != ELLIPSIS]
        if ELLIPSIS not in expected and set(keys) != actual.keys():
            return f"{place or 'the answer'} has {sorted(actual)}, the document shows {sorted(keys)}"
        pairs = [(f"{place}.{key}", expected[key], actual.get(key)) for key in keys if key not in _MOMENTARY]
    elif isinstance(expected, list) and isinstance(actual, list):
        if ELLIPSIS in expected:
            expected = expected[: expected.index(ELLIPSIS)]
            actual = actual[: len(expected)]
        if len(expected) != len(actual):
            return f"{place or 'the answer'} has {len(actual)} items, the document shows {len(expected)}"
        pairs = [
            (f"{place}[{number}]", one, other) for number, (one, other) in enumerate(zip(expected, actual, strict=True))
        ]
    elif isinstance(expected, str) and isinstance(actual, str):
        return _differs_as_text(expected, actual)
    elif isinstance(expected, bool) or not isinstance(expected, int | float):
        return None if expected == actual else f"{place} is {actual!r}, the document shows {expected!r}"
    else:
        is_number = isinstance(actual, int | float) and not isinstance(actual, bool)
        return None if is_number else f"{place} is {actual!r}, the document shows {expected!r}"
    return next((difference for name, one, other in pairs if (difference := _compare(one, other, name))), None)


def _differs_as_text(expected: str, actual: str) -> str | None:
    pattern = re.escape(_CHANGING.sub("0", expected)).replace(re.escape(ELLIPSIS), ".*")
    pattern = re.sub(r"(?:\\ )+", r"\\ +", pattern)  # the widths of columns
    if re.fullmatch(pattern, _CHANGING.sub("0", actual), flags=re.DOTALL):
        return None
    return f"the output is {actual!r}, the document shows {expected!r}"
