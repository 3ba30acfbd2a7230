"""The requests of an HTTP/1 connection behind the first head."""

from __future__ import annotations

import re
from typing import Self

from isolator.broker.gate.watch import Judge
from isolator.broker.sniff import Hello, Malformed, Request, Sniffer, SnifferState
from isolator.ipc.body import Body
from isolator.ipc.succession import to_bytes, to_text

_MAX_ANSWER = 16 * 1024
_MAX_LINE = 4096
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-9][0-9][0-9])")
_TRAILER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*\r\n")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[^\r\n]*)?\r\n")


class HttpState(Body):
    """An HTTP/1 connection behind its first head, on its way to another broker."""

    waiting: bool
    listening: bool
    held: str
    head: SnifferState
    left: int
    expected: str
    line: str
    offer: Request | None
    answer: str
    unread: str


class HttpWatch:
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
        return HttpState(
            waiting=self.waiting, listening=self.listening, held=to_text(self.held), head=self._head.pass_on(),
            left=self._left, expected=self._expected, line=to_text(self._line), offer=self._offer,
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
        watch._offer = state.offer
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
