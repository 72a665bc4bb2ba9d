"""Test that Markdown files name only files and headings that exist, and that READMEs list all scripts and tables."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = (".", ".github", "benchmarks", "docs", "research", "tests")
DOCUMENTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md" if folder == "." else "**/*.md"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
EXTERNAL = ("http://", "https://", "mailto:")
PATH = re.compile(r"\b(?:app|training|benchmarks|research|tests|docs)/[\w./-]*\w\.(?:py|md|txt)\b")
MODULE = re.compile(r"`(\w+\.py)`")
MODULES = {
    path.name
    for folder in ("app", "training", "benchmarks", "research", "tests")
    for path in (ROOT / folder).rglob("*.py")
}
PLACEHOLDERS = {"tests/training/test_NETWORK.py"}
HISTORY = "CHANGELOG.md"  # names files of earlier releases


def without_code_blocks(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    """Return the anchors of the headings, as GitHub derives them."""
    found, counts = set(), Counter[str]()
    for title in re.findall(r"^#+ +(.+?) *$", without_code_blocks(document.read_text()), flags=re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        anchor = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.add(f"{anchor}-{counts[anchor]}" if counts[anchor] else anchor)
        counts[anchor] += 1
    return found


def name(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def test_documents_of_all_folders_are_checked() -> None:
    names = {name(document) for document in DOCUMENTS}
    assert {"README.md", "docs/api.md", "tests/stress/README.md", "research/README.md"} <= names


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_relative_links_resolve(document: Path) -> None:
    broken = []
    for link in LINK.findall(without_code_blocks(document.read_text())):
        if link.startswith(EXTERNAL):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("document", [each for each in DOCUMENTS if each.name != HISTORY], ids=name)
def test_paths_and_modules_in_the_text_exist(document: Path) -> None:
    text = document.read_text()
    paths = set(PATH.findall(text)) - PLACEHOLDERS
    missing = [path for path in paths if not (ROOT / path).exists() and not (document.parent / path).exists()]
    assert not missing
    assert set(MODULE.findall(text)) <= MODULES


SCRIPTS = [path for folder in ("tests/stress", "research") for path in sorted((ROOT / folder).glob("*.py"))]


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_readme_lists_every_script(script: Path) -> None:
    assert f"`{script.name}`" in (script.parent / "README.md").read_text()


TABLES = [
    path for folder in ("benchmarks", "tests/stress", "research") for path in (ROOT / folder).glob("results/*.md")
]


@pytest.mark.parametrize("table", TABLES, ids=name)
def test_every_table_is_named_by_a_script_beside_its_folder(table: Path) -> None:
    scripts = table.parents[1].glob("*.py")
    assert [script for script in scripts if f"results/{table.name}" in script.read_text()]
