"""What holds for every command: its help, its other names, and that nothing is coloured where colours are off."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from host.authoring.dev.screen import Screen
from host.cli.help import EXIT_CODES, EXIT_CODES_OF_RUN
from host.cli.many import Aliased
from host.cli.output import show_alarms
from host.cli.root import cli
from isolator.cli.audit import print_lines
from isolator.errors import UsageError
from isolator.linux.descriptors import owning

REPO = Path(__file__).parents[2]
WIDTH = 80
OTHER_NAMES = {
    ("plugin", "ls"): "list", ("plugin", "ps"): "list", ("plugin", "rm"): "remove", ("plugin", "inspect"): "show",
    ("event", "ls"): "list", ("event", "ps"): "list", ("event", "inspect"): "show",
}  # fmt: skip
DENIED = json.dumps({
    "seq": 1, "time": "2026-01-02T03:04:05.000006Z", "type": "net.denied", "plugin": "slack", "run": None,
    "event_id": None, "delivery_id": None, "data": {}, "prev": "", "hash": "",
}).encode()  # fmt: skip
COLOURED: dict[str, Callable[[], Any]] = {
    "alarm": lambda: show_alarms(["the disk is full"]),
    "record": lambda: print_lines([DENIED], False),
    "dev: outcome of a crash": lambda: Screen(as_json=False).crashed("exit code 3"),
    "dev: error": lambda: Screen(as_json=False).failed(UsageError("plugin.json:1", "not JSON")),
}


def commands(command: click.Command, context: click.Context, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The words of each command and group."""
    yield words
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from commands(found, click.Context(found, parent=context, info_name=name), (*words, name))


ALL = list(commands(cli, click.Context(cli), ()))


def test_every_help_names_exit_codes_and_variables() -> None:
    assert len(ALL) > 80
    mistake = CliRunner().invoke(cli, ["status", "--nonsense"], prog_name="isolator")
    assert mistake.exit_code == 2 and "Exit codes" not in mistake.output
    for words in ALL:
        shown = CliRunner().invoke(cli, [*words, "--help"], prog_name="isolator")
        assert shown.exit_code == 0, (words, shown.output)
        codes = EXIT_CODES_OF_RUN if words == ("run",) else EXIT_CODES
        assert shown.output.count(f"\nExit codes: {codes}") == 1, words
        assert "\nEnvironment: ISOLATOR_ROOT is the default of --root; NO_COLOR" in shown.output, words
        assert max(map(len, shown.output.splitlines()[-2:])) <= WIDTH, shown.output


def test_every_help_has_an_example_and_whole_sentences() -> None:
    helps = {words: CliRunner().invoke(cli, [*words, "--help"]).output for words in ALL}
    assert not [words for words, shown in helps.items() if "\n  Example" not in shown]
    assert not [words for words, shown in helps.items() if "...\n" in shown.partition("\nCommands:")[2]]


@pytest.mark.parametrize(("group", "alias"), OTHER_NAMES, ids=" ".join)
def test_other_name_of_a_command_is_that_command(group: str, alias: str) -> None:
    found = cli.get_command(click.Context(cli), group)
    assert isinstance(found, Aliased)
    context = click.Context(found)
    wanted = found.get_command(context, OTHER_NAMES[group, alias])
    assert wanted is not None and found.get_command(context, alias) is wanted
    helps = [
        CliRunner().invoke(cli, [group, name, "--help"]).output.partition("\n")[2]
        for name in (alias, OTHER_NAMES[group, alias])
    ]
    assert helps[0] == helps[1] and helps[0]


def test_nothing_but_one_place_makes_colours() -> None:
    places = [path for folder in ("host", "isolator") for path in (REPO / folder).rglob("*.py")]
    found = {str(path.relative_to(REPO)) for path in places if re.search(r"secho\(|click\.style\(", path.read_text())}
    assert found == {"isolator/cli/output.py"}


@pytest.mark.parametrize("name", COLOURED)
@pytest.mark.parametrize("thread", [False, True], ids=["", "by a thread"])
def test_colours_are_on_a_terminal_and_off_with_no_color(
    monkeypatch: pytest.MonkeyPatch, name: str, thread: bool
) -> None:
    def shown() -> str:
        reader, writer = os.openpty()
        with os.fdopen(writer, "w") as terminal, monkeypatch.context() as patch:
            patch.setattr("sys.stdout", terminal)
            patch.setattr("sys.stderr", terminal)
            work = threading.Thread(target=COLOURED[name]) if thread else None
            if work is not None:
                work.start()
                work.join()
            else:
                COLOURED[name]()
        text = b""
        with owning(reader), contextlib.suppress(OSError):  # at its end, as nobody else has the terminal
            while part := os.read(reader, 65536):
                text += part
        return text.decode()

    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = shown()
    assert "\x1b[31m" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    plain = shown()
    assert "\x1b" not in plain and plain == re.sub(r"\x1b\[[\d;]*m", "", coloured)
