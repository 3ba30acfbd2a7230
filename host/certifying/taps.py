"""Taps: between the host and a plugin's connection, where the faults of the other side are played.

The host's own half of a connection ends here, and the plugin's begins. In the modes with a connection for each event
the fault is played on one connection, and the event itself goes over another; a stream has only one.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass

from host.authoring.certify.stage import FOUND, Stage
from host.certifying.lasting import Lasting
from host.certifying.single import Single
from host.delivery.runs import Runs
from host.delivery.sidecar import SidecarLink
from isolator.audit.client import AuditClient
from isolator.ipc.fence import Fence
from isolator.ipc.tasks import Tasks

LIMIT = 2 << 20
"""Bytes of a line."""


@dataclass(frozen=True)
class Peer:
    """One side of a tap."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def over(cls, sock: socket.socket) -> Peer:
        """The side of a connected socket."""
        return cls(*await asyncio.open_connection(sock=sock, limit=LIMIT))

    async def send(self, data: bytes) -> None:
        """Send; raises OSError when nobody is there any more."""
        self.writer.write(data)
        await self.writer.drain()

    def deafen(self) -> None:
        """Take nothing more; whoever writes to a Unix socket after that is told so."""
        with contextlib.suppress(OSError):
            self.writer.get_extra_info("socket").shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Close the connection; idempotent."""
        self.writer.close()


class TappedLink(SidecarLink):
    """Link to a sidecar whose connections are tapped."""

    def __init__(self, name: str, runs: Runs, audit: AuditClient, fence: Fence, *, stage: Stage) -> None:
        super().__init__(name, runs, audit, fence)
        self.stage = stage
        self.played = 0
        """Number of the last scene that is played once only."""
        self._uids: dict[int, int] = {}
        self._tasks = Tasks()

    @property
    def connects_at_once(self) -> bool:
        """False: a tap is laid first."""
        return False

    async def connect(
        self, family: socket.AddressFamily = socket.AF_UNIX, *, lasting: bool = False
    ) -> tuple[socket.socket, str]:
        far, run = await super().connect(family, lasting=lasting)
        near, ours = socket.socketpair()
        near.setblocking(False)
        ours.setblocking(False)
        if family == socket.AF_UNIX:
            self._uids[near.fileno()] = super()._served_by(far)
        self._tasks.run(f"tap of {self.name}", self._tap(ours, far, family, run))
        return near, run

    async def again(self, family: socket.AddressFamily) -> Peer:
        """Another connection to the plugin itself; raises IsolatorError or NotSentError."""
        return await Peer.over((await super().connect(family))[0])

    def found(self, run: str, what: str) -> None:
        """Record what is wrong with the plugin."""
        self.record_fault(run, f"{FOUND}{what}")

    def _served_by(self, sock: socket.socket) -> int:
        return self._uids.pop(sock.fileno())

    async def _tap(self, ours: socket.socket, theirs: socket.socket, family: socket.AddressFamily, run: str) -> None:
        near, far = await Peer.over(ours), await Peer.over(theirs)
        kind = Lasting if self.stage.scene().mode == "stream" else Single
        with contextlib.closing(kind(self, near, far, family, run)) as conversation, contextlib.suppress(OSError):
            await conversation.hold()  # until one of the two has gone
