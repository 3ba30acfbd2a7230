"""What the documents refer to exists: links, paths of the tree, modules."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from host.events import BUILT_IN

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {"node_modules", ".git", "bench", "templates"} & set(path.relative_to(ROOT).parts)
)
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
_PLACE = re.compile(r"\]\(([^)#\s]*)#([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
_PATH = re.compile(r"`((?:isolator|host|tests|docs|clients|bench|vagrant|policies|examples)/[\w./-]*)`")
_MODULE = re.compile(r"`((?:isolator|host)(?:\.[a-z_]+)+)(?:\.[A-Z]\w*)?`")
_NO_MODULES = {
    "host.toml",
    "host.sock",
    "host.hello",
    "isolator.service",
    "isolator.sum",
    "isolator.slice",
    "isolator.serve",
    "host.refused",
    *(kind.name for kind in BUILT_IN),
}
"""Files, messages and units whose names look like modules."""


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_of_a_document_lead_to_a_file(document: Path) -> None:
    targets = [t for t in _LINK.findall(document.read_text()) if "://" not in t and not t.startswith("mailto:")]
    missing = [t for t in targets if not (document.parent / t.replace("\\", "")).exists()]
    assert not missing


def places(document: Path) -> set[str]:
    """The names of a document's headings, as GitHub makes them."""
    text = re.sub(r"^ *```.*?^ *```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in _HEADING.findall(text)]
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_into_a_document_lead_to_a_heading(document: Path) -> None:
    found = [(path, place) for path, place in _PLACE.findall(document.read_text()) if "://" not in path]
    assert not [
        (path, place)
        for path, place in found
        if path[-3:] in ("", ".md") and place not in places(document.parent / path if path else document)
    ]


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.name != "CHANGELOG.md"], ids=name)
def test_paths_and_modules_that_a_document_names_exist(document: Path) -> None:
    text = document.read_text()
    missing = [path for path in _PATH.findall(text) if "NAME" not in path and not (ROOT / path).exists()]
    for module in set(_MODULE.findall(text)) - _NO_MODULES:
        folder = ROOT / module.replace(".", "/")
        if not (folder.is_dir() or folder.with_suffix(".py").exists() or folder.parent.with_suffix(".py").exists()):
            missing.append(module)
    assert not missing


def test_every_package_says_in_one_line_what_it_is() -> None:
    table = (ROOT / "docs/architecture.md").read_text().partition("<!-- generated: floors -->")[2]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| ") and "`" in line]
    assert len(rows) > 25
    assert not [row[2] for row in rows if not row[2].strip().endswith("/`") and not row[3].strip()]


def test_every_noun_of_the_glossary_stands_once() -> None:
    nouns = re.findall(r"^\| \*\*(.+?)\*\* \|", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)
    assert len(nouns) > 40
    assert nouns == sorted(set(nouns), key=str.lower)
