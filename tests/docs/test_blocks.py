"""Command blocks of README and docs do what they show; those that no test runs are counted, page by page."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from isolator import __version__
from tests.docs.blocks import PAGES, ROOT, Block, blocks, fits, holds, run
from tests.docs.test_run_blocks import PLAYS

ALL = [block for page in PAGES for block in blocks(page)]
HERE = ("cat /etc/shadow\ncat:", "hello-deploy --yes", "git clone")
"""Words of the blocks of README that a test of their own runs."""
NOT_RUN = {
    "CONTRIBUTING.md": 1,
    "README.md": 1,
    "bench/README.md": 1,
    "clients/pytest/README.md": 1,
    "clients/python/README.md": 1,
    "docs/cluster.md": 2,
    "docs/compatibility.md": 1,
    "docs/console.md": 1,
    "docs/embedding.md": 1,
    "docs/install.md": 5,
    "docs/mcp.md": 1,
    "docs/policy.md": 1,
    "tests/compat/plugins/README.md": 1,
    "vagrant/README.md": 1,
}
"""Blocks that cannot be run here; the marker above each says why."""


def test_every_block_of_commands_is_run_or_says_why_it_cannot_be() -> None:
    shell = [block for block in ALL if block.is_shell]
    assert dict(Counter(block.page for block in shell if block.why)) == NOT_RUN
    played = [play.block for play in PLAYS]
    left = [b for b in shell if not b.why and not b.place and b not in played and not any(w in b.body for w in HERE)]
    assert not left
    assert len(played) == len(set(played))


def test_pages_of_the_whole_repository_are_looked_at() -> None:
    here = {str(page.relative_to(ROOT)) for page in PAGES}
    assert {
        "README.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "examples/platform/README.md",
        "docs/recipes/layer.md",
    } <= here
    left = {path for path in ROOT.rglob("*.md") if not {"node_modules", "templates", "out"} & {*path.parts}} - {*PAGES}
    assert not [path for path in left if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]


@pytest.mark.parametrize("place", sorted({block.place for block in ALL} - {""}))
def test_file_that_a_marker_names_asks_for_its_blocks(place: str) -> None:
    assert "shown_in(__file__)" in (ROOT / place).read_text()


def test_command_in_a_cage_of_the_readme_prints_what_is_shown(tmp_path: Path) -> None:
    (block,) = [b for b in ALL if HERE[0] in b.body]
    ((command, shown, output),) = run(block, tmp_path, {"sudo ./dev exec ": ""})
    assert fits(shown, output), (command, output)


def test_clone_line_of_the_readme_works(tmp_path: Path) -> None:
    (block,) = [b for b in ALL if HERE[2] in b.body]
    (tmp_path / "origin").mkdir()
    shutil.copy(ROOT / "dev", tmp_path / "origin")
    git = ["git", "-C", str(tmp_path / "origin"), "-c", "user.name=x", "-c", "user.email=x"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    ((_, _, output),) = run(
        block, tmp_path, {"URL isolator": "file://$PWD/origin isolator", "sudo ./dev demo": "./dev help"}
    )
    assert "usage: ./dev COMMAND" in output


def test_readme_names_the_version() -> None:
    assert f"\nVersion {__version__} (`isolator --version`)" in (ROOT / "README.md").read_text()


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
    block = Block("p", "", "# about\na  # it's\n\nb \\\n  c\n", "")
    assert list(block.steps()) == [("a  # it's", []), ("b \\\n  c", [])]


def test_shown_lines_are_found_in_a_longer_output() -> None:
    assert holds("  $ a\n    ev_01  2 ms\n", "first\n$ a\n  ev_02  3 ms\nlast\n")
    assert not holds("$ a\nb\n", "$ a\nc\nb\n")
