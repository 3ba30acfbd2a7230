"""The checks of a certification: a fault of the other side each, and who it can be played to."""

from __future__ import annotations

from dataclasses import dataclass

from host.authoring.certify.stage import Play
from isolator.policy.request import MODES

_WIRE = ("oneshot", "stream", "http")
"""Modes in which the plugin is connected to."""


@dataclass(frozen=True)
class Check:
    """One check. What it plays may cost the event itself, in the modes ``loses``; the plugin has to go on."""

    name: str
    title: str
    play: Play
    modes: tuple[str, ...] = MODES
    loses: tuple[str, ...] = ()


CHECKS = (
    Check("events", "each event is answered in time, in good order", "plain"),
    Check("id", "the reply has the id of its request", "id", ("oneshot",)),
    Check("bytes", "a request that comes byte by byte", "bytes", _WIRE),
    Check("late", "a request that comes late", "late", _WIRE),
    Check("empty", "a connection without a request", "empty", ("oneshot", "http")),
    Check("half", "a connection that ends in mid-request", "half", _WIRE, ("stream",)),
    Check("gone", "a connection that ends before the reply", "gone", _WIRE, ("stream",)),
    Check("garbage", "a line that is no message", "garbage", _WIRE, ("stream",)),
    Check("twice", "the same event twice", "twice", (*_WIRE, "exec")),
    Check("joined", "two requests in one piece", "joined", ("stream",)),
    Check("note", "a notification that nobody knows", "note", ("stream",)),
    Check("sigterm", "SIGTERM in mid-event", "hold", _WIRE, _WIRE),
    Check("disk", "a full disk", "plain"),
    Check("down", "other sides that do not answer for 20 s", "down"),
)
NAMES = tuple(check.name for check in CHECKS)


def checks_for(mode: str, names: tuple[str, ...]) -> list[Check]:
    """The checks of a mode, of ``names`` alone if there are any."""
    return [check for check in CHECKS if mode in check.modes and (not names or check.name in names)]
