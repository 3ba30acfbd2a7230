"""Log of a cluster as a host uses it, whatever keeps it: messages in one order, which all hosts read alike.

Nothing else is asked of it. An acknowledgement proves nothing here: what a host has written counts when it reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple, NoReturn, Protocol

QUESTION: Final = 4096
"""Bytes of a question of another host that is answered."""


class LogUnavailableError(Exception):
    """The log does not answer at the moment, or refuses: in the text is why. Whether an append was made is unknown."""


class LogFullError(LogUnavailableError):
    """The log's disk or its servers' bounds are full: nothing is appended until there is room."""


class LogRefusedError(LogUnavailableError):
    """The log refuses this host until a person has changed something: credentials, permissions, no such stream."""


class UnusableSettingsError(LogRefusedError):
    """``[cluster]`` names what this host cannot use: its log is out of reach, and no server was asked."""


class Entered(NamedTuple):
    """A message of the log: its place, Unix time by the servers' clock, subject and body.

    The body is empty if no host has published the message: somebody has had the servers store it under that subject.
    """

    place: int
    time: float
    subject: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Facts:
    """The log as its servers describe it. ``first`` is 1 while nothing of it was removed.

    ``created`` tells a log from another of the same name. ``wrong`` names settings under which it cannot be used.
    """

    first: int
    last: int
    created: str = ""
    replicas: int = 1
    servers: tuple[str, ...] = ()
    """The servers' versions, as far as they are known."""
    bytes: int = 0
    max_bytes: int = 0
    wrong: tuple[str, ...] = field(default=())
    behind: tuple[str, ...] = ()
    """Names of servers that are away, or whose copy lacks entries."""


class Log(Protocol):
    """A replicated, totally ordered log. Every method but ``close`` may raise LogUnavailableError, soon (1 to 2 s)."""

    async def append(self, subject: str, body: bytes) -> None:
        """Have a message written. Neither its return nor an error says for sure whether it was."""

    async def after(self, place: int) -> Entered | None:
        """The next message after a place; None: there is no newer one yet."""

    async def wait(self, seconds: float) -> None:
        """Return when somebody may have written something, or after a time."""

    async def facts(self) -> Facts:
        """The log's bounds and settings."""

    async def ask(self, subject: str, body: bytes) -> bytes:
        """The first answer of another host; raises LogUnavailableError if there is none."""

    def answer(self, subject: str, handler: Callable[[bytes], bytes | None]) -> None:
        """Answer other hosts from now on; None: say nothing."""

    async def close(self) -> None:
        """End the connections."""


class UnusableLog:
    """Log of a host whose ``[cluster]`` is of no use: it refuses everything, with the reason.

    So the host is one that is cut off, which is a state that it has anyway: it acts on nothing that is the cluster's.
    """

    def __init__(self, why: str) -> None:
        self._why = why

    async def _refuse(self, *_: object) -> NoReturn:
        raise UnusableSettingsError(self._why)

    append = after = wait = facts = ask = _refuse

    def answer(self, subject: str, handler: Callable[[bytes], bytes | None]) -> None:
        """Nobody asks."""

    async def close(self) -> None:
        """Nothing is open."""
