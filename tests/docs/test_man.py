"""Man pages are made of the help: every command has one, with its options, and roff reads nothing of it as its own."""

from __future__ import annotations

import re
from pathlib import Path

import click
from click.testing import CliRunner

from host.cli.root import COMMANDS, cli
from isolator.cli import install

_REQUESTS = {"TH", "SH", "TP", "PP", "B", "BR", "nf", "fi"}


def test_every_command_has_a_page_with_its_options(tmp_path: Path) -> None:
    (tmp_path / "isolator-gone.1").write_text("of an earlier version")
    (tmp_path / "other.1").write_text("somebody else's")
    result = CliRunner().invoke(cli, ["man", str(tmp_path)])
    assert result.exit_code == 0, result.output
    names = {path.name for path in tmp_path.iterdir()}
    assert {f"isolator-{name}.1" for name in COMMANDS} | {"isolator.1", "isolator-plugin-add.1", "other.1"} <= names
    assert "isolator-gone.1" not in names
    add = (tmp_path / "isolator-plugin-add.1").read_text().replace("\\-", "-")
    plugin = cli.get_command(click.Context(cli), "plugin")
    assert isinstance(plugin, click.Group)
    command = plugin.get_command(click.Context(plugin), "add")
    assert command is not None
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[0] in add and str(parameter.help).partition(";")[0] in add
    assert "EXIT STATUS" in add and "ISOLATOR_ROOT" in add and "isolator plugin add ./slack-deploy-notifier" in add


def test_page_holds_no_request_but_its_own(tmp_path: Path) -> None:
    CliRunner().invoke(cli, ["man", str(tmp_path)])
    for path in tmp_path.glob("*.1"):
        for line in path.read_text().splitlines():
            request = re.match(r"[.']\s*(\w*)", line)
            assert request is None or request[1] in _REQUESTS, (path.name, line)
            assert not re.search(r"\\(?![-e&])", line), (path.name, line)


def test_installation_knows_which_pages_are_its_own(tmp_path: Path) -> None:
    CliRunner().invoke(cli, ["man", str(tmp_path)])
    assert all(path in set(tmp_path.glob("isolator*.1")) for path in tmp_path.iterdir())
    assert install.MAN_PAGES.name == "man1"
