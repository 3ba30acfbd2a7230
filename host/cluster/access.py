"""Names of a cluster on its servers: the stream, its subjects, and what a host's user may do with them."""

from __future__ import annotations

from typing import Any, Final

STREAM: Final = "ISO"
SUBJECTS: Final = ("iso.ev.*", "iso.ctl.*")
TICK: Final = "iso.tick"
"""Whoever has written wakes the readers by it."""


def permissions(host: str) -> dict[str, Any]:
    """Permissions of a host's user, as the servers' configuration has them."""
    reads = [f"$JS.API.DIRECT.GET.{STREAM}", f"$JS.API.STREAM.INFO.{STREAM}"]
    return {
        "publish": [f"iso.ev.{host}", f"iso.ctl.{host}", TICK, "iso.ask", "iso.ask.*", *reads],
        "subscribe": [f"{inbox_of(host)}.>", TICK, "iso.ask", f"iso.ask.{host}"],
        "allow_responses": True,
    }


def inbox_of(host: str) -> str:
    """The prefix of a host's own inboxes: no other may read the answers to it."""
    return f"_ISO.{host}"
