"""State of a process on its way to its successor: one JSON object, and descriptors that it names by number.

The old process packs what it has (``Departure``) and sends it in parts over its channel; the supervisor passes each on
to the new process unread, which unpacks it (``Succession``). A part has at most ``PART_FDS`` descriptors; the first of
the first part is a sealed file in memory with the JSON object. Each part is acknowledged before the next is sent, so
that nothing gathers on the way.

The object's ``version`` is its format (``isolator.ipc.formats``). The old process is told which ones the new one reads
before it leaves; a new process that reads none of the old one's has to be started as after a crash.
"""

from __future__ import annotations

import base64
import json
import os
from dataclasses import field
from typing import Generic, Self, TypeVar

from isolator.errors import IsolatorError, UsageError, translated
from isolator.ipc.body import Body, Handler, Json, by_op
from isolator.ipc.channel import Channel
from isolator.ipc.formats import Formats
from isolator.ipc.messages import ReadableFormats, ReadFormats, StatePart, WriteFormat
from isolator.linux.descriptors import FdSet, close_all
from isolator.linux.memfd import make_sealed, read_sealed

PART_FDS = 60
MOST_BYTES = 1 << 30
"""Bytes of a state's JSON."""
DESCRIPTOR = {"descriptor": True}
"""Metadata of a field that names descriptors."""


def to_text(data: bytes | bytearray | memoryview) -> str:
    """Bytes as a text of the JSON object."""
    return base64.b64encode(data).decode()


def to_bytes(text: str) -> bytes:
    """The bytes behind a text of ``to_text``; raises UsageError."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise UsageError("a state that was handed over", f"is damaged: {error}") from None


class Departure:
    """Descriptors that a process hands on, numbered in the order in which they were added. Owns them."""

    def __init__(self) -> None:
        self._fds = FdSet()

    def add(self, fd: int) -> int:
        """Take over a descriptor; returns its number."""
        self._fds.add(fd)
        return len(self._fds) - 1

    def copy(self, fd: int) -> int:
        """Hand on a copy of a descriptor, whose owner closes its own; returns its number. Raises OSError."""
        return self.add(os.dup(fd))

    async def send(self, state: Json, channel: Channel) -> int:
        """Send everything, and close it here; returns the number of parts. Raises IsolatorError, OSError."""
        fds = self._fds.release_all()
        try:
            fds.insert(0, make_sealed(json.dumps(state, separators=(",", ":")).encode()))
            parts = range(0, len(fds), PART_FDS)
            for number, start in enumerate(parts):
                await channel.ask(StatePart(number=number), fds=fds[start : start + PART_FDS])
            return len(parts)
        finally:
            close_all(fds)


class Descriptors:
    """Descriptors that came with a state; a context manager that closes those that nobody took."""

    def __init__(self, fds: list[int]) -> None:
        self._fds = dict(enumerate(fds))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        close_all(self._fds.values())
        self._fds.clear()

    def take(self, number: int) -> int:
        """The descriptor of that number, from now on the caller's; raises UsageError when there is none."""
        with translated(KeyError, UsageError, "a state that was handed over", f"has no descriptor {number}"):
            return self._fds.pop(number)


class SenderState(Body):
    """A sender of records (``isolator.audit.client``) on its way to another process, or over an exec."""

    socket: int = field(metadata=DESCRIPTOR)
    """-1: there was no audit process"""
    session: str
    number: int
    pending: tuple[str, ...]
    """records that are not sent"""
    unacked: tuple[str, ...]
    """records that are not known to be on disk"""
    answered: int
    sent: int
    acked: int
    lost: int
    blocked: str | None
    alarm: str | None


B = TypeVar("B", bound=Body)


class Succession(Generic[B]):
    """A process's part in it: it takes the place of another, and hands on to the next. ``handlers`` serve both."""

    def __init__(self, formats: Formats[B]) -> None:
        self._formats, self._format = formats, formats.present
        self._parts = 0
        self._fds: list[int] = []

    def handlers(self) -> dict[str, Handler]:
        """Handlers of what every process is asked in an exchange, but ``leave``."""
        return by_op(
            ReadFormats.on_now(lambda _: ReadableFormats(formats=self._formats.read)),
            StatePart.on_fds(self._part),
            WriteFormat.on_now(self._write_format),
        )

    def _write_format(self, request: WriteFormat) -> None:
        self._format = self._formats.newest_common(request.formats) or self._formats.present

    async def _part(self, request: StatePart, fds: list[int]) -> None:
        if request.number != self._parts:
            raise UsageError(request.op, f"part {request.number} came in place of {self._parts}")
        self._parts += 1
        self._fds += fds
        fds.clear()

    def unpack(self, parts: int) -> tuple[B, Descriptors]:
        """The state that has come, and its descriptors; raises IsolatorError when it is not whole or not readable."""
        where, fds, self._fds = "a state that was handed over", self._fds, []
        try:
            if parts != self._parts or not fds:
                raise UsageError(where, f"came in {self._parts} parts instead of {parts}")
            found = json.loads(read_sealed(fds[0], MOST_BYTES))
            number = found.pop("version", None) if isinstance(found, dict) else None
            if number not in self._formats.read:
                expected = " or ".join(map(str, self._formats.read))
                raise IsolatorError(where, f"is of the format {number}, and this version reads {expected}")
            state = self._formats.state(number, found, self._formats.kind.__name__)
        except (OSError, ValueError, RecursionError) as error:
            close_all(fds)
            raise UsageError(where, f"cannot be read: {error}") from None
        except BaseException:
            close_all(fds)
            raise
        os.close(fds.pop(0))
        return state, Descriptors(fds)

    async def send(self, state: B, departure: Departure, channel: Channel) -> int:
        """Send a state with its descriptors; returns the number of parts. Raises IsolatorError, OSError."""
        return await departure.send({"version": self._format, **self._formats.body(state, self._format)}, channel)


class Passage:
    """The supervisor's part: each part of the old process goes to the new one, unread."""

    def __init__(self, successor: Channel) -> None:
        self.parts = 0
        self._successor = successor

    async def part(self, request: StatePart, fds: list[int]) -> None:
        """Pass one part on; the old process sends the next one when this has returned."""
        await self._successor.ask(request, fds=fds)
        self.parts += 1
