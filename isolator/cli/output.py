"""Output of every command: JSON for programs, and colours for people, none where ``NO_COLOR`` is set.

https://no-color.org; whichever thread writes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import click

from isolator.errors import IsolatorError, NeedsApprovalError

F = TypeVar("F", bound=Callable[..., Any])

_SENTENCE = 200
"""Characters of a command's line in the help of its group."""
AS_JSON = click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")


class Group(click.Group):
    """A group whose help has the first sentence of each command's, whole."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.get_short_help_str(_SENTENCE)) for name, one in commands if one is not None])


def here(command: F) -> F:
    """Pass the root to a command, as its first parameter, and give it ``--json`` (``as_json``)."""
    return cast(F, AS_JSON(click.pass_obj(command)))


def print_json(value: Any) -> None:
    """Print one indented JSON document."""
    click.echo(json.dumps(value, indent=2))


def print_result(value: Any, text: str, *, as_json: bool) -> None:
    """Print what a command has done: the answer as JSON, or a text for people."""
    if as_json:
        print_json(value)
    else:
        click.echo(text)


def need_root(command: str, why: str) -> None:
    """Raise IsolatorError unless root calls the command; ``why``: what it does that takes root."""
    if os.geteuid() != 0:
        raise IsolatorError(command, why, f"run it with sudo: sudo isolator {command}")


def confirm(command: str, question: str) -> None:
    """Ask the person at the terminal, whose no ends the command; raises NeedsApprovalError where there is none."""
    if not sys.stdin.isatty():
        raise NeedsApprovalError(command, "nobody is there to agree", "add --yes")
    click.confirm(question, abort=True)


def styled(text: str, fg: str | None = None, *, bold: bool = False) -> str:
    """The text in a colour, or bold; click leaves either out where no terminal shows it."""
    return text if os.environ.get("NO_COLOR") else click.style(text, fg=fg, bold=bold or None)
