"""The gate between client and server: what waits, what passes, what ends the connection; and the relay with a gate."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

import pytest

from isolator.base.pacing import TokenBucket
from isolator.broker.gate.gate import FIRST_PAUSE, LONGEST_PAUSE, Gate
from isolator.broker.gate.looking import ENOUGH, HOLD, LARGEST, READ, SMALLEST, Looking
from isolator.broker.gate.tls import _RETRY
from isolator.broker.guard import Denied, objection
from isolator.broker.relay import Pipe, Scratch
from isolator.broker.sniff import Hello
from isolator.broker.turns import Turns
from isolator.ipc.fence import Fence
from tests.broker.test_sniff import REAL, hello
from tests.support.timeouts import seconds

NAME = "hooks.example.com"
GET = b"GET / HTTP/1.1\r\nHost: hooks.example.com\r\n\r\n"
OTHER_GET = b"GET / HTTP/1.1\r\nHost: other.example.com\r\n\r\n"
SOCKET = b"GET / HTTP/1.1\r\nHost: hooks.example.com\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
CCS, EARLY = b"\x14\x03\x03\0\1\1", b"\x17\x03\x03\0\x04data"
WARNING = b"\x15\x03\x03\0\2\1\x70"


def gate(port: int = 8080, *, lax: bool = False, work: Looking | None = None) -> Gate:
    def judge(found: Hello) -> None:
        rule = objection(found, NAME, port, allow_no_sni=lax)
        if rule is not None:
            raise Denied(rule)

    return Gate(judge, strict=port in (80, 443), work=work)


def server_hello(random: bytes = bytes(32)) -> bytes:
    message = b"\2\0\0\x26\x03\x03" + random + b"\0\x13\1\0"
    return b"\x16\x03\x03" + len(message).to_bytes(2, "big") + message


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def denied(made: Gate, *parts: bytes) -> str:
    """The rule by which the gate refuses these bytes."""
    with pytest.raises(Denied) as caught:
        for part in parts:
            made.feed(part)
    return str(caught.value.rule)


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("answer", [server_hello(), WARNING + server_hello(), b"220 not TLS at all\r\n"])
def test_handshake_behind_the_first_hello_waits_for_the_server_and_then_passes(size: int, answer: bytes) -> None:
    made = gate(443)
    finished = CCS + b"\x16\x03\x03\0\x20\1" + bytes(31)  # TLS 1.2, resumed: encrypted, and looks like a hello
    passed = b"".join(bytes(made.feed(part)) for part in pieces(REAL + EARLY + finished, size))
    assert passed == REAL + EARLY + CCS and made.waiting
    for part in pieces(answer, size):
        made.answered(part)
    assert not made.waiting
    assert made.feed(b"more") == finished[len(CCS) :] + b"more" and made.done


@pytest.mark.parametrize("size", [1, 10_000])
@pytest.mark.parametrize("first", [b"", CCS, EARLY, CCS + EARLY])
def test_second_hello_is_held_to_the_name(size: int, first: bytes) -> None:
    for second, rule in ((REAL, None), (hello("other.example.com"), "sni-mismatch"), (hello(None), "no-sni")):
        made = gate(443)
        made.feed(REAL)
        made.answered(server_hello(_RETRY))
        if rule is None:
            passed = b"".join(bytes(made.feed(part)) for part in pieces(first + second, size))
            assert passed == first + second and made.done
        else:
            assert denied(made, *pieces(first + second, size)) == rule


def test_second_hello_that_does_not_wait_for_the_server_is_held_to_the_name() -> None:
    made = gate(443)
    assert made.feed(REAL + hello("other.example.com")) == REAL
    made.answered(server_hello(_RETRY))
    assert denied(made, b"") == "sni-mismatch"


@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_every_request_of_a_connection_is_held_to_the_name(size: int) -> None:
    post = GET.replace(b"GET", b"POST").replace(b"\r\n\r\n", b"\r\nContent-Length: 60\r\n\r\n") + OTHER_GET.ljust(60)
    chunked = GET.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n")
    chunked += b"%x;x=y\r\n" % len(OTHER_GET) + OTHER_GET + b"\r\n0\r\nTrailer: x\r\n\r\n"
    honest = GET + post + chunked + b"\r\n" + GET
    made = gate()
    assert b"".join(bytes(made.feed(part)) for part in pieces(honest, size)) == honest
    for before in (GET, post, chunked, honest):
        assert denied(gate(), *pieces(before + OTHER_GET, size)) == "host-mismatch"


@pytest.mark.parametrize(
    "lines",
    [
        b"Content-Length: 5\r\nContent-Length: 6",
        b"Content-Length: 5, 5",
        b"Content-Length: +5",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding: chunked\nContent-Length: 5",
        b"Transfer-Encoding\x0b: chunked",
        b"X: \0",
    ],
)
def test_request_that_two_servers_could_read_differently_is_refused(lines: bytes) -> None:
    assert denied(gate(), GET[:-2] + lines + b"\r\n\r\n") == "malformed"


@pytest.mark.parametrize(
    "body",
    [
        b"5\nhello\r\n",
        b"x\r\n",
        b"5 \r\nhello",
        b"5\r\nhelloX\r\n",
        b"0\r\nHost: b\r\n\r\n",
        b"0\r\nx\r\n",
        b"1" * 5000,
    ],
)
def test_chunked_body_that_breaks_the_rules_is_refused(body: bytes) -> None:
    assert denied(gate(), GET[:-2] + b"Transfer-Encoding: chunked\r\n\r\n" + body) == "malformed"


def test_bytes_that_are_no_request_behind_one_are_refused() -> None:
    for data in (b"EHLO me\r\n", b"\x01\x02\x03\x04\x05", REAL, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
        assert denied(gate(), GET + data) == "malformed"


@pytest.mark.parametrize("size", [1, 10_000])
def test_bytes_behind_an_accepted_upgrade_pass(size: int) -> None:
    for request, answer in (
        (SOCKET, b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 101 Switching Protocols\r\n\r\n"),
        (b"CONNECT hooks.example.com:8080 HTTP/1.1\r\nHost: hooks.example.com\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"),
    ):
        made = gate()
        assert b"".join(bytes(made.feed(part)) for part in pieces(request + b"\x82\x05", size)) == request
        assert made.waiting
        for part in pieces(answer, size):
            made.answered(part)
        assert made.feed(OTHER_GET) == b"\x82\x05" + OTHER_GET and made.done


@pytest.mark.parametrize("waits", [b"", b"\x82\x05"])
def test_gate_is_open_for_another_broker_as_soon_as_the_server_has_taken_the_upgrade(waits: bytes) -> None:
    """Before the client says anything more: a quiet websocket may do so hours later."""
    made = gate()
    assert made.opened() is None
    assert made.feed(SOCKET + waits) == SOCKET
    assert made.opened() is None
    made.answered(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
    assert made.opened() == waits and made.done


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 426 Upgrade\r\n", b"nonsense and more", b""])
def test_request_behind_a_refused_upgrade_is_held_to_the_name(answer: bytes) -> None:
    made = gate()
    assert made.feed(SOCKET + GET) == SOCKET
    made.answered(answer)
    assert made.feed(b"") == GET and not made.done
    assert denied(made, OTHER_GET) == "host-mismatch"


def test_upgrade_of_a_later_request_opens_nothing() -> None:
    # The answer to an earlier request could contain the bytes of a 101.
    made = gate()
    assert made.feed(GET + SOCKET) == GET + SOCKET
    made.answered(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
    assert denied(made, OTHER_GET) == "host-mismatch"


def test_upgrade_to_http_2_is_refused_like_http_2_itself() -> None:
    for lax in (False, True):
        made = gate(lax=lax)
        made.feed(SOCKET.replace(b"websocket", b"h2c"))
        answer = b"HTTP/1.1 101 Switching Protocols\r\n\r\n"
        if lax:
            made.answered(answer)
            assert made.feed(b"x") == b"x"
        else:
            with pytest.raises(Denied, match="http2"):
                made.answered(answer)


@pytest.mark.parametrize("data", [b"\0\0\0\x08", b"EHLO me\r\nGET / HTTP/1.1\r\n", b'{"a": 1}'])
def test_other_protocol_passes_at_once_and_is_not_looked_at_again(data: bytes) -> None:
    made = gate()
    assert made.feed(data) == data and made.done


def test_half_a_line_of_an_unknown_protocol_passes_and_the_rest_is_held_to_the_name() -> None:
    made = gate()
    assert made.feed(b"FOO / HT") == b"FOO / HT" and not made.done
    assert made.feed(b"TP/1.1\r\nHost: other.") == b""
    assert denied(made, b"example.com\r\n\r\n") == "host-mismatch"


class Ends:
    """A flow between two socket pairs, with a gate: ``client`` and ``server`` are the far ends."""

    def __init__(self, made: Gate) -> None:
        self.client, inner = socket.socketpair()
        outer, self.server = socket.socketpair()
        self.sockets: Sequence[socket.socket] = (self.client, inner, outer, self.server)
        for sock in self.sockets:
            sock.setblocking(False)
        share = Scratch(), Fence(), Turns()
        self.up, self.down = Pipe(inner, outer, *share), Pipe(outer, inner, *share)
        self.up.guard(made, self.down)
        self.down.start()
        self.up.start()

    async def says(self, sock: socket.socket, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(sock, data)

    async def hears(self, sock: socket.socket, count: int) -> bytes:
        data = b""
        async with asyncio.timeout(seconds(10)):
            while len(data) < count:
                part = await asyncio.get_running_loop().sock_recv(sock, count - len(data))
                if not part:
                    break
                data += part
        return data

    def close(self) -> None:
        self.up.stop()
        self.down.stop()
        for sock in self.sockets:
            sock.close()


async def test_relay_goes_on_when_the_server_has_answered() -> None:
    ends = Ends(gate(443))
    finished = CCS + b"\x16\x03\x03\0\x20\1" + bytes(31)
    await ends.says(ends.client, REAL + finished)
    assert await ends.hears(ends.server, len(REAL + CCS)) == REAL + CCS
    await ends.says(ends.server, server_hello())
    assert await ends.hears(ends.client, len(server_hello())) == server_hello()
    assert await ends.hears(ends.server, len(finished) - len(CCS)) == finished[len(CCS) :]
    await ends.says(ends.client, b"x" * 100_000)
    assert len(await ends.hears(ends.server, 100_000)) == 100_000
    assert ends.up.gate is None and ends.down._answers is None  # nothing is looked at any more
    ends.close()


async def test_relay_reads_no_more_while_looking_has_cost_too_much() -> None:
    clock = [0.0]
    budget = TokenBucket(1.0, 10.0, clock=lambda: clock[0])
    ends = Ends(gate(80, work=Looking(budget)))
    await ends.says(ends.client, GET)
    assert await ends.hears(ends.server, len(GET)) == GET
    budget.take(20.0)
    await ends.says(ends.client, GET)
    for _ in range(3):  # it looks after the budget again and again, and rests again
        await asyncio.sleep(0.06)
        with pytest.raises(BlockingIOError):
            ends.server.recv(1)
    assert budget.tokens < 0 and not ends.up._reading
    clock[0] = 60.0
    assert await ends.hears(ends.server, len(GET)) == GET
    ends.close()


async def test_relay_reads_one_dear_piece_of_a_cage_in_a_turn_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many connections it has: the other cages' turn comes in between."""
    work, loop, seconds_used, number = Looking(TokenBucket(1000.0, 1000.0)), asyncio.get_running_loop(), 0.0, 0
    pieces: list[tuple[int, int]] = []

    def thread_time() -> float:
        nonlocal seconds_used
        seconds_used += 0.004  # that a piece takes
        return seconds_used

    def count_turns() -> None:
        nonlocal number, counting
        number += 1
        counting = loop.call_soon(count_turns)

    counting = loop.call_soon(count_turns)
    monkeypatch.setattr("isolator.broker.gate.gate.time.thread_time", thread_time)
    feed = Gate.feed

    def noted(self: Gate, data: memoryview) -> object:
        if data:
            pieces.append((number, len(data)))
        return feed(self, data)

    monkeypatch.setattr(Gate, "feed", noted)
    all_ends = [Ends(gate(80, work=work)) for _ in range(4)]
    body = b"POST / HTTP/1.1\r\nHost: hooks.example.com\r\nContent-Length: 40000\r\n\r\n" + bytes(40000)
    for ends in all_ends:
        await ends.says(ends.client, body)
    for ends in all_ends:
        assert await ends.hears(ends.server, len(body)) == body
    counting.cancel()
    turns = [turn for turn, _ in pieces]
    assert len(turns) == len(set(turns))
    assert pieces[0][1] == LARGEST and max(size for _, size in pieces[8:]) == SMALLEST
    for ends in all_ends:
        ends.close()


async def test_pieces_are_as_large_as_their_cost_allows() -> None:
    work = Looking(TokenBucket(1000.0, 1000.0))
    work.took(4 * HOLD, LARGEST)
    assert (work.piece, work.over) == (LARGEST // 4, True)
    await asyncio.sleep(0)
    assert not work.over
    for _ in range(10):
        work.took(HOLD / 10, work.piece)
    assert work.piece == LARGEST
    work.took(1000 * HOLD, 6)
    assert work.piece == SMALLEST


async def test_turns_of_a_cage_whose_budget_is_spent_come_one_by_one() -> None:
    clock, served = [0.0], []
    work = Looking(TokenBucket(1.0, 1.0, clock=lambda: clock[0]))
    work.took(1.5, 1)
    for name in "abc":
        work.turn(lambda name=name: (served.append(name), work.took(1.0, 1)))  # type: ignore[misc]
    for number in range(3):
        assert "".join(served) == "abc"[:number]
        clock[0] += 1.1
        async with asyncio.timeout(seconds(20)):
            while len(served) == number:  # noqa: ASYNC110 # a timer of the gate has to come
                await asyncio.sleep(0.01)


async def test_spent_budget_is_used_again_once_there_is_enough_of_it() -> None:
    clock = [0.0]
    work = Looking(TokenBucket(0.5, 1.0, clock=lambda: clock[0]))
    assert not work.spent
    work.took(1.0, 1)
    assert work.spent
    for clock[0] in (2 * READ + 0.1 * ENOUGH, 2 * READ + 1.9 * ENOUGH):
        assert work.budget.tokens > 0 and work.spent
    clock[0] = 2 * READ + 2.1 * ENOUGH
    assert not work.spent
    work.took(work.budget.tokens - READ, 1)
    assert not work.spent, "what is there may be used to the last"


async def test_what_comes_while_the_budget_is_spent_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte at a time costs no more wakeups than a whole head: the broker is nobody's alone."""
    clock, read = [0.0], []
    feed = Gate.feed
    monkeypatch.setattr(Gate, "feed", lambda self, data: (read.append(len(data)), feed(self, data))[1])
    budget = TokenBucket(0.5, 1.0, clock=lambda: clock[0])
    ends = Ends(gate(80, work=(work := Looking(budget))))
    budget.take(1.0 + 1e-9)
    assert work.spent
    for at in range(len(GET)):
        await ends.says(ends.client, GET[at : at + 1])
        clock[0] += 0.9 * 2 * ENOUGH / len(GET)  # there is something all the time, and never enough
        await asyncio.sleep(0)
    assert budget.tokens > 0 and not any(read)
    clock[0] = 1.0
    assert await ends.hears(ends.server, len(GET)) == GET
    assert [size for size in read if size] == [len(GET)]
    ends.close()


def test_half_a_hello_that_comes_in_small_pieces_is_read_less_and_less_often() -> None:
    one, pauses = gate(80), []
    for at in range(8):
        one.feed(GET[at : at + 1])
        one.charge()
        pauses.append(one.pause)
    assert pauses == [min(LONGEST_PAUSE, FIRST_PAUSE * 2**at) for at in range(8)]
    one.feed(b"")
    one.charge()
    assert not one.pause, "nothing has come: it is read on"
    one.feed(GET[8:])
    one.charge()
    assert not one.pause
    one.feed(GET[:1])
    one.charge()
    assert one.pause == FIRST_PAUSE, "the next request is another one"


def test_half_a_hello_in_pieces_of_some_size_is_read_at_once() -> None:
    one = gate(80)
    for start in (b"GET / HTTP/1.1\r\n", *[b""] * 9):
        one.feed(start + b"A: " + b"x" * SMALLEST + b"\r\n")
        one.charge()
        assert one.incomplete and not one.pause


async def test_broker_is_not_woken_for_each_byte_of_a_hello(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isolator.broker.gate.gate.FIRST_PAUSE", LONGEST_PAUSE)
    feed, read = Gate.feed, list[int]()
    monkeypatch.setattr(Gate, "feed", lambda self, data: (read.append(len(data)), feed(self, data))[1])
    ends, loop = Ends(gate(80)), asyncio.get_running_loop()
    began = loop.time()
    for at in range(len(GET)):
        await ends.says(ends.client, GET[at : at + 1])
        await asyncio.sleep(0.001)
    assert await ends.hears(ends.server, len(GET)) == GET
    assert sum(read) == len(GET) and len(read) <= 2 + (loop.time() - began) / LONGEST_PAUSE, read
    ends.close()


async def test_relay_passes_on_what_waited_when_the_server_ends() -> None:
    ends = Ends(gate(443))
    await ends.says(ends.client, REAL + b"\x16\x03\x03\0\1\1")
    await ends.hears(ends.server, len(REAL))
    ends.server.shutdown(socket.SHUT_WR)
    assert await ends.hears(ends.server, 6) == b"\x16\x03\x03\0\1\1"
    ends.close()


async def test_relay_ends_with_the_refusal() -> None:
    for later, rule in ((OTHER_GET, "host-mismatch"), (GET[:20], "incomplete")):
        ends, ended = Ends(gate()), asyncio.Event()
        ends.up.on_end = ended.set
        await ends.says(ends.client, GET + later)
        ends.client.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(seconds(10)):
            await ended.wait()
        assert isinstance(ends.up.failure, Denied) and ends.up.failure.rule == rule
        ends.close()


async def test_request_that_stays_unfinished_is_ended() -> None:
    ends = Ends(gate())
    await ends.says(ends.client, GET + GET[:20])
    assert await ends.hears(ends.server, len(GET)) == GET
    ends.up.end_incomplete(ends.up.touched)
    assert not ends.up.ended
    ends.up.end_incomplete(ends.up.touched + 1)
    assert isinstance(ends.up.failure, Denied) and ends.up.failure.rule == "incomplete"
    ends.close()
