"""A channel whose other end may have been taken over: refusals, no traceback, and no descriptor stays open."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from isolator.errors import IsolatorError, UnavailableError, UsageError
from isolator.ipc import channel as channels
from isolator.ipc.body import Message, WithFds, by_op
from isolator.ipc.channel import MAX_PACKET, Channel, pair, send_packet
from isolator.ipc.messages import ConnectRun, EnsureRun, GetEnvironment, NewAuditSocket, Running
from tests.support.descriptors import open_descriptors


class Faults:
    """The event loop's unhandled errors."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.seen.append(context))


def descriptors() -> int:
    return len(open_descriptors())


async def ensure(request: EnsureRun) -> Running:
    return Running(run=f"run of {request.name}", pid=7)


def linked() -> tuple[Channel, socket.socket]:
    """A channel that serves ``run.ensure``, and the bare socket of its peer."""
    mine, theirs = pair()
    return Channel(mine, by_op(EnsureRun.on(ensure)), name="host"), theirs


async def answer_to(theirs: socket.socket, packet: dict[str, Any]) -> dict[str, Any]:
    theirs.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(theirs, json.dumps(packet).encode())
    answer = json.loads(await loop.sock_recv(theirs, MAX_PACKET))
    assert isinstance(answer, dict)
    return answer


async def test_request_is_answered_with_its_reply() -> None:
    mine, theirs = pair()
    asked, serving = Channel(mine), Channel(theirs, by_op(EnsureRun.on(ensure)))
    assert await asked.ask(EnsureRun(name="one"), timeout=5) == Running(run="run of one", pid=7)
    asked.close()
    serving.close()


async def test_last_word_of_a_peer_that_dies_is_heard() -> None:
    heard = []

    async def note(request: EnsureRun) -> Running:
        heard.append(request.name)
        return Running(run="", pid=0)

    mine, theirs = pair()
    with theirs:
        theirs.sendall(json.dumps({"op": EnsureRun.op, **EnsureRun(name="last").to_json()}).encode())
    await Channel(mine, by_op(EnsureRun.on(note))).closed.wait()
    assert heard == ["last"]


async def test_descriptors_come_with_a_reply() -> None:
    async def connect(_: ConnectRun) -> WithFds[None]:
        return WithFds(None, [os.open("/dev/null", os.O_RDONLY)])

    before = descriptors()
    mine, theirs = pair()
    asked, serving = Channel(mine), Channel(theirs, by_op(ConnectRun.on(connect)))
    found = await asked.ask_fds(ConnectRun(name="one", run="r"), timeout=5)
    assert len(found.fds) == 1
    os.close(found.fds[0])
    await asked.ask(ConnectRun(name="one", run="r"), timeout=5)  # whoever wants none is left none
    asked.close()
    serving.close()
    await asyncio.sleep(0)
    assert descriptors() == before


async def test_request_with_a_wrong_field_is_refused_and_the_next_served() -> None:
    faults = Faults()
    channel, theirs = linked()
    refused = await answer_to(theirs, {"op": "run.ensure", "id": 1, "name": {"of": "a plugin"}})
    assert refused["error"]["code"] == "usage" and "'name'" in refused["error"]["why"]
    assert (await answer_to(theirs, {"op": "run.ensure", "id": 2, "name": "one"}))["ok"]["pid"] == 7
    assert not faults.seen
    channel.close()
    theirs.close()


async def test_unknown_operation_however_long_is_refused() -> None:
    faults = Faults()
    channel, theirs = linked()
    assert "no such operation" in (await answer_to(theirs, {"op": "x" * 150_000, "id": 1}))["error"]["why"]
    assert not faults.seen
    channel.close()
    theirs.close()


async def test_error_that_repeats_too_much_of_the_request_is_still_answered() -> None:
    async def fails(request: EnsureRun) -> Running:
        raise IsolatorError(request.name, "no such plugin")

    faults = Faults()
    mine, theirs = pair()
    channel = Channel(mine, by_op(EnsureRun.on(fails)))
    # Sent as UTF-8, repeated as escapes of six characters each.
    packet = json.dumps({"op": "run.ensure", "id": 1, "name": "ü" * 60_000}, ensure_ascii=False).encode()
    theirs.setblocking(False)
    theirs.send(packet)
    answer = json.loads(await asyncio.get_running_loop().sock_recv(theirs, MAX_PACKET))
    assert "exceed" in answer["error"]["why"]
    assert not faults.seen
    channel.close()
    theirs.close()


@pytest.mark.parametrize(
    "packet",
    [
        b"\xff", b"{", b"7", b"null", b"[]", b'"text"', b"[" * 150_000, b'{"re": []}', b'{"re": 1, "ok": 7}',
        b'{"re": 1, "error": "text"}', b"{}", b'{"op": 1}', b'{"op": "run.ensure", "id": "1"}',
        b'{"op": "run.ensure", "id": [1]}',
    ],
)  # fmt: skip
async def test_packet_that_is_no_message_closes_the_channel(packet: bytes) -> None:
    faults = Faults()
    before = descriptors()
    channel, theirs = linked()
    with Path(os.devnull).open() as file:
        socket.send_fds(theirs, [packet], [file.fileno()])
    await asyncio.wait_for(channel.closed.wait(), 10)
    theirs.close()
    assert not faults.seen
    assert descriptors() == before


async def replied(answer: Callable[[Message], Awaitable[Any]]) -> Any:
    """The outcome of a request whose reply ``answer`` makes."""
    mine, theirs = pair()
    asked, serving = Channel(mine, name="host"), Channel(theirs, {"run.environment": answer})
    try:
        return await asked.ask(GetEnvironment(name="one"), timeout=5)
    finally:
        asked.close()
        serving.close()


@pytest.mark.parametrize("fields", [{"env": [1]}, {"env": {"KEY": None}}, {"more": 1}])
async def test_reply_of_another_type_is_an_error_of_the_asker(fields: dict[str, Any]) -> None:
    async def answer(_: Message) -> Message:
        return Message(fields, [os.open("/dev/null", os.O_RDONLY)])

    before = descriptors()
    with pytest.raises(UsageError, match=r"the answer to run\.environment"):
        await replied(answer)
    assert descriptors() == before


async def test_reply_that_is_no_object_ends_the_channel() -> None:
    async def answer(_: Message) -> Any:
        return ["env"]

    with pytest.raises(UnavailableError):
        await replied(answer)


@pytest.mark.parametrize("count", [0, 2])
async def test_wrong_number_of_descriptors_is_refused(count: int) -> None:
    async def take(_: NewAuditSocket, fds: list[int]) -> None:
        raise AssertionError("the handler was called")

    before = descriptors()
    mine, theirs = pair()
    asked, serving = Channel(mine), Channel(theirs, by_op(NewAuditSocket.on_fds(take)))
    with Path(os.devnull).open() as file, pytest.raises(UsageError, match="descriptors came with it"):
        await asked.ask(NewAuditSocket(), fds=[file.fileno()] * count, timeout=5)
    asked.close()
    serving.close()
    assert descriptors() == before


async def test_peer_that_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "MOST_WAITING", 1 << 20)
    before = descriptors()
    channel, theirs = linked()
    null = os.open("/dev/null", os.O_RDONLY)
    sent = 0
    while not channel.closed.is_set():
        channel.notify("note", fds=[null], text="x" * 100_000)
        sent += 1
        assert sent < 100, "the queue has no bound"
    theirs.close()
    os.close(null)
    assert descriptors() == before


async def test_peer_that_reads_no_descriptors_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "MOST_WAITING_FDS", 256)
    channel, theirs = linked()
    null = os.open("/dev/null", os.O_RDONLY)
    for _ in range(64):
        channel.notify("note", fds=[null] * 60, text="x" * 50_000)
    assert channel.closed.is_set()
    theirs.close()
    os.close(null)


async def test_more_requests_than_can_be_served_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "MOST_AT_ONCE", 4)
    let_go = asyncio.Event()

    async def slow(request: EnsureRun) -> Running:
        await let_go.wait()
        return Running(run=request.name, pid=1)

    mine, theirs = pair()
    asked, serving = Channel(mine), Channel(theirs, by_op(EnsureRun.on(slow)), name="host")
    calls = [asyncio.create_task(asked.ask(EnsureRun(name=str(number)), timeout=20)) for number in range(6)]
    done, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    while len(done) < 2:
        more, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        done |= more
    assert all("too many requests at once" in str(one.exception()) for one in done)
    let_go.set()
    assert len(await asyncio.gather(*waiting)) == 4
    assert (await asked.ask(EnsureRun(name="after"), timeout=20)).run == "after"
    asked.close()
    serving.close()


async def test_answer_that_comes_as_its_asker_is_cancelled_leaves_no_descriptor() -> None:
    mine, theirs = pair()
    asked = Channel(mine)
    before = descriptors()
    null = os.open("/dev/null", os.O_RDONLY)
    asking = asyncio.create_task(asked.ask_fds(ConnectRun(name="one", run="r")))
    await asyncio.sleep(0)
    request = json.loads(theirs.recv(MAX_PACKET))
    send_packet(theirs, json.dumps({"re": request["id"], "ok": {}}).encode(), [null])
    os.close(null)
    asked._readable()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert descriptors() == before
    asked.close()
    theirs.close()


@pytest.mark.parametrize("begun", ["essential", "essential_at_once"])
@pytest.mark.parametrize("how", ["fails", "returns", "is cancelled", "fails at once"])
def test_process_ends_when_work_that_it_is_there_for_fails(how: str, begun: str) -> None:
    program = f"""if True:
        import asyncio
        from isolator.ipc.tasks import {begun}
        async def work():
            if {how != "fails at once"}:
                await asyncio.sleep(0)
            if {how.startswith("fails")}:
                raise ValueError("a fault")
        async def main():
            task = {begun}(work(), "the work")
            if {how == "is cancelled"}:
                task.cancel()
            await asyncio.wait([task])
            await asyncio.sleep(0)
        asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    failed = how.startswith("fails")
    assert done.returncode == (1 if failed else 0)
    assert done.stderr.startswith("the work has failed: ValueError: a fault") == failed, done.stderr


async def test_held_requests_are_served_by_whoever_takes_the_channel_over() -> None:
    began, release, broken_off = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def ensure_slowly(request: EnsureRun) -> Running:
        began.set()
        try:
            await release.wait()
        except asyncio.CancelledError:
            broken_off.set()
            raise
        return await ensure(request)

    mine, theirs = pair()
    old, peer = Channel(mine, by_op(EnsureRun.on(ensure_slowly))), Channel(theirs)
    waiting = [asyncio.create_task(peer.ask(EnsureRun(name="under way"), timeout=5))]
    await began.wait()
    assert old.unsettled
    old.hold({EnsureRun.op})
    old.hold({EnsureRun.op})  # once more, and it is still begun again once
    await broken_off.wait()
    waiting.append(asyncio.create_task(peer.ask(EnsureRun(name="held"), timeout=5)))
    await peer.call(channels.ALIVE, timeout=5)  # behind the request: that one has been read
    assert not old.unsettled
    state = old.hand_over()
    old.leave_unread()
    waiting.append(asyncio.create_task(peer.ask(EnsureRun(name="unread"), timeout=5)))
    assert [one["name"] for one in state.held] == ["under way", "held"]
    again = Channel(socket.socket(fileno=os.dup(state.socket)), by_op(EnsureRun.on(ensure)), before=state)
    assert [one.run for one in await asyncio.gather(*waiting)] == ["run of under way", "run of held", "run of unread"]
    for end in (again, old, peer):
        end.close()


@pytest.mark.parametrize("how", ["held", "broken off"])
async def test_request_that_has_just_been_answered_is_neither_held_nor_answered_again(how: str) -> None:
    """Held, it would be begun again after the exec: a connection that nobody waits for, of which a plugin may die."""
    mine, theirs = pair()

    async def ensure_at_once(request: EnsureRun) -> Running:
        # Called after the handler has ended, and before its task is told to the channel as done.
        end = serving.hold if how == "held" else serving.break_off
        asyncio.get_running_loop().call_soon(end, {EnsureRun.op})
        return await ensure(request)

    serving = Channel(mine, by_op(EnsureRun.on(ensure_at_once)))
    answer = await answer_to(theirs, {"op": EnsureRun.op, "id": 1, "name": "x"})
    assert answer["ok"]["run"] == "run of x"
    while serving.unsettled:  # noqa: ASYNC110 # the task that has ended is told in a turn or two
        await asyncio.sleep(0)
    assert not serving.hand_over().held
    with pytest.raises(BlockingIOError):
        theirs.recv(MAX_PACKET)
    serving.close()
    theirs.close()


async def test_answer_to_a_call_of_before_is_nobody_elses() -> None:
    mine, theirs = pair()
    old = Channel(mine)
    with pytest.raises(UnavailableError):
        await old.call("slow", timeout=0.01)
    state = old.hand_over()
    old.leave_unread()
    again = Channel(socket.socket(fileno=os.dup(state.socket)), before=state)
    call = asyncio.create_task(again.call("quick", timeout=5))
    await asyncio.sleep(0)
    numbers = [json.loads(theirs.recv(MAX_PACKET))["id"] for _ in range(2)]
    for number, words in zip(numbers, ("late", "right"), strict=True):
        send_packet(theirs, json.dumps({"re": number, "ok": {"words": words}}).encode())
    assert (await call).fields == {"words": "right"}
    again.close()
    old.close()
    theirs.close()


async def test_channel_that_goes_on_serves_what_it_held() -> None:
    channel, theirs = linked()
    peer = Channel(theirs)
    channel.hold()
    asked = asyncio.create_task(peer.ask(EnsureRun(name="x"), timeout=5))
    await asyncio.sleep(0)
    await peer.call(channels.ALIVE, timeout=5)
    assert not asked.done()
    channel.leave_unread()
    channel.go_on()
    assert (await asked).run == "run of x"
    channel.close()
    peer.close()


async def test_descriptor_that_is_not_open_is_refused_and_the_channel_goes_on() -> None:
    mine, theirs = pair()
    ours, other = Channel(mine), Channel(theirs, by_op(EnsureRun.on(ensure)))
    closed = os.open("/dev/null", os.O_RDONLY)
    os.close(closed)
    with pytest.raises(OSError, match="Bad file descriptor"):
        ours.notify("anything", fds=[closed])
    assert (await ours.ask(EnsureRun(name="echo", reason="event"))).run
    ours.close()
    other.close()


@pytest.mark.parametrize("count", [3, 200])
async def test_last_words_of_a_peer_that_reads_nothing_any_more_are_heard(count: int) -> None:
    """They are told of its end as they send: what it has sent before that is read all the same."""
    mine, theirs = pair()
    heard: list[str] = []

    async def hear(request: EnsureRun) -> Running:
        heard.append(request.name)
        return Running(run="r", pid=7)

    channel = Channel(mine, by_op(EnsureRun.on(hear)), name="host")
    for number in range(count):
        send_packet(theirs, json.dumps({"op": EnsureRun.op, "name": f"p{number}"}).encode())
    theirs.close()
    asked = asyncio.ensure_future(channel.ask(EnsureRun(name="x")))
    channel.tell(EnsureRun(name="y"))
    with pytest.raises(UnavailableError):
        await asked
    await channel.closed.wait()
    assert heard == [f"p{number}" for number in range(count)]
