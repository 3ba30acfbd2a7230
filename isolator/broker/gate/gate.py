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

import time
from typing import Self

from isolator.broker.gate.http import HttpState, HttpWatch
from isolator.broker.gate.looking import SMALLEST, Looking
from isolator.broker.gate.tls import TlsState, TlsWatch
from isolator.broker.gate.watch import Judge, Watch
from isolator.broker.guard import Denied
from isolator.broker.sniff import Hello, Malformed, Sniffer, SnifferState
from isolator.ipc.body import Body
from isolator.ipc.succession import to_bytes, to_text
from isolator.policy.denial import DenialRule

FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.032
"""Seconds before more of half a hello is read, once a piece of it was smaller than ``SMALLEST``: after that one, and at
most; each piece doubles it. So one that comes a byte at a time does not wake the broker for each."""


class GateState(Body):
    """A gate that holds something back, on its way to another broker."""

    strict: bool
    passing: bool
    held: str
    sniffer: SnifferState
    tls: TlsState | None
    http: HttpState | None


class Gate:
    """The bytes of one client. ``strict``: none passes before the first hello is judged."""

    def __init__(self, judge: Judge, *, strict: bool, work: Looking | None = None) -> None:
        self._judge, self._strict, self.work = judge, strict, work
        self._sniffer = Sniffer()
        self._held = bytearray()
        self._watch: Watch | None = None
        self.passing = False
        """Whether bytes have passed: the first hello fits, or it is another protocol's so far."""
        self.done = False
        """Whether everything passes from now on."""
        self.pause = 0.0
        """Seconds before more is to be read."""
        self._next_pause = FIRST_PAUSE
        self._cost = 0.0, 0

    def pass_on(self) -> GateState:
        """The state for another broker, of a gate that is not done."""
        watch = self._watch
        return GateState(
            strict=self._strict, passing=self.passing, held=to_text(self._held), sniffer=self._sniffer.pass_on(),
            tls=watch.pass_on() if isinstance(watch, TlsWatch) else None,
            http=watch.pass_on() if isinstance(watch, HttpWatch) else None,
        )  # fmt: skip

    @classmethod
    def taken_over(cls, state: GateState, judge: Judge, work: Looking) -> Self:
        """A gate that goes on where that of another broker has stopped."""
        gate = cls(judge, strict=state.strict, work=work)
        gate.passing = state.passing
        gate._held += to_bytes(state.held)
        gate._sniffer = Sniffer.taken_over(state.sniffer)
        if state.tls is not None:
            gate._watch = TlsWatch.taken_over(judge, state.tls)
        elif state.http is not None:
            gate._watch = HttpWatch.taken_over(judge, state.http)
        return gate

    def opened(self) -> bytes | None:
        """The bytes that waited, once an answer of the server's lets everything pass; None while it does not."""
        return self._behind(self._watch, b"") if self._watch is not None and self._watch.done else None

    @property
    def waiting(self) -> bool:
        """Whether nothing more may pass before the server has answered."""
        return self._watch is not None and self._watch.waiting

    @property
    def incomplete(self) -> bool:
        """Whether bytes of half a hello are held."""
        return bool((self._held if self._watch is None else self._watch.held).strip(b"\r\n\t "))

    def feed(self, data: bytes | memoryview) -> bytes | memoryview:
        """The bytes that may pass now, some of which may have been held before; raises Denied. Then ``charge``."""
        if self.done:
            return data
        began = time.thread_time()
        try:
            return self._first(bytes(data)) if self._watch is None else self._behind(self._watch, bytes(data))
        except Malformed as error:
            raise Denied(DenialRule.MALFORMED, detail=str(error)) from None
        finally:
            self._cost = time.thread_time() - began, len(data)

    def charge(self) -> None:
        """Count what reading the last piece has cost, once what may pass of it has gone."""
        (seconds, size), self._cost = self._cost, (0.0, 0)
        if self.work is not None and seconds:
            self.work.took(seconds, size)
        self.pause = 0.0
        if not self.incomplete:
            self._next_pause = FIRST_PAUSE
        elif 0 < size < SMALLEST or (size and self._next_pause > FIRST_PAUSE):
            self.pause, self._next_pause = self._next_pause, min(LONGEST_PAUSE, 2 * self._next_pause)

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

    def _behind_hello(self, hello: Hello) -> Watch | None:
        """Return the watch over the bytes behind the first hello."""
        if hello.protocol == "http" and hello.request is not None:
            return HttpWatch(self._judge, hello.request)
        # A hello of SSL 2 has no records; a server that takes it speaks no TLS 1.3, and so asks for no second one.
        return TlsWatch(self._judge) if hello.protocol == "tls" and self._sniffer.in_records else None

    def _behind(self, watch: Watch, data: bytes) -> bytes:
        passed = watch.feed(data)
        self.done = watch.done
        return passed
