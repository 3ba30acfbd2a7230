"""``isolator check``: the controls that this host can enforce, and the alarms of a daemon that runs here."""

from __future__ import annotations

import click

from host.cli.output import show_alarms
from host.client.client import Client
from isolator.cli.check import show
from isolator.cli.output import here
from isolator.errors import IsolatorError
from isolator.paths import Paths
from isolator.policy.parse.trusted import invoker, load_host_config

_TIMEOUT = 20.0


@click.command(
    epilog="\b\nExamples:\n  sudo isolator check\n  sudo isolator check --json | jq '.controls[]'",
)
@here
def check(root: str | None, as_json: bool) -> None:
    """Show which controls this host can enforce, and how to mend each gap.

    Exits 1 when a mandatory control is unavailable, or when the daemon that runs here has an alarm: no plugin would
    start.
    """
    alarms = _alarms(root)
    show_alarms(alarms)
    show(alarms, _notes(root), as_json=as_json)


def _notes(root: str | None) -> list[str]:
    try:
        return load_host_config(Paths.of(root).host_toml, also_owner=invoker()).notes()
    except IsolatorError:
        return []  # the daemon would not start with it; 'policy check' says why


def _alarms(root: str | None) -> list[str]:
    try:
        with Client(root, timeout=_TIMEOUT) as client:
            return [str(alarm) for alarm in client.call("status").get("alarms", ())]
    except IsolatorError:
        return []  # none runs, or this user may not see its alarms
