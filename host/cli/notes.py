"""Notes on a plugin as ``plugin.list`` shows it: what an operator should know of it, in a few words each.

They hold texts that a plugin wrote: whoever prints one makes it ``safe``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from host.cli.output import ago, duration

BAD_STATES = ("failed", "rejected", "backoff")
"""States of a plugin that does not run as it should."""


def fails(shown: Mapping[str, Any]) -> bool:
    """Whether a plugin fails, was refused, or holds events back."""
    return shown["state"] in BAD_STATES or any(
        shown.get(key) for key in ("error", "holding", "failing_since", "missing")
    )


def all_notes(shown: Mapping[str, Any]) -> list[str]:
    """Everything an operator should know about a plugin, the most urgent first, each once."""
    error, lease, holding = shown.get("error") or "", shown.get("lease") or "", shown.get("holding")
    unset = None if holding else missing(shown)  # events that wait for it say so
    holding = None if shown.get("paused") else holding
    if holding and error and error in holding:  # with what to do about it
        error, holding = holding.removeprefix(f"plugin {shown['name']}: "), None
    lease = "" if lease in error else lease
    found = [error, unset, waiting(shown), paused(shown), failing(shown), holding, lease]
    return [note for note in dict.fromkeys(found) if note]


def failing(shown: Mapping[str, Any]) -> str | None:
    """Since when attempts have failed, why the last one did, and when the next is due."""
    last = shown.get("last")
    if not shown.get("failing_since") or last is None:
        return None
    why = last["detail"] or last["status"] or last["outcome"]
    due = shown.get("next_attempt")
    again = f"; next try in {duration(due - time.time())}" if due else ""
    return f"failing for {ago(shown['failing_since'])}: {why}{again}"


def missing(shown: Mapping[str, Any]) -> str | None:
    """The config without which a plugin does not start, with the command that sets it."""
    keys = shown.get("missing")
    if not keys:
        return None
    return f"{', '.join(keys)} is required and not set; isolator plugin config {shown['name']} set {keys[0]}=@FILE"


def paused(shown: Mapping[str, Any]) -> str | None:
    """Since when a plugin is paused, by whom, with the command that ends it."""
    pause = shown.get("paused")
    if not pause:
        return None
    return f"paused {ago(pause['since'])} ago by {pause['by']}; isolator plugin resume {shown['name']}"


def waiting(shown: Mapping[str, Any]) -> str | None:
    """The part of a plugin that waits for an operator, with the remedy."""
    if shown.get("found"):
        return f"found in {shown['found']}; isolator plugin approve {shown['name']}"
    pending = shown.get("pending")
    return f"{pending['version']} asks for more; isolator plugin approve {shown['name']}" if pending else None
