"""Names for the shell's completion: those of the daemon's plugins and events; none while it does not answer.

Switched on by click's own script: ``eval "$(_ISOLATOR_COMPLETE=bash_source isolator)"``.
"""

from __future__ import annotations

import click

from host.client.client import Client
from isolator.errors import IsolatorError

_PATIENCE = 2.0
"""Seconds: nobody waits longer at a key press."""


def plugin_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of plugins that begin so."""
    return [entry["name"] for entry in _ask(ctx, "plugin.list", "plugins") if entry["name"].startswith(incomplete)]


def event_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of event types that begin so."""
    return [entry["name"] for entry in _ask(ctx, "event.types", "types") if entry["name"].startswith(incomplete)]


def event_ids(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Ids of the newest events that begin so."""
    return [entry["id"] for entry in _ask(ctx, "event.list", "events") if entry["id"].startswith(incomplete)]


def _ask(ctx: click.Context, verb: str, key: str) -> list[dict[str, str]]:
    root = ctx.find_root().params.get("root")
    try:
        with Client(root, timeout=_PATIENCE) as client:
            found = client.call(verb)[key]
    except IsolatorError:
        return []
    return found if isinstance(found, list) else []
