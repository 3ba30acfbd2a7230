"""Names of a cluster on its servers: the stream, its subjects, and what a host's user may do with them."""

from __future__ import annotations

import re
import secrets
from typing import Any, Final

STREAM: Final = "ISO"
SUBJECTS: Final = ("iso.ev.*", "iso.ctl.*")
TICK: Final = "iso.tick"
"""Whoever has written wakes the readers by it."""
_ANSWER: Final = re.compile(r"_ISO(\.[a-z0-9-]+)?\.answer\.[0-9a-f]{32}\Z")


def permissions(host: str) -> dict[str, Any]:
    """Permissions of a host's user, as the servers' configuration has them.

    Nothing is allowed by ``allow_responses``: who sends a message chooses where its answer goes, also to itself.
    """
    answers = f"{inbox_of('*')}.answer.*"
    reads = [f"$JS.API.DIRECT.GET.{STREAM}", f"$JS.API.STREAM.INFO.{STREAM}"]
    return {
        "publish": [f"iso.ev.{host}", f"iso.ctl.{host}", TICK, "iso.ask", "iso.ask.*", answers, *reads],
        "subscribe": [f"{inbox_of(host)}.>", TICK, "iso.ask", f"iso.ask.{host}"],
    }


def inbox_of(host: str) -> str:
    """The prefix of a host's own inboxes: no other may read the answers to it."""
    return f"_ISO.{host}"


def subject_for_answer(inbox: str) -> str:
    """A subject for one answer of another host, which nobody can guess: each host may publish to all of them."""
    return f"{inbox}.answer.{secrets.token_hex(16)}"


def is_for_answers(subject: str) -> bool:
    """Whether a subject is one for answers of hosts, and nothing else comes of a message to it."""
    return _ANSWER.match(subject) is not None
