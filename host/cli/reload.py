"""``isolator reload``: the daemon executes the program that is installed, and its plugins go on running."""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

import click

from host.client.client import Client
from isolator.cli.output import here, print_result
from isolator.cli.progress import Progress
from isolator.errors import IsolatorError, UnavailableError

_LOOK = 0.1
"""Seconds between two looks: a daemon that is exchanged closes the connection, so none of its events reaches it."""
_STEPS = 4
"""Steps of the progress: the supervisor, then the three services that are exchanged."""


@click.command(epilog="\b\nExamples:\n  sudo isolator reload\n  isolator reload --timeout 120")
@click.option(
    "--timeout", default=90.0, show_default=True, type=click.FloatRange(1, 3600), help="Seconds to wait for it."
)
@click.option("--no-wait", is_flag=True, help="Return when the supervisor runs it; audit, broker and host follow.")
@here
def reload(root: str | None, timeout: float, no_wait: bool, as_json: bool) -> None:
    """Take over an update and host.toml without stopping a plugin.

    Returns when every process of the daemon runs the program that is installed by now, with the settings of host.toml.
    If that cannot take over, the daemon goes on as it is, and the reason is printed.
    """
    end = time.monotonic() + timeout
    with Progress("reloading", _STEPS, quiet=as_json) as progress:
        wanted, before = _ask(root, end)
        found = _wait(root, wanted, end, None if no_wait else before, progress)
    print_result(
        {"generation": found["generation"], "version": found["version"]},
        f"reloaded: version {found['version']}, generation {found['generation']}",
        as_json=as_json,
    )


def _ask(root: str | None, end: float) -> tuple[int, int]:
    """Ask for a reload, once another that is under way is over: that one may have begun too early.

    The one after that will do, whoever asked for it: while they come without end, none of them is this command's.
    Returns the generation that comes of it, and the pid of the host process before it.
    """
    wanted, hosts = math.inf, list[int]()
    while True:
        with Client(root, timeout=max(1.0, end - time.monotonic())) as client:
            hosts.append(client.call("status")["pid"])
            try:
                return client.call("daemon.reload")["generation"], hosts[-1]
            except UnavailableError as error:  # of the supervisor's: not now
                if error.what != "reload" or time.monotonic() > end:
                    raise
            with contextlib.suppress(UnavailableError):  # it is away for a moment
                present = client.call("daemon.generation")["generation"]
                wanted = min(wanted, present + 2)
                if present >= wanted:
                    return present, hosts[0]
        time.sleep(_LOOK)


def _wait(root: str | None, wanted: int, end: float, host: int | None, progress: Progress) -> dict[str, Any]:
    """Look until the reload is through; returns the daemon's generation. Each look is a connection of its own.

    ``host``: the pid of the host process before it, for the services to be waited for, too.
    """
    left = "the supervisor"
    while True:
        try:
            with Client(root, timeout=max(1.0, end - time.monotonic())) as client:
                found = client.call("daemon.generation")
                if found["generation"] >= wanted:
                    services = _outdated(client, found, host) if host is not None else {}
                    progress.reach(_STEPS - len(services), _STEPS)
                    if all(services.values()):
                        return _complete(found, services)
                    left = ", ".join(services)
            if found["generation"] < wanted and found["refused"]:
                raise IsolatorError("reload", f"refused, and nothing has changed: {found['refused']}")
        except UnavailableError:  # its host process is being exchanged
            if time.monotonic() > end:
                raise
        if time.monotonic() > end:
            raise UnavailableError("reload", f"{left} has not come through in time", "see the daemon's log")
        time.sleep(_LOOK)


def _outdated(client: Client, found: dict[str, Any], host: int) -> dict[str, str]:
    """The services that are still as before, with the reason where it will stay so.

    A host process of a version that does not know them is either to be exchanged, or the last to be.
    """
    if "outdated" in found:
        return dict(found["outdated"])
    return {"host": ""} if client.call("status")["pid"] == host else {}


def _complete(found: dict[str, Any], services: dict[str, str]) -> dict[str, Any]:
    for name, why in services.items():
        raise IsolatorError("reload", f"{name} goes on as before the reload: {why}", "mend that and repeat it")
    return found
