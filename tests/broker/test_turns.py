"""What one cage's connections do in the event loop, and how long those of another wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import Callable
from ipaddress import IPv4Address

import pytest

from isolator.base.pacing import TokenBucket
from isolator.broker import relay
from isolator.broker.flow import Flow as Connection
from isolator.broker.relay import Pipe, Scratch
from isolator.broker.turns import AT_ONCE, ENOUGH, HOLD, LEAST, PER_SECOND, STREAM, WAKEUP, Turns
from isolator.ipc.fence import Fence
from tests.support.timeouts import seconds

PIECE = bytes(1000)


def rich() -> Turns:
    """Turns with a budget that is never spent."""
    return Turns(TokenBucket(1000.0, 1000.0))


async def test_part_of_a_turn_is_used_up_and_there_again_in_the_next() -> None:
    turns = Turns()
    assert not turns.over
    turns.took(HOLD / 2)
    assert not turns.over
    turns.took(HOLD / 2)
    assert turns.over
    await asyncio.sleep(0)
    assert not turns.over


async def test_loop_is_not_woken_before_a_part_is_used_up() -> None:
    turns = Turns()
    for _ in range(3):
        turns.took(HOLD / 4)
        assert not turns._planned
        await asyncio.sleep(0)
    turns.took(HOLD / 4)
    assert turns.over and turns._planned, "parts of several turns are one: others wait no longer than before"
    await asyncio.sleep(0)
    assert not turns.over


async def test_those_who_wait_come_in_their_order_before_others_and_as_many_as_fit() -> None:
    turns, served = Turns(), []

    def go_on(name: str) -> None:
        served.append(name)
        turns.took(HOLD / 2)

    turns.took(HOLD)
    for name in "abc":
        turns.wait(lambda name=name: go_on(name))  # type: ignore[misc]
    for expected, over in (("ab", True), ("abc", False), ("abc", False)):
        await asyncio.sleep(0)
        assert ("".join(served), turns.over) == (expected, over)


async def test_all_wait_while_the_budget_is_spent() -> None:
    now, served = [0.0], []
    turns = Turns(TokenBucket(0.5, 1.0, clock=lambda: now[0]))
    turns.took(1.0 + 2 * HOLD)
    for name in "ab":
        turns.wait(lambda name=name: (served.append(name), turns.took(HOLD)))  # type: ignore[misc]
    await asyncio.sleep(0)
    assert turns.over and not served
    now[0] = 4 * HOLD / 0.5  # two thousandths of a second are there: for both, one a turn
    async with asyncio.timeout(seconds(10)):
        while served != ["a", "b"]:  # noqa: ASYNC110 # a timer of the turns has to come
            await asyncio.sleep(0.001)
    assert turns.budget.tokens == pytest.approx(0.0)


async def test_spent_budget_is_used_again_once_there_is_enough_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that come meanwhile, one at a time perhaps, cost one wakeup of the broker and not many."""
    turns, rests = Turns(TokenBucket(0.5, 1.0, clock=lambda: 0.0)), list[float]()
    monkeypatch.setattr(asyncio.get_running_loop(), "call_later", lambda delay, *_: rests.append(delay))
    turns.took(1.0 + HOLD)
    assert rests == [pytest.approx((HOLD + ENOUGH) / 0.5)]


async def test_part_of_a_turn_is_the_smaller_the_less_is_left_of_the_budget() -> None:
    turns = Turns(TokenBucket(0.5, 1.0, clock=lambda: 0.0))
    for left, part in ((1.0, HOLD), (0.5, HOLD), (0.25, HOLD / 2), (0.0, LEAST)):
        turns.took(turns.budget.tokens - left)
        assert turns.part == pytest.approx(part)


async def test_one_that_fails_keeps_nobody_from_going_on() -> None:
    turns, served, failed = Turns(), [], []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failed.append(context["exception"]))
    turns.wait(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    turns.wait(lambda: served.append("b"))
    for _ in range(2):
        await asyncio.sleep(0)
    assert served == ["b"] and isinstance(failed[0], ZeroDivisionError)


class Flow:
    """A connection through a pipe; ``near`` is the end of who sends."""

    def __init__(self, scratch: Scratch, turns: Turns) -> None:
        self.near, source = socket.socketpair()
        sink, self.far = socket.socketpair()
        self.sockets = (self.near, source, sink, self.far)
        for sock in self.sockets:
            sock.setblocking(False)
        self.pipe = Pipe(source, sink, scratch, Fence(), turns)
        self.pipe.carry()
        self.pipe.start()

    def close(self) -> None:
        self.pipe.stop()
        for sock in self.sockets:
            sock.close()


async def test_other_cage_waits_for_one_turn_of_a_busy_one_and_not_for_each_of_its_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scratch, sends, now = Scratch(), [], [0.0]
    monkeypatch.setattr(relay, "thread_time", lambda: now[0])
    read = Pipe._read_some

    def timed(self: Pipe, end: float) -> None:
        read(self, end)
        now[0] += HOLD / 2  # that it takes to read
        sends.append(self)

    monkeypatch.setattr(Pipe, "_read_some", timed)
    turns = rich()
    busy = [Flow(scratch, turns) for _ in range(20)]
    other = Flow(scratch, rich())
    try:
        for _ in range(5):
            for flow in busy:
                flow.near.send(PIECE)
            other.near.send(PIECE)
            before = len(sends)
            while other.pipe not in sends[before:]:  # noqa: ASYNC110 # each turn of the loop counts
                await asyncio.sleep(0)
            waited = sends[before:].index(other.pipe)
            assert waited <= 4, "it waits for the busy cage's part of this turn and of the next"
        while any(len(PIECE) * 5 != flow.pipe.total for flow in busy):  # noqa: ASYNC110 # a few turns
            await asyncio.sleep(0)
    finally:
        for flow in [*busy, other]:
            flow.close()


async def test_bytes_that_wait_for_their_sinks_go_out_in_turns_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sinks of which many can take something at once hold up other cages no longer than sources do."""
    scratch, now, sends, turns = Scratch(), [0.0], list[Pipe](), rich()
    monkeypatch.setattr(relay, "thread_time", lambda: now[0])
    send = Pipe._send_rest

    def timed(self: Pipe) -> None:
        turns.took(HOLD / 2)  # that it takes to send
        sends.append(self)
        send(self)

    monkeypatch.setattr(Pipe, "_send_rest", timed)
    busy = [Flow(scratch, turns) for _ in range(20)]
    other = Flow(scratch, rich())
    try:
        for flow in busy:
            while not flow.pipe._rest:
                with contextlib.suppress(BlockingIOError):
                    flow.near.send(PIECE)
                await asyncio.sleep(0)
        for flow in busy:
            while True:
                try:
                    flow.far.recv(1 << 20)
                except BlockingIOError:
                    break
        other.near.send(PIECE)
        while not other.pipe.total:  # noqa: ASYNC110 # each turn of the loop counts
            await asyncio.sleep(0)
        assert len(sends) <= 4, "it waits for the busy cage's part of this turn and of the next"
        while any(flow.pipe._rest for flow in busy):  # noqa: ASYNC110 # a few turns
            await asyncio.sleep(0)
        assert len(sends) >= len(busy)
    finally:
        for flow in [*busy, other]:
            flow.close()


async def test_each_turn_costs_a_cage_the_wakeup_of_the_broker_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "thread_time", lambda: 0.0)
    turns = Turns(TokenBucket(0.5, 1.0, clock=lambda: 0.0))
    flow = Flow(Scratch(), turns)
    try:
        for number in range(1, 11):
            flow.near.send(b"x")
            while flow.pipe.total < number:  # noqa: ASYNC110 # a turn or two
                await asyncio.sleep(0)
        assert turns.budget.tokens == pytest.approx(1.0 - 10 * WAKEUP)
    finally:
        flow.close()


async def test_many_connections_beyond_the_budget_wake_the_broker_less_than_one_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An exchange goes on as fast as the budget allows; a flood on many connections is read in larger pieces."""
    now, pieces, loop = [0.0], [0], asyncio.get_running_loop()
    read = Pipe._read_some

    def counted(self: Pipe, end: float) -> None:
        pieces[0] += 1
        read(self, end)

    def later(delay: float, call: Callable[..., object]) -> asyncio.Handle:
        now[0] += delay
        return loop.call_soon(call)

    monkeypatch.setattr(relay, "thread_time", lambda: 0.0)
    monkeypatch.setattr(loop, "call_later", later)
    monkeypatch.setattr(Pipe, "_read_some", counted)

    async def of(connections: int) -> int:
        """The pieces of a second after the budget is spent, of connections that send a byte whenever they can."""
        turns = Turns(TokenBucket(PER_SECOND, AT_ONCE, clock=lambda: now[0]))
        flows = [Flow(Scratch(), turns) for _ in range(connections)]
        turns.took(AT_ONCE)
        end, pieces[0] = now[0] + 1, 0
        while now[0] < end:
            for flow in flows:
                flow.near.send(b"x")
            await asyncio.sleep(0)
            for flow in flows:
                with contextlib.suppress(BlockingIOError):
                    flow.far.recv(1 << 16)
        for flow in flows:
            flow.close()
        return pieces[0]

    one, many = await of(1), await of(32)
    assert one >= 0.95 * PER_SECOND / WAKEUP, "nothing is added to what one exchange costs"
    assert many < one / 2


class Both:
    """A connection through both of its pipes: ``near`` is the client's end, ``far`` the server's."""

    def __init__(self, turns: Turns) -> None:
        self.near, client = socket.socketpair()
        server, self.far = socket.socketpair()
        self.sockets = (self.near, client, server, self.far)
        for sock in self.sockets:
            sock.setblocking(False)
        made = Connection(client, IPv4Address("93.184.216.34"), 9000, 0.0, server=server)
        self.pipes = made.join(Scratch(), Fence(), turns, lambda _, failure: None)
        for pipe in self.pipes:
            pipe.carry()
            pipe.start()

    async def carry(self, sender: socket.socket) -> None:
        """Send a byte, and wait until it has come out at the other end."""
        sender.send(b"x")
        async with asyncio.timeout(seconds(10)):
            await asyncio.get_running_loop().sock_recv(self.far if sender is self.near else self.near, 100)

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.stop()
        for sock in self.sockets:
            sock.close()


class Spent(Turns):
    """Turns with so many seconds of a budget of one, on a clock that stands unless it is moved."""

    def __init__(self, left: float) -> None:
        self.now = 0.0
        super().__init__(TokenBucket(0.5, 1.0, clock=lambda: self.now))
        self.took(1.0 - left)
        self.before = self.budget.tokens

    @property
    def pieces(self) -> float:
        """Times what a piece costs at least, since the beginning."""
        return (self.before - self.budget.tokens) / WAKEUP


LITTLE, MUCH = 0.1, 0.5


async def test_exchange_costs_its_pieces_and_a_stream_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "thread_time", lambda: 0.0)
    turns = Spent(LITTLE)
    both = Both(turns)
    try:
        for _ in range(5):
            await both.carry(both.near)
            await both.carry(both.far)
        assert turns.pieces == pytest.approx(10), "one piece for another"
        await both.carry(both.near)
        for number in range(1, 4):
            await both.carry(both.near)
            assert turns.pieces == pytest.approx(11 + number * (1 + STREAM)), "nothing has come back since"
        await both.carry(both.far)
        assert turns.pieces == pytest.approx(12 + 3 * (1 + STREAM)), "an answer is an answer"
        both.near.shutdown(socket.SHUT_WR)
        both.far.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(seconds(10)):
            while not all(pipe.ended for pipe in both.pipes):  # noqa: ASYNC110 # a turn or two
                await asyncio.sleep(0)
        assert turns.pieces == pytest.approx(14 + 3 * (1 + STREAM)), "an end is no piece of a stream"
    finally:
        both.close()


async def test_stream_costs_no_more_than_an_exchange_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "thread_time", lambda: 0.0)
    turns = Spent(MUCH)
    both = Both(turns)
    try:
        for _ in range(5):
            await both.carry(both.near)
        assert turns.pieces == pytest.approx(5)
    finally:
        both.close()


async def test_connection_that_waits_in_both_directions_is_a_stream_in_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that come back as they go, from a server that is in league, make no exchange of it."""
    monkeypatch.setattr(relay, "thread_time", lambda: 0.0)
    turns = Spent(LITTLE)
    both = Both(turns)
    try:
        await both.carry(both.near)
        await both.carry(both.far)
        turns.took(turns.budget.tokens + HOLD)
        both.near.send(b"x")
        both.far.send(b"x")
        async with asyncio.timeout(seconds(10)):
            while len(turns._waiting) < 2:  # noqa: ASYNC110 # a turn or two
                await asyncio.sleep(0)
            turns.now = (HOLD + LITTLE) / 0.5
            turns.before = turns.budget.tokens
            while any(pipe.total < 2 for pipe in both.pipes):  # noqa: ASYNC110 # a timer of the turns has to come
                await asyncio.sleep(0.001)
        assert turns.pieces == pytest.approx(2 * (1 + STREAM) + 1), "the first while the other waits"
    finally:
        both.close()


async def test_connections_of_a_busy_cage_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever always has something to send comes no oftener than the others."""
    scratch, turns = Scratch(), rich()
    now, reads = [0.0], Counter[Pipe]()
    monkeypatch.setattr(relay, "thread_time", lambda: now[0])
    read = Pipe._read_some

    def timed(self: Pipe, end: float) -> None:
        read(self, end)
        now[0] += HOLD
        reads[self] += 1

    monkeypatch.setattr(Pipe, "_read_some", timed)
    flows = [Flow(scratch, turns) for _ in range(8)]
    try:
        for _ in range(400):
            for flow in flows:
                with contextlib.suppress(BlockingIOError):
                    flow.near.send(PIECE)
                with contextlib.suppress(BlockingIOError):
                    flow.far.recv(1 << 20)
            await asyncio.sleep(0)
        counts = sorted(reads[flow.pipe] for flow in flows)
        assert counts[0] > 10 and counts[-1] <= counts[0] + 2, counts
    finally:
        for flow in flows:
            flow.close()


async def test_pipe_that_ends_while_it_waits_for_its_turn_is_left_alone() -> None:
    turns = Turns()
    flow = Flow(Scratch(), turns)
    turns.took(HOLD)
    flow.near.send(PIECE)
    flow.pipe._readable()
    assert turns.over and not flow.pipe._reading
    flow.close()
    while turns.over:  # noqa: ASYNC110 # a turn or two
        await asyncio.sleep(0)
    assert flow.pipe.total == 0
