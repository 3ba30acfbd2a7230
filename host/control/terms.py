"""Kinds of parameters, and parts of answers, that verbs of several nouns share."""

from __future__ import annotations

from typing import Annotated, TypedDict

from host.control.parameters import ConfigValues, Text

LARGEST = 1 << 53
"""The largest number that every JSON reader keeps exactly."""
Name = Annotated[str, Text()]
OptionalText = Annotated[str | None, Text(least=0, nullable=True)]
Config = Annotated[dict[str, str], ConfigValues()]
"""Values may be secrets: fields of this type are left out of ``repr``."""


class Nothing(TypedDict):
    """An answer without content."""


class Attempted(TypedDict):
    """The newest attempt to deliver an event that has ended, with the Unix time of its end."""

    event_id: str
    outcome: str
    status: str | None
    detail: str | None
    at: float


class Pause(TypedDict):
    """Pause of a plugin's deliveries: since when (Unix time), and who set it."""

    since: float
    by: str
