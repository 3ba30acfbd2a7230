"""The records of a TLS connection behind the first ClientHello."""

from __future__ import annotations

from typing import Self

from isolator.broker.gate.watch import Judge
from isolator.broker.sniff import HANDSHAKE, HelloReader, Malformed, ReaderState
from isolator.ipc.body import Body
from isolator.ipc.succession import to_bytes, to_text

_RECORDS = range(20, 25)
_RETRY = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")
"""The random of a ServerHello that is a HelloRetryRequest (RFC 8446, 4.1.3)."""


class TlsState(Body):
    """A connection behind its first ClientHello, on its way to another broker."""

    waiting: bool
    listening: bool
    held: str
    left: int
    answer: str
    second: ReaderState | None


class TlsWatch:
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
