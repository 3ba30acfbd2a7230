"""The command: one look for scripts and pipes, or a screen that goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from host.cli.top.order import ORDERS, ordered
from isolator.cli.output import here, print_json
from isolator.errors import IsolatorError

if TYPE_CHECKING:
    from host.cli.top.figures import Figures, Moment


@click.command(
    epilog="\b\nExamples:\n  isolator top\n  isolator top --sort memory --interval 5\n  isolator top --once\n"
    "  isolator top --once --json | jq '.plugins[] | {name, cpu, memory}'\n\n"
    "\b\nKeys: q ends; j, k and the arrows scroll; r turns the order round; sort by\n"
    "n name, s state, c cpu, m memory, t tasks, e events, w queue, l latency,\n"
    "d denials, b egress.\n\n"
    "\b\nCPU is in hundredths of a core, of the cap; EV/S attempts, and calls of its\n"
    "tools, a second; P99 the latency that one of a hundred of the newest 256\n"
    "attempts exceeds; DENIED the refusals of the last ten minutes; NET/S bytes a\n"
    "second, both ways. STATE of the mode exec: how many invocations there are.\n\n"
    "Without a terminal it is one look, as with --once; with --json it is one\n"
    "document a line, until it is ended."
)
@click.option("--once", is_flag=True, help="One look, and the end.")
@click.option(
    "--sort", type=click.Choice(tuple(ORDERS)), default="cpu", show_default=True, help="Order of the plugins."
)
@click.option(
    "--interval", type=click.FloatRange(0.2, 3600), default=2.0, show_default=True, help="Seconds between two looks."
)
@here
def top(root: str | None, once: bool, sort: str, interval: float, as_json: bool) -> None:
    """Show what plugins use and do at present, beside their caps.

    Above them stand the daemon's processes and the host. --once measures
    rates over --interval, or a second if that is shorter.
    """
    from host.cli.top.figures import Figures

    with contextlib.closing(Figures(root)) as figures:
        if as_json and not once:
            _stream(figures, sort, interval)
        elif as_json:
            print_json(_document(_look(figures, interval), sort))
        else:
            _show(figures, sort, interval, once=once)


def _look(figures: Figures, interval: float) -> Moment:
    """One moment, with rates over a second at most."""
    figures.moment()
    time.sleep(min(interval, 1.0))
    return figures.moment()


def _document(moment: Moment, sort: str) -> dict[str, Any]:
    return {**dataclasses.asdict(moment), "plugins": [dataclasses.asdict(row) for row in ordered(moment.plugins, sort)]}


def _stream(figures: Figures, sort: str, interval: float) -> None:
    """Print a document a line; while the daemon is away, why, on stderr."""
    figures.moment()
    while True:
        time.sleep(interval)
        try:
            click.echo(json.dumps(_document(figures.moment(), sort), separators=(",", ":")))
        except IsolatorError as error:
            click.echo(f"isolator: {error}", err=True)


def _show(figures: Figures, sort: str, interval: float, *, once: bool) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if once or not console.is_terminal or console.is_dumb_terminal or not sys.stdin.isatty():
        from host.cli.top.table import drawn

        console.print(drawn(_look(figures, interval), sort, console.width))
    else:
        from host.cli.top.screen import run

        run(console, figures, sort, interval)
