"""Notes on a plugin: each reason stands there once."""

from __future__ import annotations

from host.cli import notes


def test_reason_for_which_events_wait_is_named_once_with_its_remedy() -> None:
    why = "no socket in 10 s; 5 crashes in 10 minutes"
    shown = {"name": "echo", "error": why, "holding": f"plugin echo: {why}; isolator plugin start echo"}
    assert notes.all_notes(shown) == [f"{why}; isolator plugin start echo"]
    assert notes.all_notes(shown | {"holding": "its key waits"}) == [why, "its key waits"]
    assert notes.all_notes(shown | {"paused": None, "holding": None}) == [why]
