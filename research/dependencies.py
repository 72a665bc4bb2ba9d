"""List the licenses of all dependencies in constraints.txt, and ask pip-audit for known vulnerabilities.

    python research/dependencies.py        # or: make audit

The licenses are those in the metadata of the installed packages, so every package must be installed in the version that
constraints.txt gives. Vulnerabilities need a network and pip-audit (`pip install pip-audit`). Without one of them the
program says that it could not check.

The exit status is 1 if a package is missing or has a known vulnerability.

Table: ../docs/dependencies.md.
"""

import json
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageMetadata, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
TABLE = ROOT / "docs/dependencies.md"
MAX_PARENTS = 3  # packages named in a row

UNKNOWN = "unknown"
PERMISSIVE = {
    "0BSD", "Apache-2.0", "BSD", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "ISC", "LLVM-exception", "MIT",
    "MIT-0", "MIT-CMU", "PSF-2.0", "ZPL-2.1", "Zlib"
}  # fmt: skip
FLAGS = {  # by a part of an identifier; the first one counts
    "LGPL": "weak copyleft",
    "MPL": "weak copyleft",
    "GPL": "copyleft",
    "Proprietary": "proprietary",
}
# Names in classifiers and in the field License, with their SPDX identifiers.
IDENTIFIERS = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "GNU Lesser General Public License v3 (LGPLv3)": "LGPL-3.0",
    "ISC License": "ISC",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "MIT license": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "NVIDIA Proprietary Software": "LicenseRef-NVIDIA-Proprietary",
    "OSI Approved :: Apache Software License": "Apache-2.0",
    "Other/Proprietary License": "LicenseRef-Proprietary",
    "Python Software Foundation License": "PSF-2.0",
}
NO_LICENSES = {"DFSG approved", "OSI Approved"}  # classifiers that name no license
# Packages whose metadata has no license, by name and version, with what their wheels contain.
REVIEWED = {
    ("axe-playwright-python", "0.1.8"): "its LICENSE is MIT",
    ("cuda-toolkit", "13.0.3.0"): "no files; it requires packages of NVIDIA",
    ("huey", "3.5.4"): "its LICENSE is MIT",
    ("skops", "0.16.0"): "its LICENSE is MIT",
}


@dataclass
class Need:
    """Why a package is installed."""

    extra: str
    """Extra of this project that brings it; empty if every installation has it."""
    parents: list[str] = field(default_factory=list)
    """Packages that require it. It is empty for a direct dependency."""


def read_constraints(text: str) -> dict[str, str]:
    """Return the version of every package of a constraints file, by its name there."""
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    return dict(line.split("==") for line in lines)


def find_license(metadata: PackageMetadata) -> str:
    """Return the license of a package as SPDX identifiers, or `UNKNOWN`.

    A license expression is taken alone. Classifiers and the field License may contradict each other, so both are given.
    """
    if "License-Expression" in metadata:
        return metadata["License-Expression"]
    classifiers = [each.rsplit(" :: ", 1)[1] for each in metadata.get_all("Classifier", []) if "License ::" in each]
    names = [name for name in classifiers if name not in NO_LICENSES]
    if "License" in metadata and "\n" not in metadata["License"]:  # several lines are a whole license text
        names.append(metadata["License"])
    found = {IDENTIFIERS.get(name, name) for name in names}
    if any(name.startswith("BSD-") for name in found):
        found.discard("BSD")
    return "; ".join(sorted(found)) or UNKNOWN


def find_flag(license_name: str) -> str:
    """Return why a license needs attention, or an empty text for a permissive one."""
    identifiers = {each.strip(" ()") for each in re.split(r" AND | OR | WITH |; ", license_name)}
    flags = {
        next((flag for part, flag in FLAGS.items() if part in identifier), UNKNOWN)
        for identifier in identifiers - PERMISSIVE
    }
    return ", ".join(sorted(flags))


def find_needs(project: dict[str, list[str]]) -> dict[str, Need]:
    """Return why each package is installed, by its canonical name.

    Args:
        project: Requirements of this project by extra, in order of precedence; the extra "" for all installations.
    """
    needs: dict[str, Need] = {}
    for extra, requirements in project.items():
        waiting = [(Requirement(text), "") for text in requirements]
        seen: set[tuple[str, frozenset[str]]] = set()
        while waiting:
            requirement, parent = waiting.pop(0)
            name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
            need = needs.setdefault(name, Need(extra, [parent] if parent else []))
            if parent and need.parents and need.extra == extra and parent not in need.parents:
                need.parents.append(parent)
            if (name, extras) in seen:
                continue
            seen.add((name, extras))
            try:
                texts = distribution(name).requires or []
            except PackageNotFoundError:  # reported by `main`, if constraints.txt has it
                continue
            waiting += [(each, name) for each in map(Requirement, texts) if _applies(each, extras)]
    return needs


def _applies(requirement: Requirement, extras: Collection[str]) -> bool:
    """Return whether a requirement of a package applies on this machine with these extras of the package."""
    marker = requirement.marker
    return not marker or any(marker.evaluate({"extra": extra}) for extra in extras or ("",))


def make_table(constraints: dict[str, str], needs: dict[str, Need]) -> list[str]:
    """Return the document with the license of every package, as lines."""
    rows, flagged = [], defaultdict[str, list[str]](list)
    for name, version in constraints.items():
        key = canonicalize_name(name)
        license_name = find_license(distribution(name).metadata)
        need = needs.get(key, Need("", ["another package"]))
        parents = need.parents[:MAX_PARENTS] + ["…"] * (len(need.parents) > MAX_PARENTS)
        flag = find_flag(license_name)
        if flag:
            review = REVIEWED.get((key, version))
            flagged[flag].append(f"{name} ({review})" if review else name)
        extra = f"`[{need.extra}]`" if need.extra else ""
        rows.append(f"| {name} | {version} | {license_name} | {flag} | {extra} | {', '.join(parents) or 'direct'} |")
    return [
        "# Dependencies",
        "",
        "`make audit` writes this file from [constraints.txt](../constraints.txt) and the metadata of the installed",
        "packages. It also asks pip-audit for known vulnerabilities, which needs a network.",
        "",
        "These licenses need attention:",
        "",
        "| flag | packages |",
        "| --- | --- |",
        *(f"| {flag} | {', '.join(names)} |" for flag, names in sorted(flagged.items())),
        "",
        "The packages of NVIDIA come with the build of PyTorch for GPUs and are absent from the build for CPUs. The",
        "repository contains Swagger UI (Apache-2.0) in `app/static/swagger-ui`.",
        "",
        "## All packages",
        "",
        "A package with an extra is installed with that extra only. The last column names what requires the package;",
        "`direct` means pyproject.toml.",
        "",
        "| package | version | license | flag | extra | required by |",
        "| --- | --- | --- | --- | --- | --- |",
        *rows,
    ]


def find_vulnerabilities() -> tuple[list[str], str]:
    """Return the known vulnerabilities of the packages in constraints.txt, and the reason if they are not known."""
    if not find_spec("pip_audit"):
        return [], "pip-audit is not installed"
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(CONSTRAINTS), "--no-deps", "--disable-pip"]
    command += ["--format", "json", "--progress-spinner", "off"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        packages = json.loads(process.stdout)["dependencies"]
    except json.JSONDecodeError:
        return [], (process.stderr.strip().splitlines() or ["no output"])[-1]
    return [
        f"{package['name']} {package['version']}: {found['id']}, fixed in {', '.join(found['fix_versions']) or 'none'}"
        for package in packages
        for found in package.get("vulns", [])
    ], ""


def find_missing(constraints: dict[str, str]) -> Iterable[str]:
    """Yield every package that is not installed in its version."""
    for name, version in constraints.items():
        try:
            installed = distribution(name).version.partition("+")[0]
        except PackageNotFoundError:
            installed = "no version"
        if installed != version:
            yield f"{name}: {installed} is installed, not {version}"


def main() -> int:
    """Write the table, and print the flags and the vulnerabilities. Return the exit status."""
    constraints = read_constraints(CONSTRAINTS.read_text())
    if missing := list(find_missing(constraints)):
        print("error: the licenses cannot be read;", "; ".join(missing))
        return 1
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = make_table(constraints, find_needs({"": project["dependencies"]} | project["optional-dependencies"]))
    TABLE.write_text("\n".join(lines) + "\n")
    print(f"{len(constraints)} packages in {TABLE}; these licenses need attention:")
    print(*(line for line in lines[: lines.index("## All packages")] if line.startswith("| ")), sep="\n")
    vulnerabilities, obstacle = find_vulnerabilities()
    if obstacle:
        print(f"known vulnerabilities are not checked: {obstacle}")
    else:
        print(*vulnerabilities or ["no known vulnerabilities"], sep="\n")
    return 1 if vulnerabilities else 0


if __name__ == "__main__":
    sys.exit(main())
