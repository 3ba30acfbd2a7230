"""Servers of MCP, one host in the place of another: a call is answered once, and no run is connected to for nobody."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from host.channel.reply import LostError
from host.mcp.calls import CallState
from host.mcp.servers import Servers, ServersState
from host.mcp.session import Reply, SessionState
from host.wire import mcp as protocol
from host.wire.lines import LineState
from isolator.errors import UnavailableError, UsageError
from isolator.ipc.fence import Fence
from isolator.ipc.succession import Descriptors

CALL = CallState(plugin="srv", uid=7, key="k", number="n1", id="e1", tool="t", arguments_sha256="0" * 64, sent_ns=0)


class Audit:
    """A trail of outcomes."""

    def __init__(self) -> None:
        self.outcomes: asyncio.Queue[tuple[str, str | None]] = asyncio.Queue()

    def record(self, record: Any, *, plugin: str, run: str | None, event_id: str, urgent: bool) -> None:
        assert (plugin, event_id) == ("srv", "e1")
        self.outcomes.put_nowait((record.outcome, run))


@pytest.fixture
def taken_over() -> Iterator[tuple[Servers, Audit, socket.socket, ServersState, Descriptors]]:
    """A host that takes over, its trail, the server's end of its output, and the state of a session with one call."""
    nobody: Any = None
    manifest = SimpleNamespace(transport=SimpleNamespace(era=protocol.SESSION))
    plugin = SimpleNamespace(name="srv", mode="mcp", manifest=manifest, effective=None)
    registry = cast(Any, SimpleNamespace(get=lambda _: plugin, need=lambda _: plugin))
    fences = cast(Any, SimpleNamespace(of=lambda _: Fence()))
    (its_input, input_), (its_output, output) = (socket.socketpair() for _ in range(2))
    lines = [LineState(socket=number, unread="", unsent="") for number in range(2)]
    audit = Audit()

    def use(_: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    servers = Servers(
        nobody, registry, cast(Any, audit), nobody, cast(Any, lambda _: lambda text: text), use, fences, nobody
    )
    deadline = time.monotonic() + 3600
    session = SessionState(
        run="r1", input=lines[0], output=lines[1], version="", name="srv", instructions="", tools=True,
        deadlines={CALL.number: deadline},
    )  # fmt: skip
    state = ServersState(sessions={"srv": session}, calls=(CALL,))
    with its_input, its_output, Descriptors([input_.detach(), output.detach()]) as descriptors:
        yield servers, audit, its_output, state, descriptors


Taken = tuple[Servers, Audit, socket.socket, ServersState, Descriptors]


async def test_call_whose_session_is_over_is_not_sent_again(taken_over: Taken) -> None:
    """Its server was just being stopped: of what the call has done nobody knows, and a new run must not do it again."""
    servers, audit, _, _, descriptors = taken_over
    await servers.take_over(ServersState(sessions={}, calls=(CALL,)), descriptors)
    with pytest.raises(UnavailableError, match="nobody knows what it has done"):
        await servers.call("srv", "t", {}, CALL.uid, CALL.key, None)
    assert audit.outcomes.get_nowait() == ("unknown", None)


async def test_call_that_has_run_out_of_time_on_the_way_is_not_sent_again(taken_over: Taken) -> None:
    servers, audit, _, state, descriptors = taken_over
    session = SessionState.from_json(state.sessions["srv"].to_json() | {"deadlines": {}}, "session")
    await servers.take_over(ServersState(sessions={"srv": session}, calls=(CALL,)), descriptors)
    with pytest.raises(UnavailableError, match="nobody knows what it has done"):
        await asyncio.wait_for(servers.call("srv", "t", {}, CALL.uid, CALL.key, None), 60)
    assert audit.outcomes.get_nowait() == ("unknown", None)
    servers.close()


@pytest.mark.parametrize("session", ["is over", "lacks it"])
async def test_event_whose_request_came_with_no_session_is_not_awaited(taken_over: Taken, session: str) -> None:
    """It was being stopped, or the request was not written yet: nobody would answer it, at any time."""
    servers, _, _, state, descriptors = taken_over
    reply: Reply = asyncio.get_running_loop().create_future()
    servers.awaited["n2"] = reply
    await servers.take_over(state if session == "lacks it" else ServersState(sessions={}, calls=()), descriptors)
    with pytest.raises(LostError, match="its session has ended"):
        await asyncio.wait_for(reply, 5)
    servers.close()


async def test_call_is_answered_to_one_caller_and_recorded_once(taken_over: Taken) -> None:
    servers, audit, server, state, descriptors = taken_over
    await servers.take_over(state, descriptors)
    first = asyncio.create_task(servers.call("srv", "t", {}, CALL.uid, CALL.key, None))
    await asyncio.sleep(0)
    with pytest.raises(UsageError, match="under way already"):
        await asyncio.wait_for(servers.call("srv", "t", {}, CALL.uid, CALL.key, None), 60)
    assert not servers.replied
    answer = {"jsonrpc": "2.0", "id": CALL.number, "result": {"content": []}}
    server.sendall(json.dumps(answer).encode() + b"\n")
    while not (replied := servers.replied) and not first.done():  # noqa: ASYNC110 # each turn counts
        await asyncio.sleep(0)
    assert replied, "a host that left in this turn would not wait for the end of the call"
    assert (await asyncio.wait_for(first, 60))["id"] == "e1"
    assert not servers.replied
    assert audit.outcomes.get_nowait() == ("ok", "r1")
    assert audit.outcomes.empty()
    servers.close()


async def test_call_that_nobody_asks_for_again_is_given_up(taken_over: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caller has gone meanwhile: it must not count among those that the user has under way for good."""
    servers, audit, _, state, descriptors = taken_over
    monkeypatch.setattr(protocol, "PATIENCE", 0.01)
    await servers.take_over(state, descriptors)
    assert await asyncio.wait_for(audit.outcomes.get(), 60) == ("cancelled", "r1")
    assert not servers._calls
    servers.close()


async def test_run_that_ends_as_soon_as_its_session_is_forgotten(taken_over: Taken) -> None:
    servers, _, _, state, descriptors = taken_over
    await servers.take_over(state, descriptors)
    servers.close()  # as if it had closed its output
    assert [*servers._ends] == ["r1"]
    servers.run_ended("srv", "r1")
    for _ in range(5):  # turns in which whoever would have stopped it begins
        await asyncio.sleep(0)
    assert not servers._ends


class Supervisor:
    """Notes what it is asked, and refuses it once it is told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.refuse = asyncio.Event()

    async def ask(self, request: Any) -> Any:
        self.asked.append(request.op)
        await self.refuse.wait()
        raise UnavailableError("the supervisor", "was broken off", "ask again")

    ask_fds = ask


@pytest.mark.parametrize("what", ["a run", "its streams"])
@pytest.mark.parametrize("late", [False, True], ids=["asked before", "asked after"])
async def test_host_that_leaves_asks_for_no_server_and_is_not_answered_for_the_next_one(
    taken_over: Taken, what: str, late: bool
) -> None:
    """Its caller's line is made again by the next host; a run whose streams it got would be of no use to that one."""
    servers, supervisor = taken_over[0], Supervisor()
    servers._supervisor = cast(Any, supervisor)
    if late:
        servers.hold()
    waiting = asyncio.create_task(servers.session("srv")) if what == "a run" else servers._begin("srv", "r2")
    for _ in range(5):
        await asyncio.sleep(0)
    assert len(supervisor.asked) == (not late)
    servers.hold()
    supervisor.refuse.set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done() and not servers.connecting
    waiting.cancel()
    await asyncio.wait({waiting})
