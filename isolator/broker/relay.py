"""Carry bytes between a cage's connection and the outside's, both directions, with half-close.

Callbacks on the event loop rather than streams: one read buffer serves every flow, and a direction keeps bytes of its
own only while its sink is full, at most one read's worth; its source then waits, and TCP makes the sender wait.
However many flows a cage has, they hold up those of other cages no longer than one would (``Turns``).

A flow to a name has a ``Gate`` between client and server until everything may pass; then its bytes are not looked at.
While looking has cost the cage too much, such a flow is not read.

Each byte passes the plugin's ``Fence`` as it is sent, in either direction, and so does the end of a stream: past the
deadline they wait here, and go on once it is moved.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from time import thread_time

from isolator.broker.gate.gate import Gate, GateState
from isolator.broker.guard import Denied
from isolator.broker.turns import Turns
from isolator.ipc.body import Body
from isolator.ipc.fence import Fence
from isolator.ipc.succession import to_bytes, to_text
from isolator.policy.denial import DenialRule

CHUNK = 512 * 1024
SMALL = 32 * 1024
SHARE, BUDGET = 4 * 1024 * 1024, 32 * 1024 * 1024
"""Bytes that the flows of one cage, and all together, may hold for what waits; beyond it they read in small pieces."""
_LINGER_RESET = struct.pack("ii", 1, 0)
_ROUNDS = 4
_TUNED = (
    (socket.TCP_NODELAY, 1), (socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4),
)  # fmt: skip


def reset(sock: socket.socket) -> None:
    """Close a connection so that its peer sees a reset at once, not an orderly end."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
    sock.close()


def tune(sock: socket.socket) -> None:
    """Send every piece at once, and notice within two minutes that the other end of a quiet connection is gone.

    Connections that a listener accepts have what was set for it (tcp(7)).
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _TUNED:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


class Scratch:
    """Read buffer of all flows of one event loop, and the number of bytes that they hold for what waits."""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(CHUNK))
        self.waiting = 0


class PipeState(Body):
    """One direction of a connection on its way to another broker."""

    total: int
    touched: float
    rest: str
    """bytes that were read and not sent"""
    ended: bool
    gate: GateState | None
    answers: bool
    """the gate of the other direction wants to know of its bytes"""


class Pipe:
    """One direction. ``on_end`` is called once it has ended: its source's end was passed on, or it broke off.

    ``failure`` then says why: an OSError, or the refusal of something that the client sent. ``gate`` holds back what
    has to be looked at.
    """

    def __init__(
        self, source: socket.socket, sink: socket.socket, scratch: Scratch, fence: Fence, turns: Turns
    ) -> None:
        self.total = 0
        self.touched = 0.0
        self.failure: OSError | Denied | None = None
        self.ended = False
        self.on_end: Callable[[], None] = _nothing
        self.back: Pipe | None = None
        """The other direction."""
        self.gate: Gate | None = None
        self._answers: Pipe | None = None
        self._source, self._sink, self._scratch, self._fence, self._turns = source, sink, scratch, fence, turns
        # For the loop, which formats a socket that it does not know into an exception: two system calls each time.
        self._in, self._out = source.fileno(), sink.fileno()
        self._loop = asyncio.get_running_loop()
        self._rest = memoryview(b"")
        self._held = 0
        self._reading = False
        self._queued = self._streams = False
        self._heard = -1

    def carry(self, first: bytes = b"") -> None:
        """Send ``first``, bytes of the source that were read before, or a piece of what is there; then ``start``."""
        self.touched, self._reading = self._loop.time(), True
        if not first:
            if not self._turns.over:
                self._read_some(0.0)
        elif self._send(memoryview(first)) and self.gate is not None:
            self._look(b"")

    def start(self) -> None:
        """Have the loop tell of bytes, unless something else is waited for by now."""
        if not self.touched:
            self.touched, self._reading = self._loop.time(), True
        if self._reading:
            self._loop.add_reader(self._in, self._readable)

    def guard(self, gate: Gate, back: Pipe) -> None:
        """Let pass what ``gate`` lets pass; ``back``, the other direction, tells it of the server's answers."""
        if not gate.done:
            self.gate, back._answers = gate, self

    def stop(self) -> None:
        """Take the pipe off the loop; bytes that still wait are dropped. ``on_end`` is not called."""
        self.ended = True
        self.on_end, self.back, self.gate, self._answers = _nothing, None, None, None  # all lead back here
        self._read(False)
        if self._rest:
            self._loop.remove_writer(self._out)
            self._keep(memoryview(b""))

    def pass_on(self) -> PipeState:
        """Take the pipe off the loop, and return its state for another broker."""
        rest, gate = bytes(self._rest), self.gate
        if gate is not None and (waited := gate.opened()) is not None:  # and no byte of the client's has come since
            rest, gate = rest + waited, None
        state = PipeState(
            total=self.total,
            touched=self.touched,
            rest=to_text(rest),
            ended=self.ended,
            gate=gate.pass_on() if gate is not None else None,
            answers=self._answers is not None,
        )
        self.stop()
        return state

    def take_over(self, state: PipeState, back: Pipe, gate: Gate | None) -> None:
        """Go on where the pipe of another broker has stopped; ``back``: the other direction."""
        self.total, self.touched, self.gate = state.total, state.touched, gate
        if state.answers:
            self._answers = back
        if state.ended:
            self.ended = True
        elif state.rest:
            self._keep(memoryview(to_bytes(state.rest)))
            self._loop.add_writer(self._out, self._writable)
        elif gate is None:
            self._read(True)
        elif not gate.waiting:
            self._loop.call_soon(self._go_on)  # with what waited for an answer that has just come

    def end_incomplete(self, before: float) -> None:
        """End the pipe if its gate has held half of something since ``before``, on the event loop's clock."""
        gate = self.gate
        if gate is not None and gate.incomplete and not gate.waiting and self.touched < before:
            self._end(Denied(DenialRule.INCOMPLETE))

    def _readable(self) -> None:
        if self._turns.over:
            self._read(False)
            self._turns.wait(self._in_turn)
            self._queued = True
            if self.back is not None and self.back._queued:
                self._streams = self.back._streams = True
        else:
            self._take_turn()

    def _in_turn(self) -> None:
        """Go on, unless it has by now, or waits for something else."""
        self._queued = False
        waits = self.gate is not None and self.gate.waiting
        if not (self._reading or self._rest or self.ended or waits):
            self._read(True)
            self._take_turn()

    def _take_turn(self) -> None:
        began, before, self.touched = thread_time(), self.total, self._loop.time()
        try:
            self._read_some(began + self._turns.part)
        finally:
            size, streams = self.total + len(self._rest) - before, self._streams
            if self.back is not None:  # nothing has come back since the piece before: it is no question and answer
                streams = streams or self.back.total == self._heard
                self._heard = self.back.total
            self._streams = False
            self._turns.took_piece(thread_time() - began, size, streams=streams)

    def _read_some(self, end: float) -> None:
        """Pass on what is there to read, a piece at least, until this thread's CPU time is ``end``."""
        buffer = self._scratch.buffer
        size = CHUNK if self._turns.held < SHARE and self._scratch.waiting < BUDGET else SMALL
        for _ in range(_ROUNDS if self.gate is None else 1):
            work = self.gate.work if self.gate is not None else None
            if work is not None:
                if work.spent:
                    self._read(False)
                    return work.turn(self._go_on)
                if work.over:
                    return None  # what there is to read is there in the next turn, too
                size = work.piece
            try:
                count = self._source.recv_into(buffer, size)
            except BlockingIOError:
                return None
            except OSError as error:
                return self._end(error)
            if not count:
                return self._finish()
            if self.gate is not None or self._answers is not None:
                if not self._look(buffer[:count]):
                    return None
            elif not self._send(buffer[:count]):
                return None
            if count < size // 2 or thread_time() >= end:
                return None
        return None

    def _look(self, data: memoryview | bytes) -> bool:
        """Pass on what the gate lets pass, and tell it of the server's bytes; False when reading must not go on."""
        passing, gate = data, self.gate
        try:
            if gate is not None:
                passing = gate.feed(data)
                if gate.done:
                    self.gate = None
            elif self._answers is not None:
                self._answered(self._answers, data)
            goes_on = not passing or self._send(memoryview(passing))
        except Denied as denied:
            self._end(denied)
            return False
        finally:
            if gate is not None:
                gate.charge()
        return goes_on and not self._waits()

    def _answered(self, pipe: Pipe, data: memoryview | bytes) -> None:
        if pipe.gate is None or not pipe.gate.answered(data):
            self._answers = None
        if not pipe._reading and not pipe._rest and not pipe.ended:
            asyncio.get_running_loop().call_soon(pipe._go_on)

    def _waits(self) -> bool:
        if self.gate is None or not (self.gate.waiting or self.gate.pause):
            return False
        self._read(False)
        if not self.gate.waiting:
            self._loop.call_later(self.gate.pause, self._turns.wait, self._in_turn)
        return True

    def _go_on(self) -> None:
        """Read on, after what waited for the server's answer."""
        if not self._rest and not self.ended and (self.gate is None or self._look(b"")):
            self._read(True)

    def _send(self, data: memoryview) -> bool:
        """Pass ``data`` on; False when the sink took only part of it, or none may be sent, and the source now waits."""
        if self._fence.until is not None and self._fence.closed:
            self._wait(bytes(data))
            return False
        try:
            sent = self._sink.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._end(error)
            return False
        self.total += sent
        if sent == len(data):
            return True
        self._wait(bytes(data[sent:]))  # a copy: the scratch buffer is the next flow's in a moment
        return False

    def _wait(self, rest: bytes) -> None:
        """Keep what could not be sent, and read nothing before it is."""
        self._keep(memoryview(rest))
        self._read(False)
        if self._fence.closed:
            self._fence.stall(self._thawed)
        else:
            self._loop.add_writer(self._out, self._writable)

    def _thawed(self) -> None:
        """Send what was kept past the deadline."""
        if self._rest:
            self._loop.add_writer(self._out, self._writable)

    def _writable(self) -> None:
        if self._turns.over:
            self._loop.remove_writer(self._out)
            self._turns.wait(self._send_in_turn)
        else:
            self._send_rest()

    def _send_in_turn(self) -> None:
        if self._rest:
            self._loop.add_writer(self._out, self._writable)
            self._send_rest()

    def _send_rest(self) -> None:
        if self._fence.closed:
            self._loop.remove_writer(self._out)
            self._fence.stall(self._thawed)
            return
        began, self.touched = thread_time(), self._loop.time()
        try:
            sent = self._sink.send(self._rest)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(error)
            return
        self._turns.took_piece(thread_time() - began, sent)
        self.total += sent
        self._keep(self._rest[sent:])
        if not self._rest:
            self._loop.remove_writer(self._out)
            self._go_on()

    def _keep(self, rest: memoryview) -> None:
        """Note what waits to be sent: to its last byte it holds the whole piece in memory that it is a part of."""
        whole = rest.obj if rest else b""
        assert isinstance(whole, bytes)
        self._scratch.waiting += len(whole) - self._held
        self._turns.held += len(whole) - self._held
        self._rest, self._held = rest if rest else memoryview(b""), len(whole)

    def _read(self, wanted: bool) -> None:
        if wanted != self._reading:
            self._reading = wanted
            if wanted:
                self._loop.add_reader(self._in, self._readable)
            else:
                self._loop.remove_reader(self._in)

    def _finish(self) -> None:
        if self._fence.closed:  # an end may mean as much as bytes; it is there to be read again
            self._read(False)
            return self._fence.stall(self._go_on)
        if self.gate is not None and self.gate.incomplete:
            return self._end(Denied(DenialRule.INCOMPLETE))
        if self._answers is not None:
            self._look(b"")
        with contextlib.suppress(OSError):
            self._sink.shutdown(socket.SHUT_WR)
        self._end()

    def _end(self, failure: OSError | Denied | None = None) -> None:
        if not self.ended:
            self.failure, on_end = failure, self.on_end
            self.stop()
            on_end()


def _nothing() -> None:
    pass
