"""Command blocks of README and docs do what they show; those that no test runs are counted, page by page."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.docs.blocks import Block, blocks, fits, run

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL = [block for page in PAGES for block in blocks(page, ROOT)]
RUN = [block for block in ALL if block.page == "README.md" and "cat /etc/shadow" in block.body]
MARKED = {
    "README.md": 4, "docs/compatibility.md": 1, "docs/install.md": 4, "docs/mcp.md": 1, "docs/policy.md": 1,
}  # fmt: skip
"""Blocks that cannot be run here; the marker above each says why."""
OPEN = {
    "README.md": 1, "docs/audit.md": 3, "docs/console.md": 1, "docs/embedding.md": 1, "docs/events.md": 3,
    "docs/host-api.md": 1, "docs/install.md": 1, "docs/manifest.md": 1, "docs/mcp.md": 1, "docs/operations.md": 5,
    "docs/plugins.md": 3, "docs/policy.md": 3, "docs/run.md": 2,
}  # fmt: skip
"""Blocks that could be run and are not yet; that their commands and options exist is tested (``test_commands``)."""


def test_number_of_blocks_that_no_test_runs_does_not_grow() -> None:
    marked = Counter(block.page for block in ALL if block.is_shell and block.why)
    open_ = Counter(block.page for block in ALL if block.is_shell and not block.why and block not in RUN)
    assert dict(marked) == MARKED
    assert dict(open_) == OPEN


def test_command_in_a_cage_of_the_readme_prints_what_is_shown(tmp_path: Path) -> None:
    block = next(b for b in RUN if "cat /etc/shadow" in b.body)
    ((command, shown, output),) = run(block, tmp_path, {"sudo ./dev exec ": ""})
    assert fits(shown, output), (command, output)


@pytest.mark.parametrize(
    ("shown", "output", "fit"),
    [
        (["a  ev_01a2…  3.1 ms"], "a ev_ff00  12 ms\n", True),
        (["a  ev_01a2  3.1 ms"], "b ev_ff00  12 ms\n", False),
        (["...", "last"], "first\nsecond\nlast\n", True),
        (["2026-11-23T07:14:20.266Z   text"], "2030-01-01T00:00:00.1Z   text\n", True),
        (["one"], "one\ntwo\n", False),
    ],
)
def test_output_is_compared_but_for_ids_and_times(shown: list[str], output: str, fit: bool) -> None:
    assert fits(shown, output) is fit


def test_command_that_goes_on_in_the_next_line_is_one() -> None:
    block = Block("p", "", "$ a 'x\n    y'\nout\n$ b\n", "")
    assert list(block.steps()) == [("a 'x\n    y'", ["out"]), ("b", [])]
