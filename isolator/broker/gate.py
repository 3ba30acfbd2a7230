"""Hold a client's bytes to the granted name for as long as anything in the clear can name a server.

Which bytes these are depends on the protocol:

- TLS: the ClientHello, and the second one that a server may ask for (HelloRetryRequest). A client can send another
  before it is asked, so handshake records behind the first wait until the server has answered; early data passes.
  Then everything is encrypted, and passes.
- HTTP/1: the head of *every* request, whose bodies are followed to find the next. What two readers could read
  differently ends the connection. After an upgrade that the server took (101), or a CONNECT, everything passes; only
  the first request of a connection can lead there, so that the answer to it is known.
- HTTP/2 without TLS names a server in every request, compressed: it is refused unless the policy lets names be absent.
- Everything else passes.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol, Self

from isolator.broker.guard import Denied
from isolator.broker.sniff import (
    HANDSHAKE,
    Hello,
    HelloReader,
    Malformed,
    ReaderState,
    Request,
    RequestState,
    Sniffer,
    SnifferState,
)
from isolator.ipc.body import Body
from isolator.ipc.succession import to_bytes, to_text
from isolator.base.pacing import TokenBucket
from isolator.policy.denial import DenialRule

Judge = Callable[[Hello], None]
"""Raises Denied for a hello that does not fit the granted name."""

PER_SECOND, AT_ONCE = 0.1, 0.02
"""Seconds of CPU time for looking at what one cage sends in the clear."""
LARGEST, SMALLEST, HOLD = 16 * 1024, 256, 0.001
"""Bytes of a client's in one piece, and seconds for which one may hold up the others."""
LONGEST_REST = 0.05
"""Seconds after which a spent budget is looked at again."""
READ = 20e-6
"""Seconds that a piece costs beside being looked at: one byte at a time is no cheaper way to keep a broker busy."""
_RECORDS = range(20, 25)
_RETRY = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")
"""The random of a ServerHello that is a HelloRetryRequest (RFC 8446, 4.1.3)."""
_MAX_ANSWER = 16 * 1024
_MAX_LINE = 4096
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-9][0-9][0-9])")
_TRAILER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*\r\n")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[^\r\n]*)?\r\n")


class TlsState(Body):
    """A connection behind its first ClientHello, on its way to another broker."""

    waiting: bool
    listening: bool
    held: str
    left: int
    answer: str
    second: ReaderState | None


class HttpState(Body):
    """An HTTP/1 connection behind its first head, on its way to another broker."""

    waiting: bool
    listening: bool
    held: str
    head: SnifferState
    left: int
    expected: str
    line: str
    offer: RequestState | None
    answer: str
    unread: str


class GateState(Body):
    """A gate that holds something back, on its way to another broker."""

    strict: bool
    passing: bool
    held: str
    sniffer: SnifferState
    tls: TlsState | None
    http: HttpState | None


class _Watch(Protocol):
    """The protocol of a connection behind its first hello. Both methods may raise Malformed and Denied."""

    done: bool
    """Whether everything passes."""
    waiting: bool
    """Whether nothing passes before the server has answered."""
    listening: bool
    """Whether the server's bytes matter."""
    held: bytearray

    def feed(self, data: bytes) -> bytes:
        """The bytes that may pass now."""

    def answered(self, data: bytes) -> None:
        """Take note of the server's bytes, none at their end."""


class Looking:
    """The share of one cage, all its connections together, in reading what clients send in the clear.

    It has a budget of CPU time, and ``HOLD`` seconds of it in one turn of the event loop: so long the other cages
    wait. Whoever finds the turn ``over`` tries again in the next one; when the budget is spent, in its ``turn``.
    """

    def __init__(self, budget: TokenBucket | None = None) -> None:
        """``budget`` in seconds of CPU time."""
        self.budget = TokenBucket(PER_SECOND, AT_ONCE) if budget is None else budget
        self.piece = LARGEST
        """Bytes to read at a time, that they may be read in ``HOLD`` seconds at the present cost."""
        self.over = False
        """Whether this turn's part is used up."""
        self._used = 0.0
        self._waiting: deque[Callable[[], None]] = deque()
        self._timer: asyncio.Handle | None = None

    @property
    def spent(self) -> bool:
        """Whether the budget is spent."""
        return self.budget.tokens < 0

    def took(self, seconds: float, size: int) -> None:
        """Count the CPU time of reading so many bytes."""
        self.budget.take(seconds + READ)
        if not self._used:
            asyncio.get_running_loop().call_soon(self._new_turn)
        self._used += seconds + READ
        self.over = self._used >= HOLD
        if size and seconds > HOLD:
            self.piece = max(SMALLEST, int(min(size, self.piece) * HOLD / seconds))
        elif seconds < HOLD / 4 and size >= self.piece:
            self.piece = min(LARGEST, self.piece * 2)

    def turn(self, go_on: Callable[[], None]) -> None:
        """Call ``go_on`` when the budget allows, after those that wait already."""
        self._waiting.append(go_on)
        self._plan()

    def _new_turn(self) -> None:
        self._used, self.over = 0.0, False

    def _plan(self) -> None:
        if self._timer is None and self._waiting:
            pause = min(LONGEST_REST, -self.budget.tokens / self.budget.rate)
            self._timer = asyncio.get_running_loop().call_later(max(0.0, pause), self._next)

    def _next(self) -> None:
        self._timer = None
        try:
            if not self.spent:
                self._waiting.popleft()()
        finally:
            self._plan()


class Gate:
    """The bytes of one client. ``strict``: none passes before the first hello is judged."""

    def __init__(self, judge: Judge, *, strict: bool, work: Looking | None = None) -> None:
        self._judge, self._strict, self.work = judge, strict, work
        self._sniffer = Sniffer()
        self._held = bytearray()
        self._watch: _Watch | None = None
        self.passing = False
        """Whether bytes have passed: the first hello fits, or it is another protocol's so far."""
        self.done = False
        """Whether everything passes from now on."""

    def pass_on(self) -> GateState:
        """The state for another broker, of a gate that is not done."""
        watch = self._watch
        return GateState(
            strict=self._strict, passing=self.passing, held=to_text(self._held), sniffer=self._sniffer.pass_on(),
            tls=watch.pass_on() if isinstance(watch, _Tls) else None,
            http=watch.pass_on() if isinstance(watch, _Http) else None,
        )  # fmt: skip

    @classmethod
    def taken_over(cls, state: GateState, judge: Judge, work: Looking) -> Self:
        """A gate that goes on where that of another broker has stopped."""
        gate = cls(judge, strict=state.strict, work=work)
        gate.passing = state.passing
        gate._held += to_bytes(state.held)
        gate._sniffer = Sniffer.taken_over(state.sniffer)
        if state.tls is not None:
            gate._watch = _Tls.taken_over(judge, state.tls)
        elif state.http is not None:
            gate._watch = _Http.taken_over(judge, state.http)
        return gate

    @property
    def waiting(self) -> bool:
        """Whether nothing more may pass before the server has answered."""
        return self._watch is not None and self._watch.waiting

    @property
    def incomplete(self) -> bool:
        """Whether bytes of half a hello are held."""
        return bool((self._held if self._watch is None else self._watch.held).strip(b"\r\n\t "))

    def feed(self, data: bytes | memoryview) -> bytes | memoryview:
        """The bytes that may pass now, some of which may have been held before; raises Denied."""
        if self.done:
            return data
        began = time.thread_time()
        try:
            return self._first(bytes(data)) if self._watch is None else self._behind(self._watch, bytes(data))
        except Malformed as error:
            raise Denied(DenialRule.MALFORMED, detail=str(error)) from None
        finally:
            if self.work is not None:
                self.work.took(time.thread_time() - began, len(data))

    def answered(self, data: bytes | memoryview) -> bool:
        """Take note of the server's bytes, none at their end; False once they do not matter any more. Raises Denied.

        When ``waiting`` ends by this, ``feed`` gives the bytes that waited.
        """
        if self._watch is None:
            return not self.done
        try:
            self._watch.answered(bytes(data))
        except Malformed as error:
            raise Denied(DenialRule.MALFORMED, detail=str(error)) from None
        return self._watch.listening

    def _first(self, data: bytes) -> bytes:
        self._held += data
        hello = self._sniffer.feed(data)
        if hello is None and (self._strict or self._sniffer.certain):
            return b""
        held, rest = bytes(self._held), b""
        self._held.clear()
        self.passing = True
        if hello is not None:
            self._judge(hello)
            rest = self._sniffer.rest
            self._watch = self._behind_hello(hello)
            self.done = self._watch is None
        passed = held[: len(held) - len(rest)]
        return passed + self._behind(self._watch, rest) if self._watch is not None else held

    def _behind_hello(self, hello: Hello) -> _Watch | None:
        """Return the watch over the bytes behind the first hello."""
        if hello.protocol == "http" and hello.request is not None:
            return _Http(self._judge, hello.request)
        # A hello of SSL 2 has no records; a server that takes it speaks no TLS 1.3, and so asks for no second one.
        return _Tls(self._judge) if hello.protocol == "tls" and self._sniffer.in_records else None

    def _behind(self, watch: _Watch, data: bytes) -> bytes:
        passed = watch.feed(data)
        self.done = watch.done
        return passed


class _Tls:
    """The records behind a ClientHello."""

    def __init__(self, judge: Judge) -> None:
        self.done = self.waiting = False
        self.listening = True
        self.held = bytearray()
        self._judge = judge
        self._left = 0
        self._second: HelloReader | None = None
        self._answer = bytearray()

    def pass_on(self) -> TlsState:
        return TlsState(
            waiting=self.waiting, listening=self.listening, held=to_text(self.held), left=self._left,
            answer=to_text(self._answer), second=self._second.pass_on() if self._second is not None else None,
        )  # fmt: skip

    @classmethod
    def taken_over(cls, judge: Judge, state: TlsState) -> Self:
        watch = cls(judge)
        watch.waiting, watch.listening, watch._left = state.waiting, state.listening, state.left
        watch.held += to_bytes(state.held)
        watch._answer += to_bytes(state.answer)
        watch._second = HelloReader.taken_over(state.second) if state.second is not None else None
        return watch

    def feed(self, data: bytes) -> bytes:
        if self._second is not None:
            return self._read_second(self._second, data)
        data = bytes(self.held) + data
        self.held.clear()
        at = len(data) if self.done else 0
        while at < len(data):
            if self._left:
                step = min(self._left, len(data) - at)
                self._left -= step
                at += step
            elif data[at] == HANDSHAKE and self.listening:
                self.waiting = True
                break
            elif data[at] == HANDSHAKE:
                self._second = HelloReader()
                return data[:at] + self._read_second(self._second, data[at:])
            elif len(data) - at < 5:
                break
            elif data[at] not in _RECORDS or data[at + 1] != 3:
                raise Malformed("something other than TLS behind a ClientHello")
            else:
                self._left = 5 + int.from_bytes(data[at + 3 : at + 5], "big")
        self.held += data[at:]
        return data[:at]

    def answered(self, data: bytes) -> None:
        self._answer += data
        retry = _is_retry(self._answer) if data else False
        if retry is not None:
            self.listening = self.waiting = False
            self.done = not retry

    def _read_second(self, reader: HelloReader, data: bytes) -> bytes:
        self.held += data
        hello = reader.feed(data)
        if hello is None:
            return b""
        self._judge(hello)
        self.done = True  # a server asks once
        passed = bytes(self.held)
        self.held.clear()
        return passed


def _is_retry(data: bytearray) -> bool | None:
    """Whether a server's first handshake message is a HelloRetryRequest; None when more bytes are needed."""
    at = 0
    message = bytearray()
    while len(message) < 38:
        if len(data) - at < 5:
            return None if at < 512 else False
        kind, length = data[at], int.from_bytes(data[at + 3 : at + 5], "big")
        if kind == HANDSHAKE:
            message += data[at + 5 : at + 5 + length]
        elif kind != 21:  # servers may warn first
            return False
        at += 5 + length
    return message[0] == 2 and message[6:38] == _RETRY


class _Http:
    """The requests of an HTTP/1 connection, from the body of the first on."""

    def __init__(self, judge: Judge, first: Request) -> None:
        self.done = self.waiting = False
        self.held = bytearray()
        self._judge = judge
        self._head = Sniffer()
        self._left = 0
        self._expected = ""
        self._line = bytearray()
        self._offer: Request | None = first if first.connect or first.upgrade else None
        self.listening = self._offer is not None
        self._answer = bytearray()
        self._unread = b""
        self._begin(first)

    def pass_on(self) -> HttpState:
        offer = self._offer
        return HttpState(
            waiting=self.waiting, listening=self.listening, held=to_text(self.held), head=self._head.pass_on(),
            left=self._left, expected=self._expected, line=to_text(self._line),
            offer=RequestState(length=offer.length, connect=offer.connect, upgrade=offer.upgrade) if offer else None,
            answer=to_text(self._answer), unread=to_text(self._unread),
        )  # fmt: skip

    @classmethod
    def taken_over(cls, judge: Judge, state: HttpState) -> Self:
        watch = cls(judge, Request())
        watch.waiting, watch.listening = state.waiting, state.listening
        watch._left, watch._expected = state.left, state.expected
        watch.held += to_bytes(state.held)
        watch._head = Sniffer.taken_over(state.head)
        watch._line += to_bytes(state.line)
        offer = state.offer
        watch._offer = Request(offer.length, offer.connect, offer.upgrade) if offer is not None else None
        watch._answer += to_bytes(state.answer)
        watch._unread = to_bytes(state.unread)
        return watch

    def feed(self, data: bytes) -> bytes:
        if 0 < len(data) <= self._left:  # in the middle of a body: nothing is held
            self._left -= len(data)
            return data
        if self._unread:
            data, self._unread = self._unread + data, b""
            self.held.clear()
        if self.done:
            return data
        passed = bytearray()
        at = 0
        while at < len(data):
            if self._left:
                step = min(self._left, len(data) - at)
                self._left -= step
            elif self._expected:
                step = self._framing(data, at)
            elif self._offer is not None:
                self.waiting = True
                self._unread = data[at:]
                self.held += self._unread
                break
            else:
                step = self._request(data[at:])
                if not step:
                    break
                passed += self.held
                self.held.clear()
                at += step
                continue
            passed += data[at : at + step]
            at += step
        return bytes(passed)

    def answered(self, data: bytes) -> None:
        self._answer += data
        offer = self._offer
        status = _status(self._answer) if data else 0
        if status is None or offer is None:
            return
        self._offer = None
        self.listening = self.waiting = False
        self.done = status == 101 or (offer.connect and 200 <= status < 300)
        if status == 101 and any(protocol.startswith("h2") for protocol in offer.upgrade):
            self._judge(Hello("http2"))

    def _request(self, data: bytes) -> int:
        """Read a head, or a part of it, into ``held``; the number of its bytes in ``data``, 0 while it has no end."""
        self.held += data
        hello = self._head.feed(data)
        if hello is None:
            return 0
        if hello.request is None:
            raise Malformed("something other than a request behind one")
        self._judge(hello)
        behind = len(self._head.rest)
        del self.held[len(self.held) - behind :]
        self._head = Sniffer()
        self._begin(hello.request)
        return len(data) - behind

    def _begin(self, request: Request) -> None:
        self._left = max(request.length, 0)
        self._expected = "size" if request.length < 0 else ""

    def _framing(self, data: bytes, at: int) -> int:
        """Read one line between the chunks of a body, or a part of it; its length in ``data``."""
        end = data.find(b"\n", at) + 1 or len(data)
        self._line += data[at:end]
        if len(self._line) > _MAX_LINE:
            raise Malformed("a chunked HTTP body with a line without end")
        if data[end - 1] == 0x0A:
            self._chunk_line(bytes(self._line))
            self._line.clear()
        return end - at

    def _chunk_line(self, line: bytes) -> None:
        if self._expected == "size":
            size = _CHUNK.fullmatch(line)
            if size is None:
                raise Malformed("a chunked HTTP body without a chunk's size")
            self._left = int(size[1], 16)
            self._expected = "end" if self._left else "trailer"
        elif self._expected == "end":
            if line != b"\r\n":
                raise Malformed("a chunk of an HTTP body that does not end with its size")
            self._expected = "size"
        elif line == b"\r\n":
            self._expected = ""
        elif not _TRAILER.fullmatch(line) or line.lower().startswith(b"host:"):
            raise Malformed("something other than a header behind a chunked HTTP body")


def _status(data: bytearray) -> int | None:
    """Status of a server's first final answer, or 101; 0 when it is not HTTP/1, None when more bytes are needed."""
    at = 0
    while True:
        head = bytes(data[at : at + 13])
        if len(head) < 13:
            return None if head.startswith(b"HTTP/1."[: len(head)]) or head.startswith(b"HTTP/1.") else 0
        found = _STATUS.match(head)
        if found is None:
            return 0
        status = int(found[1])
        if not 100 <= status < 200 or status == 101:
            return status
        end = data.find(b"\r\n\r\n", at)
        if end < 0:
            return None if len(data) < _MAX_ANSWER else 0
        at = end + 4
