"""A connection to a plugin in one-shot mode is used once it is made: simple plugins die of one without a request."""

from __future__ import annotations

import asyncio
import os
import socket
import warnings
from types import SimpleNamespace
from typing import Any, cast

import pytest

from host.channel.reply import NotSentError
from host.channel.stream import Greeting, open_stream
from host.delivery.oneshot import OneshotDelivery
from host.delivery.sidecar import SidecarLink
from host.delivery.stream import StreamDelivery, _Session
from host.events import Catalogue
from host.fence.fences import NO_LEASE
from host.queue.interface import Delivery, Event
from isolator.audit.client import Moment
from isolator.errors import UnavailableError
from isolator.ipc.body import Message
from isolator.ipc.fence import LOST, Fence
from isolator.ipc.succession import Departure, Descriptors
from isolator.linux.boottime import boottime
from tests.host.test_runs import Supervisor

ABSENT: Any = None
ITS = {"name": "x", "version": "1", "hooks": {"x.y": "x.y"}}
PLUGIN: Any = SimpleNamespace(**ITS, timeout=5.0, major=1, manifest=None, uid=os.getuid())
EVENT = Event(1, "e", "x.y", "2026-01-01T00:00:00Z", 0.0, 1.0, "{}")


class Plugin:
    """The plugin's end of every connection that is made, and the only run."""

    def __init__(self) -> None:
        self.ends: list[socket.socket] = []

    async def ensure(self, name: str) -> str:
        return "run"

    async def connect(self, name: str, run: str) -> int:
        theirs, ours = socket.socketpair()
        ours.setblocking(False)
        self.ends.append(ours)
        return theirs.detach()

    def connect_soon(self, name: str, run: str) -> asyncio.Future[int]:
        return asyncio.ensure_future(self.connect(name, run))

    def lend(self, name: str, run: str) -> asyncio.Future[Message]:
        return asyncio.get_running_loop().create_future()  # each connection is asked for


class Outcomes:
    """Sends a request at once, or not at all."""

    def __init__(self) -> None:
        self.allowed = True
        self.concluded: list[str] = []

    def begin(self, delivery: Any, run: str, request: bytes, send: Any, give_up: Any, listen: Any = None) -> None:
        def begin() -> None:
            send() if self.allowed else give_up(NO_LEASE)
            if listen is not None:
                listen()

        asyncio.get_running_loop().call_soon(begin)

    def conclude(
        self, plugin: Any, delivery: Any, run: str, outcome: Any, sent_ns: int, at: Moment, *, broken: bool
    ) -> None:  # fmt: skip
        self.concluded.append(outcome.kind)


def made() -> tuple[OneshotDelivery, SidecarLink, Plugin, Outcomes]:
    plugin, outcomes = Plugin(), Outcomes()
    link = SidecarLink("x", cast("Any", plugin), ABSENT, Fence(boottime() + 600))
    return OneshotDelivery(link, cast("Any", outcomes), Catalogue()), link, plugin, outcomes


async def deliver(delivery: OneshotDelivery | StreamDelivery) -> None:
    await delivery.deliver(PLUGIN, "x.y", Delivery(1, "x", None, event=EVENT))


async def answered(delivery: OneshotDelivery, plugin: Plugin) -> None:
    """Deliver an event over the only connection that was made so far."""
    task = asyncio.create_task(deliver(delivery))
    (end,) = plugin.ends
    loop = asyncio.get_running_loop()
    assert b'"method":"x.y"' in await loop.sock_recv(end, 4096)
    end.sendall(b'{"jsonrpc":"2.0","id":1,"result":{"status":"ok"}}\n')
    await task
    assert await loop.sock_recv(end, 1) == b"", "it stayed open"
    end.close()


async def test_request_is_begun_without_a_wait_where_a_connection_is_there_and_no_other_is_on_its_way() -> None:
    delivery, link, plugin, outcomes = made()
    first, second = Delivery(1, "x", None, event=EVENT), Delivery(2, "x", None, event=EVENT)
    assert delivery.deliver_now(PLUGIN, "x.y", first) is False, "nothing is connected"
    near, far = socket.socketpair()
    near.setblocking(False)
    delivery._keep(near, "run")
    assert delivery.deliver_now(PLUGIN, "x.y", first) is True
    assert not link.room() and not delivery.deliver_now(PLUGIN, "x.y", second)
    waiting = asyncio.create_task(delivery.ping(60.0))
    await asyncio.sleep(0)
    assert not (plugin.ends or waiting.done()), "the plugin serves one at a time"
    assert b'"method":"x.y"' in far.recv(4096)
    far.sendall(b'{"jsonrpc":"2.0","id":1,"result":{"status":"ok"}}\n')
    await delivery.answered()
    assert outcomes.concluded == ["ok"] and far.recv(1) == b""
    while not plugin.ends:  # noqa: ASYNC110 # a turn or two
        await asyncio.sleep(0)
    assert link.room() and not delivery.deliver_now(PLUGIN, "x.y", second), "nothing ends with which it is offered"
    plugin.ends[0].sendall(b"{}\n")
    await waiting
    for end in (far, *plugin.ends):
        end.close()


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


async def test_connection_over_which_a_request_is_not_written_yet_goes_to_the_next_host() -> None:
    delivery, link, plugin, outcomes = made()
    counted = asyncio.Event()
    outcomes.begin = lambda *_: counted.set()  # type: ignore[method-assign] # and is not recorded yet
    task = asyncio.create_task(deliver(delivery))
    await counted.wait()
    departure = Departure()
    state = delivery.pass_on(departure)
    assert state.request is None and state.prepared_run == "run"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    following, its_link, _, _ = made()
    its_link.run = link.run
    with Descriptors(departure._fds.release_all()) as descriptors:
        following.take_over(None, None, state, descriptors)
    await answered(following, plugin)


async def test_request_that_is_taken_over_leaves_no_room_before_it_is_answered() -> None:
    delivery, one, departure = made()[0], Delivery(1, "x", None, event=EVENT), Departure()
    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    delivery._keep(near, "run")
    assert delivery.deliver_now(PLUGIN, "x.y", one)
    assert b'"method":"x.y"' in await asyncio.get_running_loop().sock_recv(far, 4096)
    state = delivery.pass_on(departure)
    following, link, _, outcomes = made()
    with Descriptors(departure._fds.release_all()) as descriptors:
        following.take_over(PLUGIN, one, state, descriptors)
    assert link.room() == 0.0, "the next event would wake a taker that can only wait"
    far.sendall(b'{"jsonrpc":"2.0","id":1,"result":{"status":"ok"}}\n')
    await following.answered()
    assert link.room() == 1.0 and outcomes.concluded == ["ok"]
    far.close()


async def test_ping_that_is_unanswered_goes_to_the_next_host_and_the_one_after() -> None:
    delivery, _, plugin, _ = made()
    pinging = asyncio.create_task(delivery.ping(60.0))
    while not plugin.ends:  # noqa: ASYNC110 # a turn or two
        await asyncio.sleep(0)
    (end,) = plugin.ends
    assert b'"method":"ping"' in await asyncio.get_running_loop().sock_recv(end, 4096)
    for _ in range(2):
        departure, following = Departure(), made()[0]
        state = delivery.pass_on(departure)
        with Descriptors(departure._fds.release_all()) as descriptors:
            following.take_over(None, None, state, descriptors)
        pinging.cancel()
        await asyncio.gather(pinging, return_exceptions=True)
        delivery, pinging = following, asyncio.create_task(following.go_on())
        await asyncio.sleep(0)
        assert delivery.busy and not delivery.connecting
    with pytest.raises(BlockingIOError):
        end.recv(1)
    end.sendall(b"{}\n")
    await pinging
    assert not delivery.busy and end.recv(1) == b""
    end.close()


async def test_connection_that_is_kept_is_closed_when_its_run_has_ended() -> None:
    delivery, _, plugin, outcomes = made()
    outcomes.allowed = False
    await deliver(delivery)
    (end,) = plugin.ends
    delivery.run_ended("one before")
    with pytest.raises(BlockingIOError):
        end.recv(1)
    delivery.run_ended("run")
    assert end.recv(1) == b""
    end.close()


@pytest.mark.parametrize("known", ["older", None])
async def test_connection_to_a_newer_run_than_the_next_host_has_heard_of_is_used(known: str | None) -> None:
    """The host before was told of it in an answer, as it left; what the next one is told begins with the older."""
    delivery, link, plugin, outcomes = made()
    outcomes.allowed = False
    await deliver(delivery)
    outcomes.allowed = True
    link.run = known
    link.run_ended("older")
    delivery.run_ended("older")
    await answered(delivery, plugin)


async def test_connection_that_comes_after_the_end_of_its_run_is_not_used() -> None:
    delivery, link, plugin, _ = made()
    link.run = link._reached = "run"
    assert delivery.prepare()
    link.run_ended("run")
    delivery.run_ended("run")
    delivering = asyncio.create_task(deliver(delivery))
    for _ in range(20):
        await asyncio.sleep(0)
    first, second = plugin.ends
    assert first.recv(1) == b""
    assert b'"method":"x.y"' in await asyncio.get_running_loop().sock_recv(second, 4096)
    second.close()
    await delivering
    first.close()


async def test_run_that_began_during_a_connect_to_the_one_before_is_not_forgotten_with_that() -> None:
    delivery, link, plugin, _ = made()
    link.run = "older"

    async def connect(name: str, run: str) -> int:
        link.run = "newer"
        raise UnavailableError("plugin x", "that run has ended", "ask again")

    plugin.connect = connect  # type: ignore[method-assign]
    with pytest.raises(UnavailableError):
        await deliver(delivery)
    assert link.run == "newer"


async def test_connection_that_was_given_up_is_closed_twice_without_an_error() -> None:
    delivery, link, plugin, _ = made()
    link.run = link._reached = "run"
    assert delivery.prepare()
    making = delivery._prepared
    assert making is not None
    making.cancel()
    await asyncio.wait({making})
    delivery.run_ended("run")
    delivery.close()
    assert not plugin.ends


async def test_stream_to_a_newer_run_than_the_next_host_has_heard_of_is_used_until_that_ends() -> None:
    supervisor = Supervisor()
    link = SidecarLink("x", supervisor.runs, ABSENT, Fence(boottime() + 600))
    delivery = StreamDelivery(link, cast("Any", Outcomes()), Catalogue(), ABSENT, str)
    near, far = socket.socketpair()
    near.setblocking(False)
    greeted = asyncio.get_running_loop().create_future()
    connection = await open_stream(near, lambda: delivery._connection("newer"))
    connection.agreed = Greeting("1", frozenset({"x.y"}), frozenset())
    greeted.set_result(connection.agreed)
    delivery._session = _Session("newer", connection, greeted)
    link.run = "older"
    link.run_ended("older")
    assert delivery.ready
    link.run = "one after"
    link.run_ended("newer")
    assert not delivery.ready
    delivery.close()
    far.close()
    supervisor.close()


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("mode", ["oneshot", "stream"])
async def test_delivery_that_is_cancelled_in_any_turn_leaves_no_connection_to_the_garbage_collector(
    mode: str, prepared: bool
) -> None:
    sent = 0
    for turns in range(30):
        supervisor = Supervisor()
        link = SidecarLink("x", supervisor.runs, ABSENT, Fence(boottime() + 600))
        link.run = link._reached = "r"
        parts: Any = link, Outcomes(), Catalogue()
        oneshot = OneshotDelivery(*parts)
        delivery = oneshot if mode == "oneshot" else StreamDelivery(*parts, ABSENT, str)
        if prepared:
            oneshot.prepare()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", ResourceWarning)
            delivering = asyncio.create_task(deliver(delivery))
            for _ in range(turns):
                await asyncio.sleep(0)
            delivering.cancel()
            await asyncio.wait({delivering})
            oneshot.close()
            if isinstance(delivery, StreamDelivery):
                delivery.close()
            for _ in range(10):
                await asyncio.sleep(0)
        assert not found, f"cancelled in turn {turns}: {found[0].message}"
        sent += any(end.recv(1, socket.MSG_DONTWAIT) for end in supervisor.far)
        supervisor.close()
    assert 5 < sent < 25, "it was cancelled before and after the first message"
