"""Link to one plugin's sidecar: its run, connections to it, the requests it has not answered yet.

The sidecar is started by ``run.ensure`` (the first event does) and reached by ``run.connect``, which gives a connected
socket; a mode that connects for each event does so by itself from then on (``lent_socket``). Before a sidecar is
stopped, for whatever reason, the supervisor asks for a drain: from then on the run is sent nothing more, while it may
still answer.
"""

from __future__ import annotations

import asyncio
import socket

from host.channel.reply import NotSentError
from host.delivery.lent_socket import LentSocketFile
from host.delivery.runs import Runs, connection
from host.fence.fences import NO_LEASE
from host.plugins.registry import Plugin
from isolator.audit.client import AuditClient
from isolator.audit.schema import PluginHealth
from isolator.errors import IsolatorError
from isolator.ipc.body import Body
from isolator.ipc.fence import Fence
from isolator.linux.peer import peer_ids

PAUSED = "it is paused"
"""Why nothing is sent to a plugin that an operator has paused."""
RENEWED = "the host is being renewed"
"""Why nothing is sent by a process that leaves."""


class SidecarState(Body):
    """The link to a sidecar on its way to another host."""

    run: str | None
    reached: str | None
    draining: str | None


class SidecarLink:
    """The sidecar of one plugin, as its worker and its deliveries see it."""

    def __init__(self, name: str, runs: Runs, audit: AuditClient, fence: Fence) -> None:
        self.name, self.fence = name, fence
        self.run: str | None = None
        """The run that is delivered to, if any."""
        self.status = "idle"
        """Present step of delivery, for listings: idle, holding, starting, connecting or in_flight."""
        self.leaving = False
        """No request is begun any more: another process takes this one's place."""
        self.paused = False
        """No event is sent: an operator has paused the plugin."""
        self.connecting = 0
        """Connects that are under way."""
        self._runs, self._audit = runs, audit
        self._socket_file = LentSocketFile(name, runs)
        self._reached: str | None = None
        self._draining: str | None = None
        self._ended: str | None = None
        """The run whose end was heard of last."""
        self._unanswered = self._most = 0
        """Requests that are unanswered, and how many may be, as was last said; 0: that is not known here."""
        self._all_answered = asyncio.Event()
        """Set when the last request was answered, while a drain waits for that."""

    def accepts(self) -> bool:
        """Whether a run is there to which requests may be sent."""
        may_act = not self.leaving and not self.paused and not self.fence.closed
        return self.run is not None and self.run != self._draining and may_act

    @property
    def reached(self) -> bool:
        """Whether the present run has accepted a connection before, so that a new one is a matter of microseconds."""
        return self.run == self._reached

    @property
    def connects_at_once(self) -> bool:
        """Whether a connection to the present run is most likely made without waiting for anybody."""
        return self._socket_file.leads_to(self.run)

    def connect_at_once(self) -> tuple[socket.socket, str] | None:
        """As ``connect``, if that is a matter of microseconds; None if it is not."""
        sock = self._socket_file.connect(self.run)
        return (sock, self.run) if sock is not None and self.run is not None else None

    async def connect(
        self, family: socket.AddressFamily = socket.AF_UNIX, *, lasting: bool = False
    ) -> tuple[socket.socket, str]:
        """Connect to the sidecar, started if need be; returns the non-blocking socket, of ``family``, and the run.

        One that is not ``lasting`` will be followed by others. Raises IsolatorError, NotSentError.
        """
        self._still_here()
        made = self.connect_at_once()
        if made is not None:
            return made
        self.connecting += 1
        try:
            run, fd = await self._connect(family)
        finally:
            self.connecting -= 1
        sock = socket.socket(family, socket.SOCK_STREAM, 0, fd)
        sock.setblocking(False)
        self._reached = run
        if not lasting and family == socket.AF_UNIX:
            self._socket_file.ask(run)
        return sock, run

    async def _connect(self, family: socket.AddressFamily) -> tuple[str, int]:
        self.status = "starting" if self.run is None else "connecting"
        if self.run is None:
            self.run = await self._runs.ensure(self.name)
        run = self.run
        self._still_here()
        try:
            if self.reached and family == socket.AF_UNIX:
                return run, await connection(self._runs.connect_soon(self.name, run))
            return run, await self._runs.connect(self.name, run)
        except IsolatorError:
            # One that leaves keeps it for its successor; there may also be another run by now.
            if not self.leaving and self.run == run:
                self.forget_run()  # it may have ended meanwhile: the next connection ensures one again
            raise

    def forget_run(self) -> None:
        """Deliver to no run."""
        self.run = None
        self._socket_file.drop()

    def run_ended(self, run: str) -> None:
        """Deliver no more to this run."""
        self._ended = run
        if self.run == run:
            self.forget_run()

    def is_over(self, run: str) -> bool:
        """Whether a run to which there is a connection is known to have ended.

        That it is not the present one does not say so. A host which has taken another's place may have a connection to
        a newer run than it has heard of: the other one was told in an answer, and the news wait behind the plugins of
        then.
        """
        return run == self._ended

    def _still_here(self) -> None:
        if self.leaving:  # a connection that is made from now on would be closed without a request
            raise NotSentError(RENEWED)
        if self.fence.closed:
            raise NotSentError(NO_LEASE)

    def check_peer(self, sock: socket.socket, plugin: Plugin, run: str) -> str | None:
        """Return None if the plugin serves the socket; else record who does, and return the record's text.

        A plugin owns its socket's directory and may put a hard link to another's socket there, or pass its name
        on; the kernel names the process that called listen().
        """
        uid = self._served_by(sock)
        if plugin.uid is None or uid == plugin.uid:
            return None
        detail = f"its socket is served by uid {uid} instead of {plugin.uid}; nothing was sent"
        self.record_fault(run, detail)
        return detail

    def _served_by(self, sock: socket.socket) -> int:
        """Uid of the process that serves a connection."""
        return peer_ids(sock)[1]

    def record_fault(self, run: str, detail: str) -> None:
        """Record a fault of the plugin in the trail."""
        self._audit.record(PluginHealth(ok=False, detail=detail), plugin=self.name, run=run)

    def begin_request(self, run: str, most: int = 0) -> None:
        """Count a request until ``end_request``; raises NotSentError when the run is being stopped.

        ``most``: how many may be unanswered (``room``); 0: who sends the next waits for that by itself.
        """
        if run == self._draining:
            raise NotSentError("the plugin is being stopped")
        self._still_here()
        if self.paused:
            raise NotSentError(PAUSED)
        self._unanswered += 1
        self._most = most

    def room(self) -> float:
        """Share of what may be unanswered that is free; without any another has to wait for the end of one."""
        return 1 - self._unanswered / self._most if self._most else 1.0

    def take_request(self, most: int = 0) -> None:
        """Count a request that another host has sent, until ``end_request``; ``most`` as in ``begin_request``."""
        self._unanswered += 1
        self._most = most

    def pass_on(self) -> SidecarState:
        """The state of the link for the successor of this process."""
        return SidecarState(run=self.run, reached=self._reached, draining=self._draining)

    def take_over(self, state: SidecarState) -> None:
        """Go on with the link of another host."""
        self.run, self._reached, self._draining = state.run, state.reached, state.draining

    def end_request(self) -> None:
        """Count a request as answered, or as never to be answered."""
        self._unanswered -= 1
        if not self._unanswered:
            self._all_answered.set()

    async def drain(self) -> None:
        """Begin no further request to the present run; returns once none is unanswered."""
        self._draining = self.run
        while self._unanswered:
            self._all_answered.clear()
            await self._all_answered.wait()
