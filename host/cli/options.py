"""Options and arguments that several commands have: one spelling, one meaning and one completion for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from host.cli.complete import plugin_names

F = TypeVar("F", bound=Callable[..., Any])

NAME = click.argument("name", shell_complete=plugin_names)
NAMES = click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=plugin_names)
CONFIG = click.option("--config", "config", metavar="K=V", multiple=True, help="K=V, K=@FILE or K=-; repeatable.")
SINCE = click.option("--since", metavar="TIME", help="From this time on: 2h, 30m, 2026-01-31, 2026-01-31T12:00 (UTC).")
"""Read by ``isolator.cli.audit.moment``."""
VERBOSE = click.option("-v", "--verbose", is_flag=True, help="Also what each layer promises, in sentences.")


def yes(meaning: str = "Agree to what is shown.") -> Callable[[F], F]:
    """Declare ``--yes``, which answers a question before it is asked."""
    return click.option("--yes", "-y", is_flag=True, help=meaning)


def of_plugin(meaning: str) -> Callable[[F], F]:
    """Declare ``--plugin``, which narrows a command to one plugin."""
    return click.option("--plugin", metavar="NAME", shell_complete=plugin_names, help=meaning)
