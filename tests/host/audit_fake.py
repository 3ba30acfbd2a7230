"""Fake audit process: keeps the records that the host sends, and wakes tests that wait for a condition."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from pathlib import Path
from typing import Any

from isolator.audit.record import GAUGES, GENESIS, Incoming, spell
from tests.support.timeouts import seconds


class FakeAudit:
    """Fake of the audit process; ``until`` waits for anything that it or the fake supervisor sees."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.audit_acks = True
        self._audit: socket.socket | None = None
        self._audit_received = 0
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[Any]] = set()

    def listen_to_audit(self, sock: socket.socket) -> None:
        """Read records from ``sock``, and acknowledge them, from now on."""
        self.close_audit()
        sock.setblocking(False)
        self._audit, self._audit_received = sock, 0
        asyncio.get_running_loop().add_reader(sock, self._audit_readable)

    def _audit_readable(self) -> None:
        assert self._audit is not None
        while True:
            try:
                packet = self._audit.recv(1 << 18)
            except BlockingIOError:
                break
            except OSError:
                packet = b""
            if not packet:
                asyncio.get_running_loop().remove_reader(self._audit)
                break
            lines = packet.split(b"\n")
            self._audit_received += len(lines)
            self.records += [json.loads(line) for line in lines if not line.startswith(GAUGES)]
        if self.audit_acks:
            self.acknowledge()
        self.wake()

    def tell_audit(self, message: dict[str, Any]) -> None:
        """Send the host a message of the audit process."""
        assert self._audit is not None
        with contextlib.suppress(OSError):
            self._audit.send(json.dumps(message).encode())

    def close_audit(self) -> None:
        """Close the socket, as if the audit process had ended."""
        if self._audit is not None:
            asyncio.get_running_loop().remove_reader(self._audit)
            self._audit.close()
            self._audit = None

    def acknowledge(self) -> None:
        """Acknowledge all that came, and what comes."""
        self.audit_acks = True
        self.tell_audit({"acked": self._audit_received})

    def write_trail(self, folder: Path) -> None:
        """Write the records that came, as the real one has them on disk."""
        folder.mkdir(parents=True, exist_ok=True)
        lines, prev = [], GENESIS
        for seq, one in enumerate(self.records, 1):
            names = {key: one[key] for key in ("plugin", "run", "event_id", "delivery_id")}
            record = Incoming(one["time"], one["type"], data=one["data"], source="host", number=one["n"], **names)
            line, prev = spell(seq, record, prev)
            lines.append(line)
        (folder / "audit.jsonl").write_bytes(b"".join(lines))

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        """Return the records of one type so far."""
        return [r for r in self.records if r["type"] == kind]

    def wake(self) -> None:
        """Have every ``until`` check its condition."""
        self.keep(self._notify())

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def keep(self, coroutine: Any) -> None:
        """Run a coroutine as a task that is cancelled at the end."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def until(self, condition: Any, timeout: float = 15.0) -> None:
        """Wait until a message to the fake makes ``condition()`` true; ``timeout`` in seconds."""
        async with asyncio.timeout(seconds(timeout)), self._changed:
            await self._changed.wait_for(condition)

    async def poll(self, condition: Any, timeout: float = 15.0) -> None:
        """Wait for a condition of which no message tells, such as a file that a sidecar writes."""
        async with asyncio.timeout(seconds(timeout)):
            while not condition():  # noqa: ASYNC110 # no event tells
                await asyncio.sleep(0.01)
