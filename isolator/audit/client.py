"""How every process hands its records to the one writer, without waiting per record.

Records are batched into packets (see docs/internals.md, "S → A") on a SOCK_SEQPACKET socket whose other end the
audit process reads. The writer acknowledges by group commit. A sender that is far ahead of the writer is
expected to wait (``settled``); what cannot be handed over at all is counted and reported later as a gap.
"""

from __future__ import annotations

import asyncio
import json
import socket
from datetime import UTC, datetime
from typing import Any

from isolator.ipc import MAX_PACKET

MAX_PENDING = 20_000
"""Records kept in memory while the writer is away or slow; beyond that they are lost and counted."""


def utc_now() -> str:
    """The current time as the trail spells it: UTC with microseconds, ``2026-01-02T03:04:05.000006Z``."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class AuditClient:
    """Sends records to the audit process. ``record`` never blocks and never fails."""

    def __init__(self, sock: socket.socket | None) -> None:
        self.blocked: str | None = None
        """Why the writer cannot write at the moment, else None."""
        self.sent = self.acked = self.lost = 0
        self._loop = asyncio.get_running_loop()
        self._pending: list[bytes] = []
        self._unacked: list[bytes] = []
        self._scheduled = False
        self._progress = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sock: socket.socket | None = None
        if sock is not None:
            self.replace(sock)

    def record(
        self,
        type: str,
        /,
        *,
        plugin: str | None = None,
        run: str | None = None,
        event_id: str | None = None,
        delivery_id: str | None = None,
        urgent: bool = False,
        **data: Any,
    ) -> None:
        """Queue one record; ``urgent`` hands it to the kernel before returning (needed where order is a cause)."""
        if len(self._pending) + len(self._unacked) >= MAX_PENDING:
            self.lost += 1
            return
        if self.lost:
            lost, self.lost = self.lost, 0
            self.record("audit.gap", count=lost, why="the sender's buffer was full")
        self._pending.append(
            json.dumps(
                {
                    "time": utc_now(),
                    "type": type,
                    "plugin": plugin,
                    "run": run,
                    "event_id": event_id,
                    "delivery_id": delivery_id,
                    "data": data,
                },
                separators=(",", ":"),
            ).encode()
        )
        if urgent:
            self._flush()
        elif not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    async def settled(self, *, within: int = 0) -> None:
        """Wait until at most ``within`` records are not yet durably written."""
        async with self._progress:
            await self._progress.wait_for(lambda: len(self._pending) + len(self._unacked) <= within)

    async def writable(self) -> None:
        """Wait while the trail cannot be written (nothing may start or be dispatched meanwhile)."""
        async with self._progress:
            await self._progress.wait_for(lambda: self.blocked is None)

    def replace(self, sock: socket.socket) -> None:
        """Go on with a new writer: what the old one did not acknowledge is sent again, marked as such by its time."""
        self.close()
        sock.setblocking(False)
        self._sock = sock
        self._pending = self._unacked + self._pending
        self._unacked = []
        self._loop.add_reader(sock, self._readable)
        self._flush()

    def close(self) -> None:
        """Stop sending; what is pending stays pending for ``replace``."""
        if self._sock is not None:
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._sock.close()
            self._sock = None

    def _flush(self) -> None:
        self._scheduled = False
        while self._pending and self._sock is not None:
            size, count = 0, 0
            for line in self._pending:
                size += len(line) + 1
                if count and size > MAX_PACKET:
                    break
                count += 1
            try:
                self._sock.send(b"\n".join(self._pending[:count]), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._loop.add_writer(self._sock, self._flush)
                return
            except OSError:
                self.close()
                return
            self.sent += count
            self._unacked += self._pending[:count]
            del self._pending[:count]
        if self._sock is not None:
            self._loop.remove_writer(self._sock)

    def _readable(self) -> None:
        acked = 0
        while self._sock is not None:
            try:
                packet = self._sock.recv(4096)
            except BlockingIOError:
                break
            except OSError:
                packet = b""
            if not packet:
                self.close()
                break
            message = json.loads(packet)
            acked = max(acked, int(message.get("acked", 0)))
            if "blocked" in message:
                self.blocked = message["blocked"]
        self._acknowledge(acked)

    def _acknowledge(self, total: int) -> None:
        if total > self.acked:
            del self._unacked[: total - self.acked]
            self.acked = total
        task = self._loop.create_task(self._notify())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _notify(self) -> None:
        async with self._progress:
            self._progress.notify_all()
