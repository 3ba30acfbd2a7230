"""``isolator policy`` with the host's part of a manifest: its config, transport, delivery, health, and its hooks."""

from __future__ import annotations

from typing import Any

from host.events import Catalogue
from host.plugins.manifest import from_data
from isolator.cli import policy as command
from isolator.errors import IsolatorError, UsageError, nearest

policy = command.policy


def _note_hooks(data: dict[str, Any], errors: list[IsolatorError], notes: list[str]) -> None:
    """Tell hooks that are misspelt from those of events which the platform may register."""
    catalogue = Catalogue()
    known = sorted({event.name for event in catalogue})
    for hook in data.get("hooks", ()):
        if catalogue.get(catalogue.canonical(hook)) is not None:
            continue
        near = nearest(hook, known, cutoff=0.85)
        if near:
            errors.append(UsageError(f"hook {hook!r}", f"no such event; did you mean {near!r}?"))
        else:
            notes.append(f"{hook} is an event that the platform has to register first")


command.manifest_parser = from_data
command.manifest_notes = _note_hooks
