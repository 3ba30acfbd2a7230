"""What the supervisor's double sees: the records that the host sends to the trail, and who waits for something."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import Any

from isolator.audit.record import GAUGES
from tests.support.timeouts import seconds


class Witness:
    """Plays the audit process, and wakes who waits for what has happened."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.audit_acks = True
        self._audit: socket.socket | None = None
        self._audit_received = 0
        self._news = asyncio.Condition()
        self._tasks: set[asyncio.Task[Any]] = set()

    def listen_to_audit(self, sock: socket.socket) -> None:
        """Be the audit process at the other end of ``sock`` from now on."""
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
            self.tell_audit({"acked": self._audit_received})
        self.wake()

    def tell_audit(self, message: dict[str, Any]) -> None:
        """Say something to the host as the audit process would."""
        assert self._audit is not None
        with contextlib.suppress(OSError):
            self._audit.send(json.dumps(message).encode())

    def close_audit(self) -> None:
        """The audit process goes away."""
        if self._audit is not None:
            asyncio.get_running_loop().remove_reader(self._audit)
            self._audit.close()
            self._audit = None

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        """The records of one type so far."""
        return [r for r in self.records if r["type"] == kind]

    def wake(self) -> None:
        """Something has happened."""
        self.keep(self._notify())

    async def _notify(self) -> None:
        async with self._news:
            self._news.notify_all()

    def keep(self, coroutine: Any) -> None:
        """Run it beside everything else."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def until(self, condition: Any, timeout: float = 15.0) -> None:
        """Wait until something the double sees makes ``condition()`` true."""
        async with asyncio.timeout(seconds(timeout)), self._news:
            await self._news.wait_for(condition)

    async def poll(self, condition: Any, timeout: float = 15.0) -> None:
        """Wait for something that nothing here can see coming, such as a file that a sidecar writes."""
        async with asyncio.timeout(seconds(timeout)):
            while not condition():  # noqa: ASYNC110 # no event tells
                await asyncio.sleep(0.01)
