"""The audit process, connected to everyone who records: supervisor, broker, host.

Each sender has a source socket of its own. When the audit process is started again every sender gets a new one; when a
sender is, the records that its predecessor had not handed over are a gap in the trail.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from isolator.audit.client import AuditClient
from isolator.audit.schema import AuditGap
from isolator.ipc.channel import Channel, pair
from isolator.ipc.messages import AuditHello, AuditReady, NewAuditSocket, RecordSource, ServeMetrics
from isolator.paths import Paths
from isolator.policy.host import HostConfig
from isolator.supervisor.kept import check_trail
from isolator.supervisor.listener import listen
from isolator.supervisor.service import ChildProcess

if TYPE_CHECKING:
    from isolator.ipc.handover import AuditState


class AuditLink:
    """The audit process. ``client`` is the supervisor's own sender, ``senders`` the other processes that record."""

    def __init__(
        self, process: ChildProcess, client: AuditClient, senders: Sequence[ChildProcess], paths: Paths,
        config: HostConfig,
    ) -> None:  # fmt: skip
        self.process = process
        self.found = AuditReady(blocked=None, ended=True, runs={})
        """State of the trail at the first start."""
        self._client, self._senders, self._paths, self._config = client, senders, paths, config
        self._ends: dict[str, socket.socket] = {}
        self._made_for: dict[str, int] = {}
        """By source: the start of the audit process for which its socket was made; 0: there was none to take it."""
        self._introduced = 0
        """The last start of the audit process that has answered its hello: before, it takes no sources."""

    async def introduce(self, channel: Channel) -> None:
        """Say hello to a new audit process, and give every sender a socket to it."""
        check_trail(self._paths)
        hello = AuditHello(root=str(self._paths.root), config=self._config.model_dump(mode="json"))
        found = await self.process.first_answer(channel.ask(hello))
        self._introduced = self.process.starts
        self._client.reconnect(socket.socket(fileno=self.source_end("supervisor")))
        with listen(self._paths.metrics_socket, mode=0o600, owner=0, backlog=16) as metrics:
            channel.tell(ServeMetrics(), fds=[metrics.fileno()])
        for sender in self._senders:
            # One that is not up yet may be waiting for the trail, and so for this.
            if sender.channel is not None and not sender.channel.closed.is_set():
                self._renew(sender)
        if self.process.starts > 1:
            why = "the audit process ended and was started again; what it had counted and not summed up is lost"
            self._client.record(AuditGap(count=0, why=why))
        else:
            self.found = found

    async def succeed(self, channel: Channel, parts: int) -> None:
        """Say hello to an audit process that takes the place of another, with the sockets of that one."""
        hello = AuditHello(root=str(self._paths.root), config=self._config.model_dump(mode="json"), parts=parts)
        await channel.ask(hello)

    def source_end(self, source: str) -> int:
        """A descriptor of the sending end of a new source socket; the other end goes to the audit process."""
        mine, theirs = pair()
        old = self._ends.pop(source, None)
        if old is not None:
            old.close()
        self._ends[source] = mine
        present = self._introduced == self.process.starts
        self._made_for[source] = self.process.starts if present else 0
        with theirs:
            if present:
                self.process.tell(RecordSource(name=source), fds=[theirs.fileno()])
        return os.dup(mine.fileno())

    def note_restart(self, sender: ChildProcess) -> None:
        """Record the gap of a sender that came back: nobody knows how many records its predecessor had not sent."""
        if sender.starts > 1:
            why = f"the {sender.spec.name} process ended ({sender.ended}); what it had not handed over is lost"
            self._client.record(AuditGap(count=None, why=why, source=sender.spec.name))

    def catch_up(self, sender: ChildProcess) -> None:
        """Connect a sender for which no socket was made when the audit process was started again.

        Nothing may be awaited after this: ``up`` is set next, and from then on ``introduce`` takes care of it.
        """
        if self.process.up.is_set() and self.process.starts != self._made_for[sender.spec.name]:
            self._renew(sender)

    def hand_over(self) -> AuditState:
        """The state of these links before an exec."""
        from isolator.ipc.handover import AuditState

        sources = {name: end.fileno() for name, end in self._ends.items()}
        return AuditState(client=self._client.hand_over(), sources=sources, made_for=self._made_for)

    def adopt(self, before: AuditState) -> None:
        """Go on with the links from before this process's exec."""
        self._ends = {name: socket.socket(fileno=fd) for name, fd in before.sources.items()}
        self._made_for = dict(before.made_for)
        self._introduced = self.process.starts  # nothing is handed over before it has answered
        self._client.adopt(before.client)

    def _renew(self, sender: ChildProcess) -> None:
        assert sender.channel is not None
        fd = self.source_end(sender.spec.name)
        sender.tell(NewAuditSocket(), fds=[fd])  # while another takes its place, to that one
        os.close(fd)
