"""A connection to a plugin in one-shot mode is used once it is made: simple plugins die of one without a request."""

from __future__ import annotations

import asyncio
import os
import socket
from types import SimpleNamespace
from typing import Any, cast

import pytest

from host.channel.reply import NotSentError
from host.delivery import oneshot
from host.delivery.oneshot import OneshotDelivery
from host.delivery.sidecar import SidecarLink
from host.events import Catalogue
from host.fence.fences import NO_LEASE
from host.queue.interface import Delivery, Event
from isolator.ipc.fence import LOST, Fence
from isolator.linux.boottime import boottime
from tests.support.timeouts import seconds

ABSENT: Any = None


class Plugin:
    """The plugin's end of every connection that is made, and the only run."""

    def __init__(self) -> None:
        self.ends: list[socket.socket] = []
        self.connected = asyncio.Event()

    async def ensure(self, name: str) -> str:
        return "run"

    async def connect(self, name: str, run: str) -> int:
        theirs, ours = socket.socketpair()
        ours.setblocking(False)
        self.ends.append(ours)
        self.connected.set()
        return theirs.detach()

    def connect_soon(self, name: str, run: str) -> asyncio.Future[int]:
        return asyncio.ensure_future(self.connect(name, run))


class Outcomes:
    """Sends a request at once, or not at all."""

    def __init__(self) -> None:
        self.allowed = True
        self.concluded: list[str] = []

    def begin(self, delivery: Any, run: str, request: bytes, send: Any, give_up: Any) -> None:
        if self.allowed:
            asyncio.get_running_loop().call_soon(send)
        else:
            asyncio.get_running_loop().call_soon(give_up, NO_LEASE)

    def conclude(self, plugin: Any, delivery: Any, run: str, outcome: Any, latency: int, *, broken: bool) -> None:
        self.concluded.append(outcome.kind)


def made(follows: Any = None) -> tuple[OneshotDelivery, SidecarLink, Plugin, Outcomes]:
    plugin, outcomes = Plugin(), Outcomes()
    link = SidecarLink("x", cast("Any", plugin), ABSENT, Fence(boottime() + 600))
    return (
        OneshotDelivery(link, cast("Any", outcomes), Catalogue(), follows or (lambda _: False)),
        link,
        plugin,
        outcomes,
    )


async def deliver(delivery: OneshotDelivery) -> None:
    event = Event(1, "e", "x.y", "2026-01-01T00:00:00Z", 0.0, 1.0, "{}")
    plugin: Any = SimpleNamespace(timeout=5.0, major=1, manifest=None, uid=os.getuid())
    await delivery.deliver(plugin, "x.y", Delivery(1, "x", None, event=event))


async def answered(delivery: OneshotDelivery, plugin: Plugin) -> None:
    """Deliver an event over the only connection that was made so far."""
    task = asyncio.create_task(deliver(delivery))
    (end,) = plugin.ends
    await answer(end)
    await task
    assert await asyncio.get_running_loop().sock_recv(end, 1) == b"", "it stayed open"
    end.close()


async def answer(end: socket.socket) -> None:
    assert b'"method":"x.y"' in await asyncio.get_running_loop().sock_recv(end, 4096)
    end.sendall(b'{"jsonrpc":"2.0","id":1,"result":{"status":"ok"}}\n')


async def connections_meanwhile(delivery: OneshotDelivery, plugin: Plugin) -> int:
    """Deliver an event; returns how many connections there were by the time of its answer, its own one included."""
    before = len(plugin.ends)
    plugin.connected.clear()
    task = asyncio.create_task(deliver(delivery))
    async with asyncio.timeout(seconds(10)):
        await plugin.connected.wait()
    await answer(plugin.ends[before])
    await task
    return len(plugin.ends) - before


async def quickly(delivery: OneshotDelivery, plugin: Plugin) -> None:
    """Have the run answer as many events as it takes to get connections ahead."""
    for _ in range(oneshot.QUICK_ANSWERS):
        assert await connections_meanwhile(delivery, plugin) == 1


async def test_connection_is_kept_if_the_deadline_passes_before_the_request_is_written() -> None:
    delivery, _, plugin, outcomes = made()
    outcomes.allowed = False
    await deliver(delivery)
    outcomes.allowed = True
    await answered(delivery, plugin)
    assert outcomes.concluded == ["unknown", "ok"]


@pytest.mark.parametrize("why", ["the deadline has passed", "it is paused", "the run is to end", "the host leaves"])
async def test_connection_is_kept_if_a_request_may_not_be_begun_once_it_is_there(why: str) -> None:
    delivery, link, plugin, outcomes = made()
    connect = plugin.connect

    async def connect_and_more(name: str, run: str) -> int:
        fd = await connect(name, run)
        if why == "the deadline has passed":
            link.fence.move(LOST)
        elif why == "the run is to end":
            link._draining = run
        else:
            setattr(link, "paused" if why == "it is paused" else "leaving", True)
        return fd

    plugin.connect = connect_and_more  # type: ignore[method-assign]
    with pytest.raises(NotSentError):
        await deliver(delivery)
    link.fence.move(boottime() + 600)
    link.paused, link.leaving, link._draining = False, False, None
    await answered(delivery, plugin)
    assert outcomes.concluded == ["ok"]


async def test_connection_that_is_kept_is_closed_when_its_run_has_ended() -> None:
    delivery, _, plugin, outcomes = made()
    outcomes.allowed = False
    await deliver(delivery)
    delivery.drop_prepared()
    (end,) = plugin.ends
    assert end.recv(1) == b""
    end.close()


async def test_next_connection_is_made_while_a_quick_run_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oneshot, "QUICK", 60.0)
    delivery, _, plugin, outcomes = made(lambda _: True)
    await quickly(delivery, plugin)
    assert await connections_meanwhile(delivery, plugin) == 2
    ahead = plugin.ends[-1]
    task = asyncio.create_task(deliver(delivery))
    await answer(ahead)
    await task
    assert outcomes.concluded == ["ok"] * 4


@pytest.mark.parametrize("why", ["nothing follows", "the run is slow", "another run"])
async def test_no_connection_is_made_ahead(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    monkeypatch.setattr(oneshot, "QUICK", 0.0 if why == "the run is slow" else 60.0)
    delivery, link, plugin, _ = made(lambda _: why != "nothing follows")
    await quickly(delivery, plugin)
    if why == "another run":
        link.run = "another"
    assert await connections_meanwhile(delivery, plugin) == 1


@pytest.mark.parametrize("what", ["closed it", "said that it is busy"])
async def test_connection_made_ahead_is_not_used_once_the_plugin_has(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Nor does that run get another one ahead."""
    monkeypatch.setattr(oneshot, "QUICK", 60.0)
    delivery, _, plugin, outcomes = made(lambda _: True)
    await quickly(delivery, plugin)
    assert await connections_meanwhile(delivery, plugin) == 2
    if what == "closed it":
        plugin.ends[-1].close()
    else:
        plugin.ends[-1].send(b'{"jsonrpc":"2.0","id":1,"error":{"code":-31006,"message":"busy"}}\n')
    assert await connections_meanwhile(delivery, plugin) == 1
    assert await connections_meanwhile(delivery, plugin) == 1
    assert outcomes.concluded == ["ok"] * 5


async def test_no_connection_is_made_ahead_when_the_request_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own one is kept, which the plugin serves first."""
    monkeypatch.setattr(oneshot, "QUICK", 60.0)
    delivery, _, plugin, outcomes = made(lambda _: True)
    await quickly(delivery, plugin)
    before = len(plugin.ends)
    outcomes.allowed = False
    await deliver(delivery)
    outcomes.allowed = True
    task = asyncio.create_task(deliver(delivery))
    await answer(plugin.ends[before])
    await task
    assert outcomes.concluded == ["ok", "ok", "unknown", "ok"]
    assert len(plugin.ends) == before + 1
