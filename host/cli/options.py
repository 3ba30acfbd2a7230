"""Options and arguments that several commands have: one spelling, one meaning and one completion for each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import click

from host.cli.complete import plugin_names
from isolator.cli.output import here

F = TypeVar("F", bound=Callable[..., Any])

NAME = click.argument("name", shell_complete=plugin_names)
NAMES = click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=plugin_names)
CONFIG = click.option("--config", "config", metavar="K=V", multiple=True, help="K=V, K=@FILE or K=-; repeatable.")
SINCE = click.option("--since", metavar="TIME", help="From this time on: 2h, 30m, 2026-01-31, 2026-01-31T12:00 (UTC).")
"""Read by ``isolator.cli.audit.moment``."""
VERBOSE = click.option("-v", "--verbose", is_flag=True, help="Also what each layer promises, in sentences.")


def declaring(*declarations: Callable[[F], F]) -> Callable[[F], F]:
    """One decorator of several: the options and arguments of a command, in their order."""

    def declare(command: F) -> F:
        for one in reversed(declarations):
            command = one(command)
        return command

    return declare


def yes(meaning: str = "Agree to what is shown.") -> Callable[[F], F]:
    """Declare ``--yes``, which answers a question before it is asked."""
    return click.option("--yes", "-y", is_flag=True, help=meaning)


@dataclass(frozen=True)
class Manner:
    """The way in which a plugin is registered at a terminal: agreed to beforehand, with all sentences, as JSON."""

    yes: bool
    verbose: bool
    as_json: bool


def registering(meaning: str = "Agree to what is shown.") -> Callable[[F], F]:
    """Pass the root to a command that registers, as its first parameter, and declare its ``manner``."""

    def declare(command: F) -> F:
        @functools.wraps(command)
        def called(root: str | None, *, yes: bool, verbose: bool, as_json: bool, **others: Any) -> Any:
            return command(root, manner=Manner(yes, verbose, as_json), **others)

        return cast(F, yes(meaning)(VERBOSE(here(called))))

    return declare


def of_plugin(meaning: str, *, required: bool = False) -> Callable[[F], F]:
    """Declare ``--plugin``, which narrows a command to one plugin."""
    return click.option("--plugin", metavar="NAME", required=required, shell_complete=plugin_names, help=meaning)
