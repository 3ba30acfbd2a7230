"""Each "cannot" of docs/architecture.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_each_cannot_of_a_taken_over_process_names_a_test() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    (section,) = re.findall(r"## A process that was taken over\n(.*?)\n## ", text, re.DOTALL)
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")][1:]
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(rows) > 10
    for _, _, cannot, played in rows:
        names = re.findall(r"`([^`]+)`", played)
        assert names or not cannot.strip(), cannot
        for name in names:
            known = (ROOT / "tests" / name).is_file() if name.endswith(".py") else f"def test_{name}(" in sources
            assert known, name
