"""Lines and JSON of untrusted peers: common writers are read, and no line costs more than its share."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from host.wire import lines
from host.wire.lines import LONG_LINE, LineProtocol
from host.wire.strict_json import MAX_VALUES, WireError, parse
from isolator.base.pacing import TokenBucket
from tests.support.timeouts import seconds


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('"half \\ud83d"', "half \ufffd"),
        ('"\\ude00 half"', "\ufffd half"),
        ('"whole \\ud83d\\ude00"', "whole \U0001f600"),
        ('"\\ud83d\\ud83d\\ude00\\ude00"', "\ufffd\U0001f600\ufffd"),
        ('"no escape: \\\\ud83d, one: \\\\\\uD83D"', "no escape: \\ud83d, one: \\\ufffd"),
        ('{"\\ud83d": 1}', {"\ufffd": 1}),
        ('\ufeff{"a": 1}', {"a": 1}),
    ],
)
def test_text_of_common_writers_is_read(text: str, value: object) -> None:
    assert parse(text.encode()) == value


@pytest.mark.parametrize(
    "text", ['"\\ud83d', '"\\ud8"', "\ufeff\ufeff{}", "\ufeff", '"\\ud83d" x', '{"a": NaN, "b": "\\ud83d"}']
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(WireError, match="not valid JSON"):
        parse(text.encode())


@pytest.mark.parametrize("number", ["1e999", "-1e+0999", "9" * 400 + ".5", "1e309"])
def test_infinite_number_is_refused_also_behind_text_that_resembles_one(number: str) -> None:
    with pytest.raises(WireError):
        parse(f'{{"a": "e000 {"1" * 299} ", "b": [{number}]}}'.encode())


@pytest.mark.parametrize("digits", [210, 250, 299, 300])
def test_infinite_number_of_many_digits_and_a_short_exponent_is_refused(digits: int) -> None:
    with pytest.raises(WireError, match="too large"):
        parse(b"[" + b"9" * digits + b"e99]")
    assert parse(b"[" + b"9" * 199 + b"e99]") == [1e298]


def test_brackets_count_as_values() -> None:
    with pytest.raises(WireError, match="values"):
        parse(b"[" + b",".join([b"[[]]"] * (MAX_VALUES // 2)) + b"]")


class Reader(LineProtocol):
    """Keeps its lines; ``turns`` counts those of the event loop that it took for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[bytes] = []
        self.turns = 0
        self.more = asyncio.Event()

    def line_received(self, data: bytes) -> None:
        self.lines.append(data)
        self.more.set()

    def _next_turn(self) -> None:
        self.turns += 1
        super()._next_turn()

    async def until(self, count: int) -> None:
        """Wait for a number of lines."""
        async with asyncio.timeout(seconds(20)):
            while len(self.lines) < count:
                self.more.clear()
                await self.more.wait()


@pytest.fixture
async def reader() -> AsyncIterator[tuple[Reader, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    made = Reader()
    await asyncio.get_running_loop().connect_accepted_socket(lambda: made, ours)
    yield made, theirs
    made.close()
    theirs.close()


async def test_blank_lines_take_no_turns_of_the_loop(reader: tuple[Reader, socket.socket]) -> None:
    protocol, peer = reader
    loop = asyncio.get_running_loop()
    for _ in range(16):
        await loop.sock_sendall(peer, b"\n" * 65536)
    await loop.sock_sendall(peer, b"\n\na\n\n\nb\n")
    await protocol.until(2)
    assert protocol.lines == [b"a", b"b"]
    assert protocol.turns <= 1


async def test_long_line_beyond_the_time_of_its_peer_waits(
    reader: tuple[Reader, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MOMENT", 0.0)
    protocol, peer = reader
    now = 0.0
    protocol.cpu = TokenBucket(1e-3, 0.0, clock=lambda: now)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(peer, b"short\n" + b"x" * LONG_LINE + b"\nafter\n")
    await protocol.until(2)
    assert len(protocol.lines) == 2
    await protocol.until(3)
    assert protocol.lines[2] == b"after"


class _Written(asyncio.Transport):
    """A transport that keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True


async def test_messages_of_one_turn_are_one_write_and_stay_in_order() -> None:
    protocol, transport = LineProtocol(), _Written()
    protocol.connection_made(transport)
    for message in (b"1\n", b"2\n", b"3\n"):
        protocol.send_soon(message)
    assert transport.writes == []
    await asyncio.sleep(0)
    assert transport.writes == [b"1\n2\n3\n"]
    protocol.send_soon(b"4\n")
    protocol.flush()
    assert transport.writes[1:] == [b"4\n"], "at once"
    await asyncio.sleep(0)
    assert transport.writes[1:] == [b"4\n"], "and once"
    protocol.send_soon(b"4\n")
    protocol.send(b"5\n")
    protocol.send_soon(b"6\n")
    protocol.close()
    await asyncio.sleep(0)
    assert transport.writes[2:] == [b"4\n", b"5\n", b"6\n"]


async def test_connection_that_is_read_to_its_end_as_it_closes_is_cut_no_more(
    reader: tuple[Reader, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each one would be a fault in the daemon's log, at a stranger's wish."""
    protocol, peer = reader
    loop, reported, due = asyncio.get_running_loop(), list[Any](), asyncio.Event()
    loop.set_exception_handler(lambda _, context: reported.append(context))
    monkeypatch.setattr(lines, "LINGER", 0.05)
    protocol.send(bytes(1 << 20))
    protocol.close()
    while await loop.sock_recv(peer, 1 << 16):
        pass
    loop.call_later(lines.LINGER, due.set)
    await asyncio.wait_for(due.wait(), seconds(20))
    assert not reported


async def test_message_of_the_turn_in_which_the_peer_ends_is_written(reader: tuple[Reader, socket.socket]) -> None:
    protocol, peer = reader
    loop = asyncio.get_running_loop()
    peer.shutdown(socket.SHUT_WR)
    loop.call_soon(protocol.send_soon, b"the answer\n")  # in the loop's next turn, before what it then finds readable
    assert await loop.sock_recv(peer, 64) == b"the answer\n"
