"""docs/compatibility.md has every row of tests/compat, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from tests.compat.rows import ORDER
from tests.compat.test_sidecars import APPS, COMMANDS, SERVERS

PAGE = Path(__file__).parents[2] / "docs/compatibility.md"
AUTHORS = PAGE.with_name("plugins.md")


def _shown() -> list[tuple[str, str]]:
    """Group and name of every row of the page."""
    rows, group = [], ""
    for line in PAGE.read_text().partition("## Why not")[0].splitlines():
        if line.startswith("## "):
            group = line.removeprefix("## ")
        elif match := re.match(r"\| (.+?) \| .+ \| (?:yes|\*\*no\*\*) \|", line):
            rows.append((group, match[1]))
    return rows


def test_page_names_every_row_and_no_other() -> None:
    """One that is missing: write the page anew, as it says at its top."""
    assert _shown() == ORDER


def test_page_has_a_reason_for_every_row_that_fails() -> None:
    assert "| unknown |" not in PAGE.read_text()


def test_page_of_authors_names_every_sidecar_of_others() -> None:
    text = AUTHORS.read_text()
    assert not [one.name for one in (*COMMANDS, *APPS, *SERVERS) if one.name not in text]
