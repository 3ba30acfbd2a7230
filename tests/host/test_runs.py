"""Connections to many sidecars in one turn of the event loop: few messages, each outcome its own, nothing left open."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Sequence

import pytest

from host.delivery import runs
from host.delivery.runs import AT_ONCE, Runs, connection
from isolator.errors import DeniedError, UnavailableError
from isolator.ipc import messages
from isolator.ipc.body import WithFds, by_op
from isolator.ipc.channel import ALIVE, Channel, pair


class Supervisor:
    """The other end of the channel: plugins called ``late`` do not accept at once, ``foreign`` ones are refused."""

    def __init__(self) -> None:
        ours, theirs = pair()
        handlers = by_op(messages.ConnectRun.on(self._connect), messages.ConnectRuns.on(self._connect_many))
        self.channel, self.runs = Channel(ours, handlers), Runs(Channel(theirs))
        self.messages: list[Sequence[str]] = []
        self.far: list[socket.socket] = []

    def _made(self) -> int:
        far, near = socket.socketpair()
        self.far.append(far)
        return near.detach()

    async def _connect(self, request: messages.ConnectRun) -> WithFds[None]:
        self.messages.append((request.name,))
        if request.name == "gone":
            raise UnavailableError("plugin gone", "that run has ended")
        return WithFds(None, [self._made()])

    async def _connect_many(self, request: messages.ConnectRuns) -> WithFds[messages.Connected]:
        names = [one.name for one in request.runs]
        self.messages.append(names)
        refused = DeniedError("plugin foreign", "its socket is a link").to_json()
        answers = [refused if name == "foreign" else name not in ("late", "gone") for name in names]
        return WithFds(messages.Connected(answers=tuple(answers)), [self._made() for one in answers if one is True])

    async def connected(self, name: str) -> int:
        return await connection(self.runs.connect_soon(name, "r"))

    def all_closed(self) -> bool:
        """Whether no other end of a connection is open."""
        return [far.recv(1) for far in self.far] == [b""] * len(self.far)

    def close(self) -> None:
        for far in self.far:
            far.close()
        self.channel.close()
        self.runs._supervisor.close()


async def test_plugins_of_one_turn_are_connected_to_in_few_messages() -> None:
    supervisor = Supervisor()
    names = [f"p{number}" for number in range(2 * AT_ONCE + 1)]
    fds = await asyncio.gather(*(supervisor.connected(name) for name in names))
    assert [len(one) for one in supervisor.messages] == [AT_ONCE, AT_ONCE, 1]
    for number, fd in enumerate(fds):  # each has its own
        os.write(fd, b"%d" % number)
        os.close(fd)
    assert [int(far.recv(8)) for far in supervisor.far] == list(range(len(names)))


async def test_one_that_is_late_or_refused_holds_no_other_up() -> None:
    supervisor = Supervisor()
    names = ["first", "late", "foreign", "gone", "last"]
    found = await asyncio.gather(*(supervisor.connected(name) for name in names), return_exceptions=True)
    assert supervisor.messages == [names, ("late",), ("gone",)]
    assert isinstance(found[2], DeniedError) and isinstance(found[3], UnavailableError)
    for fd in (found[0], found[1], found[4]):
        assert isinstance(fd, int)
        os.close(fd)
    assert supervisor.all_closed()


async def test_a_connection_that_nobody_waits_for_is_closed() -> None:
    supervisor = Supervisor()
    waiting = [asyncio.ensure_future(supervisor.connected(name)) for name in ("kept", "dropped")]
    await asyncio.sleep(0)
    waiting[1].cancel()
    os.close(await waiting[0])
    with pytest.raises(asyncio.CancelledError):
        await waiting[1]
    assert len(supervisor.far) == 2 and supervisor.all_closed()


async def test_connection_that_a_supervisor_makes_late_is_still_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes to rest and is reloaded meanwhile; simple plugins die of a connection without a request."""
    monkeypatch.setattr(runs, "CONNECT_DEADLINE", -5.0)
    supervisor = Supervisor()
    supervisor.channel.hold()
    waiting = asyncio.ensure_future(supervisor.connected("kept"))
    for _ in range(3):
        await supervisor.runs._supervisor.call(ALIVE)
    supervisor.channel.go_on()
    os.close(await waiting)
    assert supervisor.all_closed()


async def test_each_is_asked_for_alone_where_the_supervisor_is_of_another_version() -> None:
    supervisor = Supervisor()
    supervisor.channel._handlers.pop(messages.ConnectRuns.op)
    for fd in await asyncio.gather(*(supervisor.connected(name) for name in ("one", "two"))):
        os.close(fd)
    assert supervisor.messages == [("one",), ("two",)]
