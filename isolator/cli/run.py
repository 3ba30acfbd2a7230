"""``isolator run``: one command in one cage, as click reads its line and shows its help.

A line without a mistake does not come here: see ``host.cli.main``.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from isolator.standalone.options import OPTIONS, Option, RunOptions


def _parameter(option: Option) -> click.Option:
    if not option.metavar:
        return click.Option(option.names, is_flag=True, help=option.help)
    kind = click.Choice(option.choices) if option.choices else click.INT if option.number else click.STRING
    metavar = None if option.choices else option.metavar
    return click.Option(option.names, type=kind, metavar=metavar, multiple=option.repeated, help=option.help)


def _run(**values: Any) -> None:
    if not values["command"]:
        raise click.UsageError("no command; write it after '--', e.g. isolator run -- id")
    from isolator.standalone.command import run

    sys.exit(run(RunOptions(**values, root=click.get_current_context().obj)))


run = click.Command(
    "run",
    callback=_run,
    params=[*map(_parameter, OPTIONS), click.Argument(["command"], nargs=-1, type=click.UNPROCESSED)],
    context_settings={"allow_interspersed_args": False},
    help="Run one COMMAND in a cage, with this terminal's input and output.\n\n"
    "It gets a free uid, no network unless --egress or --net, /usr read-only and 32 MiB of /tmp; the current folder is "
    "not visible unless named with --read or --write; what it makes there with --write belongs to the caller. Exits "
    "with the command's code (128 + signal if killed), or 125 if the cage could not be built.",
    epilog="\b\nExample: an agent's tools, on a project folder:\n"
    '  isolator run --write "$PWD" --cwd "$PWD" -- sh -c "$TOOL_CALL"\n'
    "\b\nExample: a build:\n"
    '  isolator run --write "$PWD" --cwd "$PWD" --tasks 256 --cpu 200% -- make -j2\n'
    "\b\nExample: an MCP server, with its token in a file:\n"
    "  isolator run --read /opt/weather --env-file weather.env \\\n"
    "    --egress api.example.com:443 -- python3 /opt/weather/server.py",
)
"""The command, made of ``OPTIONS``."""
