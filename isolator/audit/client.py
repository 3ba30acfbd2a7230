"""Client of the audit process: sends the records of one process to the writer, without waiting for each.

Records are batched into packets (see docs/internals.md, "S → A") on a SOCK_SEQPACKET socket whose other end the
audit process reads. The writer acknowledges by group commit. A sender that is far ahead of the writer should wait
(``durable``). Records beyond ``MAX_PENDING`` are dropped, counted, and reported later as a gap.

Each record carries a number of this client's, so that a writer that is restarted in the middle of a commit recognises
the records that it has written, and none stands twice in the trail; and the CLOCK_MONOTONIC of the moment, by which the
writer finds the event that was in flight (see cause.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from isolator.audit.schema import IDENTIFIERS, MAX_ID, AuditGap, RecordData
from isolator.ipc.packet import MAX_PACKET, receive_anything
from isolator.ipc.succession import Departure, Descriptors, SenderState

MAX_PENDING = 20_000
"""Records kept in memory while the writer is away or slow; beyond that they are lost and counted."""
_RETRY = 0.01
_MANY = 128
"""Records that are sent before the caller's turn of the loop ends: the writer works on them meanwhile."""

AWAY = "the audit process is not there"
"""``blocked`` between two writers."""

_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False, default=str).encode


def _to_json(value: Any) -> bytes:
    return _encode(value).encode()


def _gap_instead(sent: dict[str, Any], why: str) -> bytes:
    """The record that one is missing which cannot be sent."""
    gap = AuditGap(count=1, why=f"{sent['type']}: {why}"[:512])
    # Of the identifiers only as much as the writer keeps: they may be all that was too long.
    names = {key: str(sent[key])[:MAX_ID] for key in IDENTIFIERS if sent[key] is not None}
    return _to_json(sent | names | {"type": gap.TYPE, "data": gap.data})


class Moment(NamedTuple):
    """A moment as records have it."""

    time: str
    """as ``utc_now`` writes it"""
    mono: int
    """CLOCK_MONOTONIC in ns"""


def moment() -> Moment:
    """This moment, for the records of one turn to share."""
    return Moment(utc_now(), time.monotonic_ns())


def utc_now() -> str:
    """The current time in the form of the trail: UTC with microseconds, ``2026-01-02T03:04:05.000006Z``."""
    seconds, rest = divmod(time.time_ns(), 1_000_000_000)
    return f"{utc_second(seconds)}.{rest // 1000:06d}Z"


@lru_cache(maxsize=2)
def utc_second(seconds: int) -> str:
    """A second of Unix time in UTC, ``2026-01-02T03:04:05``; remembered, as many times are of the same."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


class AuditClient:
    """Sends records to the audit process. ``record`` never blocks and never fails."""

    def __init__(self, sock: socket.socket | None, encode: Callable[[Any], bytes] | None = None) -> None:
        """Make a sender; ``encode`` writes a record as compact JSON, in a process that has something faster."""
        self._encode = encode or _to_json
        self.blocked: str | None = AWAY
        """Why the writer cannot write at the moment, else None."""
        self.alarm: str | None = None
        """Why the trail will not last as long as it should, else None; it is written all the same."""
        self.on_blocked: Callable[[str | None], None] = lambda _: None
        """Called with the new value each time ``blocked`` changes."""
        self.on_alarm: Callable[[str | None], None] = lambda _: None
        """Called with the new value each time ``alarm`` changes."""
        self.sent = self.acked = self.lost = 0
        self._loop = asyncio.get_running_loop()
        self.session = os.urandom(4).hex()
        """Part of each record's origin: of this sender, and of those that go on in its place."""
        self.numbered = 0
        """Number of the newest record."""
        self._pending: deque[bytes] = deque()
        self._unacked: deque[bytes] = deque()
        self._answered = 0
        """Records that the present writer has acknowledged on the present socket."""
        self._scheduled = False
        self._waiters: list[asyncio.Future[None]] = []
        self._send_blocked = False
        """The socket was full; the loop calls ``flush`` when it is writable."""
        self._bell = -1
        """A pipe that wakes the writer; -1: it has offered none, and is woken by each packet."""
        self._ringing = False
        self._sock: socket.socket | None = None
        if sock is not None:
            self.reconnect(sock)

    def record(
        self,
        record: RecordData,
        /,
        *,
        plugin: str | None = None,
        run: str | None = None,
        event_id: str | None = None,
        delivery_id: str | None = None,
        urgent: bool = False,
        happened_ns: int | None = None,
        since_ns: int | None = None,
        at: Moment | None = None,
    ) -> None:
        """Queue one record; ``urgent`` hands it to the kernel before returning if there is room (see ``flushed``).

        ``happened_ns`` is the CLOCK_MONOTONIC of the recorded fact, where that was noticeably before this call;
        ``since_ns`` that of the first of several facts which one record sums up. ``at`` is the moment of a record which
        others have, too.
        """
        if len(self._pending) + len(self._unacked) >= MAX_PENDING:
            self.lost += 1
            return
        if self.lost:
            lost, self.lost = self.lost, 0
            self.record(AuditGap(count=lost, why="the sender's buffer was full"))
        self.numbered += 1
        time_, mono = at or moment()
        sent: dict[str, Any] = {
            "time": time_,
            "type": record.TYPE,
            "plugin": plugin,
            "run": run,
            "event_id": event_id,
            "delivery_id": delivery_id,
            "data": record.data,
            "n": f"{self.session}:{self.numbered}",
            "mono": mono if happened_ns is None else happened_ns,
        }
        if since_ns is not None:
            sent["since"] = since_ns
        try:
            line = self._encode(sent)
            if len(line) >= MAX_PACKET:
                line = _gap_instead(sent, f"{len(line)} bytes are too long for a record")
        except (TypeError, ValueError, RecursionError) as error:
            line = _gap_instead(sent, f"cannot be written as JSON ({error})")
        self._pending.append(line)
        if urgent or len(self._pending) % _MANY == 0:
            self.flush()
        elif not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self.flush)

    def gauges(self, **data: Any) -> None:
        """Send present values to the writer's metrics. They are no record and are in no trail."""
        if self.room > 0:
            self._pending.append(_to_json({"gauges": data}))
            self.flush()

    @property
    def unacknowledged(self) -> int:
        """Number of records that are not known to be on disk."""
        return len(self._pending) + len(self._unacked)

    @property
    def room(self) -> int:
        """Number of records that can be taken now; what comes beyond is dropped."""
        return MAX_PENDING - self.unacknowledged

    async def durable(self, *, within: int = 0, or_blocked: bool = False) -> None:
        """Wait until all records so far but the last ``within`` are on disk; ``or_blocked``: or none can be written."""
        wanted = self.acked + self.unacknowledged - within
        await self._until(lambda: self.acked >= wanted or (or_blocked and self.blocked is not None))

    async def passed(self) -> None:
        """Wait until all is on disk that was sent to the writer before, also by the process whose place this one has.

        The writer reads a source's earlier socket to its end first.
        """
        self.gauges()  # no record, and acknowledged as one
        await self.durable()

    def flush(self) -> None:
        """Hand over to the kernel as many records as it has room for."""
        self._scheduled = False
        had = bool(self._pending)
        while self._pending and self._sock is not None:
            packet = self._next_packet()
            try:
                self._sock.send(b"\n".join(packet), socket.MSG_NOSIGNAL)
            except OSError as error:
                self._pending.extendleft(reversed(packet))
                self._send_failed(error)
                return
            self.sent += len(packet)
            self._unacked.extend(packet)
            if self._bell >= 0 and not self._ringing:
                self._ringing = True
                self._loop.call_soon(self._ring)  # behind what is on record now, and is done in this turn
        if self._send_blocked and self._sock is not None:
            self._loop.remove_writer(self._sock)
            self._send_blocked = False
        if had and not self._pending:
            self._wake()

    def _ring(self) -> None:
        """Wake the writer."""
        self._ringing = False
        if self._bell >= 0:
            with contextlib.suppress(OSError):  # full: it is awake; or closed: it has another, or none
                os.write(self._bell, b"\0")

    def _next_packet(self) -> deque[bytes]:
        """Take all records that are pending, or as many as a packet holds."""
        if sum(map(len, self._pending)) + len(self._pending) <= MAX_PACKET:  # a newline behind each but the last
            packet, self._pending = self._pending, deque()
            return packet
        packet, size = deque(), 0
        while self._pending and (not packet or size + len(self._pending[0]) < MAX_PACKET):
            line = self._pending.popleft()
            size += len(line) + 1
            packet.append(line)
        return packet

    async def flushed(self) -> None:
        """Wait until the kernel holds every record so far: the effects of this moment are recorded after them."""
        self.flush()
        await self._until(lambda: not self._pending)

    async def writable(self) -> None:
        """Wait while the trail cannot be written (nothing may start or be dispatched meanwhile)."""
        await self._until(lambda: self.blocked is None)

    def pass_on(self, departure: Departure) -> SenderState:
        """Hand everything to the successor of this process, which goes on in this one's place; sends no more here."""
        self.flush()
        state = self._state(departure.copy(self._sock.fileno()) if self._sock is not None else -1)
        self._pending.clear()
        self.close()
        return state

    def take_over(self, state: SenderState, descriptors: Descriptors) -> None:
        """Go on in the place of another sender: with its socket, and the numbers of its records."""
        self._go_on(state, descriptors.take(state.socket) if state.socket >= 0 else -1)

    def reconnect(self, sock: socket.socket) -> None:
        """Continue with a new writer: what the old one did not acknowledge is sent again under the same numbers."""
        self.close()
        sock.setblocking(False)
        self._sock = sock
        self._answered = 0
        self.alarm = None  # the new writer reports its own, as it does what follows
        if self.blocked is not None:
            self._set_blocked(None)  # the new writer reports it if it cannot write either
            self._wake()
        self.sent -= len(self._unacked)
        self._unacked.extend(self._pending)
        self._pending, self._unacked = self._unacked, deque()
        self._loop.add_reader(sock, self._readable)
        self.flush()

    def close(self) -> None:
        """Stop sending; pending records stay pending for ``reconnect``."""
        if self._sock is not None:
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._sock.close()
            self._sock = None
            self._take_bell(-1)
            self._set_blocked(AWAY)
            self._wake()

    def hand_over(self) -> SenderState:
        """The state of this sender before an exec; what the writer answers from now on is left in the socket."""
        return self._state(self._sock.fileno() if self._sock is not None else -1)

    def adopt(self, before: SenderState) -> None:
        """Go on as the sender that had this state: the same socket, and the numbers from where they are."""
        self._go_on(before, before.socket)

    def _state(self, fd: int) -> SenderState:
        return SenderState(
            socket=fd, session=self.session, number=self.numbered, answered=self._answered,
            unacked=tuple(line.decode() for line in self._unacked),
            pending=tuple(line.decode() for line in self._pending),
            sent=self.sent, acked=self.acked, lost=self.lost, blocked=self.blocked, alarm=self.alarm,
        )  # fmt: skip

    def _go_on(self, before: SenderState, fd: int) -> None:
        self.session, self.numbered, self._answered = before.session, before.number, before.answered
        self._unacked = deque(line.encode() for line in before.unacked)
        self._pending = deque(line.encode() for line in before.pending)
        self.sent, self.acked, self.lost = before.sent, before.acked, before.lost
        self.blocked, self.alarm = before.blocked, before.alarm
        if fd >= 0:
            self._sock = socket.socket(fileno=fd)
            self._sock.setblocking(False)
            self._loop.add_reader(self._sock, self._readable)
            self.flush()

    def _send_failed(self, error: OSError) -> None:
        if self._sock is not None and isinstance(error, BlockingIOError):
            self._loop.add_writer(self._sock, self.flush)
            self._send_blocked = True
        elif error.errno in (errno.ENOBUFS, errno.ENOMEM, errno.EINTR):
            self._loop.call_later(_RETRY, self.flush)
        else:
            self.close()

    def _readable(self) -> None:
        assert self._sock is not None
        try:
            packet, bells = receive_anything(self._sock, 4096)  # one: there is seldom another, and the loop calls again
        except BlockingIOError:
            return
        except OSError:
            packet, bells = b"", []
        for bell in bells:
            self._take_bell(bell)
        if not packet:
            self.close()
            return
        message, changed = json.loads(packet), False
        total = max(self._answered, int(message.get("acked", 0)))
        if "blocked" in message and message["blocked"] != self.blocked:
            self._set_blocked(message["blocked"])
            changed = True
        if "alarm" in message and message["alarm"] != self.alarm:
            self.alarm = message["alarm"]
            self.on_alarm(self.alarm)
        fresh = min(total - self._answered, len(self._unacked))
        for _ in range(fresh):
            self._unacked.popleft()
        self._answered, self.acked = total, self.acked + fresh
        if changed or fresh:
            self._wake()

    def _take_bell(self, bell: int) -> None:
        if self._bell >= 0:
            os.close(self._bell)
        self._bell = bell

    def _set_blocked(self, why: str | None) -> None:
        if why != self.blocked:
            self.blocked = why
            self.on_blocked(why)

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done() and not self._loop.is_closed():
                waiter.set_result(None)

    async def _until(self, done: Callable[[], bool]) -> None:
        while not done():
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._waiters.append(waiter)
            await waiter
