"""``isolator plugin denials``: what a plugin was refused, and what failed."""

from __future__ import annotations

from typing import Any

import click

from host.cli import denials as summary
from host.cli import trail
from host.cli.options import NAME, SINCE
from host.cli.output import newest
from host.client.client import Client
from isolator.audit.reader import Query
from isolator.cli.audit import moment
from isolator.cli.output import here, print_json
from isolator.errors import IsolatorError


@click.command(
    epilog="\b\nExamples:\n  isolator plugin denials slack\n  isolator plugin denials slack --since 1h --json",
)
@NAME
@newest("limit", 50, 100_000)
@SINCE
@here
def denials(root: str | None, name: str, limit: int, since: str | None, as_json: bool) -> None:
    """Show what a plugin was refused, and what failed, each thing once.

    A refusal comes with the line that would grant it, or why none can; a limit
    that it ran into with the line that raises it, and what its manifest asks
    for. A connection or lookup that "failed" was granted: the other side, or
    this host's DNS, did not answer.
    """
    with Client(root) as client:
        entry = client.call("plugin.show", name=name)
        lines = _explained(client, name)
    records = trail.search(root, Query(entry["name"], summary.TYPES, since=moment(since)))
    found = summary.collect((record for _, record in records), entry, lines)[-limit:]
    if as_json:
        print_json([denial.to_json() for denial in found])
    elif found:
        click.echo("\n".join(summary.lines(found, name)))
    else:
        click.echo(
            f"{name} was refused nothing so far; nothing that it was granted has failed, and no limit was reached",
            err=True,
        )


def _explained(client: Client, name: str) -> list[dict[str, Any]]:
    """The lines of ``explain``; none of a plugin that cannot be explained."""
    try:
        lines = client.call("plugin.explain", name=name)["proposal"]["lines"]
    except IsolatorError:
        return []
    return [dict(line) for line in lines]
