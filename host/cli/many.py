"""Commands that take several names, and other names of commands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from host.cli.output import print_json
from isolator.errors import IsolatorError

_ALIASES = {"ls": "list", "ps": "list", "rm": "remove", "inspect": "show"}


class Aliased(click.Group):
    """A group that also knows what its commands are called elsewhere (``ls``, ``ps``, ``rm``, ``inspect``)."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, cmd_name) or super().get_command(ctx, _ALIASES.get(cmd_name, ""))


def each(names: Sequence[str], work: Callable[[str], dict[str, Any]], *, as_json: bool) -> int:
    """Do something for each name, also when it fails for one; returns the exit code: that of the first failure.

    With one name its error is raised as it is, and its answer is the document of ``as_json``; with several that is an
    object by name, of answers and ``error``s.
    """
    if len(names) == 1:
        answer = work(names[0])
        if as_json:
            print_json(answer)
        return 0
    answers: dict[str, Any] = {}
    code = 0
    for name in dict.fromkeys(names):
        try:
            answers[name] = work(name)
        except IsolatorError as error:
            code = code or error.exit_code
            answers[name] = {"error": error.to_json()}
            if not as_json:
                click.echo(f"isolator: {error}", err=True)
    if as_json:
        print_json(answers)
    return code
