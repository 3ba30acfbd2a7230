"""Names for the shell's completion: those of the daemon's plugins and events; none while it does not answer.

Switched on by click's own script: ``eval "$(_ISOLATOR_COMPLETE=bash_source isolator)"``.
"""

from __future__ import annotations

from collections.abc import Callable

import click

from host.client.client import Client
from isolator.errors import IsolatorError

_PATIENCE = 2.0
"""Seconds: nobody waits longer at a key press."""


def _begins_so(verb: str, key: str, field: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """The values that begin as what is typed: ``field`` of all that ``verb`` lists under ``key``."""

    def complete(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
        return [entry[field] for entry in _ask(ctx, verb, key) if entry[field].startswith(incomplete)]

    return complete


plugin_names = _begins_so("plugin.list", "plugins", "name")
event_names = _begins_so("event.types", "types", "name")
event_ids = _begins_so("event.list", "events", "id")


def _ask(ctx: click.Context, verb: str, key: str) -> list[dict[str, str]]:
    root = ctx.find_root().params.get("root")
    try:
        with Client(root, timeout=_PATIENCE) as client:
            found = client.call(verb)[key]
    except IsolatorError:
        return []
    return found if isinstance(found, list) else []
