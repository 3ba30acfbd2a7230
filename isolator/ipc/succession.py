"""State of a process on its way to its successor: one JSON object, and descriptors that it names by number.

The old process packs what it has (``Departure``) and sends it in parts over its channel; the supervisor passes each on
to the new process unread, which unpacks it (``Arrival``). A part has at most ``PART_FDS`` descriptors; the first of the
first part is a sealed file in memory with the JSON object. Each part is acknowledged before the next is sent, so that
nothing gathers on the way.

The object's ``version`` says which type it is. Who does not know it has to be started as after a crash.
"""

from __future__ import annotations

import base64
import json
import os
from typing import Self, TypeVar

from isolator.errors import IsolatorError, UsageError
from isolator.ipc.body import Body
from isolator.ipc.channel import Channel
from isolator.ipc.messages import StatePart
from isolator.linux.descriptors import FdSet, close_all
from isolator.linux.memfd import make_sealed, read_sealed

PART_FDS = 60
MOST_BYTES = 1 << 30
"""Bytes of a state's JSON."""


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

    async def send(self, state: Body, channel: Channel) -> int:
        """Send everything, and close it here; returns the number of parts. Raises IsolatorError, OSError."""
        fds = self._fds.release_all()
        try:
            fds.insert(0, make_sealed(json.dumps(state.to_json(), separators=(",", ":")).encode()))
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
        try:
            return self._fds.pop(number)
        except KeyError:
            raise UsageError("a state that was handed over", f"has no descriptor {number}") from None


B = TypeVar("B", bound=Body)


class Arrival:
    """The parts of a state as they come; serves ``StatePart``."""

    def __init__(self) -> None:
        self._parts = 0
        self._fds: list[int] = []

    async def part(self, request: StatePart, fds: list[int]) -> None:
        """Take over the next part."""
        if request.number != self._parts:
            raise UsageError(request.op, f"part {request.number} came in place of {self._parts}")
        self._parts += 1
        self._fds += fds
        fds.clear()

    def unpack(self, parts: int, kind: type[B], *versions: int) -> tuple[B, Descriptors]:
        """The state and its descriptors; raises IsolatorError when it is not whole, or of none of these versions."""
        fds, self._fds = self._fds, []
        try:
            if parts != self._parts or not fds:
                raise UsageError("a state that was handed over", f"came in {self._parts} parts instead of {parts}")
            found = json.loads(read_sealed(fds[0], MOST_BYTES))
            if not isinstance(found, dict) or found.get("version") not in versions:
                expected = " or ".join(map(str, versions))
                raise IsolatorError("a state that was handed over", f"is not of the version {expected}")
            state = kind.from_json(found, kind.__name__)
        except (OSError, ValueError, RecursionError) as error:
            close_all(fds)
            raise UsageError("a state that was handed over", f"cannot be read: {error}") from None
        except BaseException:
            close_all(fds)
            raise
        os.close(fds.pop(0))
        return state, Descriptors(fds)


class Passage:
    """The supervisor's part: each part of the old process goes to the new one, unread."""

    def __init__(self, successor: Channel) -> None:
        self.parts = 0
        self._successor = successor

    async def part(self, request: StatePart, fds: list[int]) -> None:
        """Pass one part on; the old process sends the next one when this has returned."""
        await self._successor.ask(request, fds=fds)
        self.parts += 1
