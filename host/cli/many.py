"""Commands that take several names, and other names of commands."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import click

from isolator.cli.output import Group, print_json
from isolator.errors import IsolatorError

_ALIASES = {"ls": "list", "ps": "list", "rm": "remove", "inspect": "show"}


class Aliased(Group):
    """A group that also knows what its commands are called elsewhere (``ls``, ``ps``, ``rm``, ``inspect``).

    ``lazy``: commands of other packages, each as ``MODULE:ATTRIBUTE``, which are imported when they are wanted.
    """

    def __init__(self, *args: Any, lazy: Mapping[str, str] = MappingProxyType({}), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *self._lazy])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self._lazy:
            return load_command(self._lazy[cmd_name])
        return super().get_command(ctx, cmd_name) or super().get_command(ctx, _ALIASES.get(cmd_name, ""))


def load_command(place: str) -> click.Command:
    """Import a command, named as ``MODULE:ATTRIBUTE``."""
    module, attribute = place.split(":")
    command = getattr(importlib.import_module(module), attribute)
    assert isinstance(command, click.Command)
    return command


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
