"""Commands in documents are commands that exist, with options that they have."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from host.cli.root import cli
from tests.docs.blocks import PAGES, ROOT

_BLOCK = re.compile(r"^```(?:sh|console|bash)?\n(.*?)^```", re.M | re.S)
_INLINE = re.compile(r"`(?:sudo )?(isolator (?!-)[a-z][^`]*)`")

_SIGNED = ["audit", "seal"]
"""Begins the text that a seal signs."""


def commands(page: Path) -> Iterator[list[str]]:
    """The words after ``isolator`` of every command in the page: of blocks, and in running text."""
    text = page.read_text()
    lines = [line for block in _BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *_INLINE.findall(_BLOCK.sub("", text))]:
        match = re.match(r"^(?:[$#] )?(?:sudo )?(?:\./dev exec )?isolator (?=[a-z-])(.*)$", line)
        if match is None:
            continue
        try:
            words = shlex.split(re.sub(r"\$\([^)]*\)", "OUTPUT", match[1]), comments=True)
        except ValueError:
            continue  # goes on in the next line
        ends = [n for n, word in enumerate(words) if word in ("|", ">", ">>", "<", "&&", "--", "…", "...")]
        if words != _SIGNED:
            yield words[: min(ends, default=len(words))]


def fault(words: list[str]) -> str | None:
    """Why there is no such command; None if there is."""
    command: click.Command = cli
    context = click.Context(cli)
    rest = list(words)
    while isinstance(command, click.Group):
        while rest and rest[0].startswith("--"):
            rest = rest[2:] if rest[0] == "--root" else rest[1:]
        if not rest or not re.fullmatch(r"[a-z-]+", rest[0]):
            return None  # the group as such, or a placeholder
        found = command.get_command(context, rest[0])
        if found is None:
            return f"no command {rest[0]!r}"
        command, context, rest = found, click.Context(found, parent=context, info_name=rest[0]), rest[1:]
    known = {name for parameter in command.get_params(context) for name in (*parameter.opts, *parameter.secondary_opts)}
    options = [word.split("=")[0] for word in rest if re.fullmatch(r"--?[a-z][a-z-]*(=.*)?", word)]
    unknown = [option for option in options if option not in known]
    return f"no option {unknown[0]}" if unknown else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_exist_with_their_options(page: Path) -> None:
    faults = [(" ".join(words), why) for words in commands(page) if (why := fault(words))]
    assert not faults


def test_fault_of_a_command_is_found() -> None:
    assert fault(["plugin", "lst"]) == "no command 'lst'"
    assert fault(["plugin", "list", "--faild"]) == "no option --faild"
    assert fault(["--root", "/x", "plugin", "list", "--failed", "--json"]) is None
    assert sum(len(list(commands(page))) for page in PAGES) > 60


def test_option_n_means_the_same_with_every_command() -> None:
    meanings = {
        (option.type.__class__.__name__, option.help)
        for command in _all(cli, click.Context(cli))
        for option in command.params
        if isinstance(option, click.Option) and "-n" in option.opts
    }
    assert meanings == {("IntRange", "Only the newest N.")}


def _all(command: click.Command, context: click.Context) -> Iterator[click.Command]:
    yield command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from _all(found, context)
