"""``isolator reload``: the daemon executes the program that is installed, and its plugins go on running."""

from __future__ import annotations

import time
from typing import Any

import click

from host.cli.options import here
from host.cli.output import print_json
from host.client.client import Client
from isolator.errors import IsolatorError, UnavailableError

_LOOK = 0.1


@click.command(epilog="\b\nExamples:\n  sudo isolator reload\n  isolator reload --timeout 120")
@click.option(
    "--timeout", default=90.0, show_default=True, type=click.FloatRange(1, 3600), help="Seconds to wait for it."
)
@here
def reload(root: str | None, timeout: float, as_json: bool) -> None:
    """Take over an update and host.toml without stopping a plugin.

    Returns when the daemon runs the program that is installed by now. If that cannot take over, the daemon goes on as
    it is, and the reason is printed.
    """
    end = time.monotonic() + timeout
    with Client(root, timeout=timeout) as client:
        wanted = client.call("daemon.reload")["generation"]
    found = _wait(root, wanted, end)
    if as_json:
        print_json({"generation": found["generation"], "version": found["version"]})
    else:
        click.echo(f"reloaded: version {found['version']}, generation {found['generation']}")


def _wait(root: str | None, wanted: int, end: float) -> dict[str, Any]:
    """The daemon's generation once it is the one that was wanted; each look is a connection of its own."""
    while True:
        try:
            with Client(root, timeout=max(1.0, end - time.monotonic())) as client:
                found = client.call("daemon.generation")
            if found["generation"] >= wanted:
                return found
            if found["refused"]:
                raise IsolatorError("reload", f"refused, and nothing has changed: {found['refused']}")
        except UnavailableError:  # its host process is being exchanged
            if time.monotonic() > end:
                raise
        if time.monotonic() > end:
            raise UnavailableError("reload", "it has not come through in time", "see the daemon's log")
        time.sleep(_LOOK)
