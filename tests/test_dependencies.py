"""Test the audit of the dependencies, and that its table lists what constraints.txt pins."""

import json
import re
import subprocess
import sys
from email.message import Message
from importlib.metadata import PackageMetadata
from pathlib import Path
from typing import cast

import pytest

sys.path.append(str(Path(__file__).parents[1] / "research"))

import dependencies


def test_the_table_has_the_versions_of_constraints_txt() -> None:
    rows = re.findall(r"^\| ([\w.-]+) \| (\d[\w.]*) \| .* \|$", dependencies.TABLE.read_text(), flags=re.MULTILINE)
    pinned = dependencies.read_constraints(dependencies.CONSTRAINTS.read_text())
    assert dict(rows) == pinned, "make audit writes the table anew"


def metadata(expression: str = "", license_field: str = "", *classifiers: str) -> PackageMetadata:
    fields = Message()
    for name, value in (("License-Expression", expression), ("License", license_field)):
        if value:
            fields[name] = value
    for classifier in classifiers:
        fields["Classifier"] = f"License :: OSI Approved :: {classifier}"
    return cast(PackageMetadata, fields)


@pytest.mark.parametrize(
    ("fields", "license_name", "flag"),
    [
        (metadata("Apache-2.0 AND (MIT OR Zlib)", "ignored"), "Apache-2.0 AND (MIT OR Zlib)", ""),
        (metadata("", "MIT", "MIT License"), "MIT", ""),
        (metadata("", "BSD-3-Clause", "BSD License"), "BSD-3-Clause", ""),
        (metadata("", "Copyright\nall of it", "Apache Software License"), "Apache-2.0", ""),
        (
            metadata("", "BSD-3-Clause", "GNU Lesser General Public License v3 (LGPLv3)"),
            "BSD-3-Clause; LGPL-3.0",
            "weak copyleft",
        ),
        (metadata("GPL-3.0-or-later"), "GPL-3.0-or-later", "copyleft"),
        (metadata("LicenseRef-NVIDIA-Proprietary"), "LicenseRef-NVIDIA-Proprietary", "proprietary"),
        (metadata("", "do what you like"), "do what you like", "unknown"),
        (metadata("", "", "OSI Approved"), "unknown", "unknown"),
    ],
)
def test_a_license_that_is_not_permissive_is_flagged(fields: PackageMetadata, license_name: str, flag: str) -> None:
    assert dependencies.find_license(fields) == license_name
    assert dependencies.find_flag(license_name) == flag


FOUND = {"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}]}]}


@pytest.mark.parametrize(
    ("installed", "stdout", "stderr", "answer"),
    [
        (False, "", "", ([], "pip-audit is not installed")),
        (True, "", "trace\nno network", ([], "no network")),
        (True, json.dumps(FOUND), "", (["a 1: PYSEC-1, fixed in 2"], "")),
        (True, json.dumps({"dependencies": [{"name": "a", "version": "1", "vulns": []}]}), "", ([], "")),
    ],
    ids=["without pip-audit", "offline", "found", "none"],
)
def test_the_audit_says_when_it_could_not_check_for_vulnerabilities(
    installed: bool,
    stdout: str,
    stderr: str,
    answer: tuple[list[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dependencies, "find_spec", lambda _: object() if installed else None)
    completed = subprocess.CompletedProcess[str]([], 0, stdout, stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: completed)
    assert dependencies.find_vulnerabilities() == answer
