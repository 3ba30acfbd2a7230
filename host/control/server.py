"""The control socket: newline JSON-RPC for the platform and the command line.

The kernel names the caller's uid, and ``host.toml`` gives a uid its role. ``viewer`` reads,
``emitter`` also emits and follows events, ``operator`` does everything; a role includes those before it. ``caller`` is
apart from them: it uses tools of MCP servers, and nothing else. A caller without a role gets one line that says so.

Requests of one connection run concurrently and may be answered in any order; at most ``IN_FLIGHT`` of them, then the
connection is not read until one is answered. Verbs that change something are in the trail, and so is every refusal;
emitting is recorded by the event itself.
"""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from host.control.connection import Connection, ConnectionState, refusal
from host.control.endpoints import AnyEndpoint, Caller
from host.queue.owed import Debts
from host.wire.lines import Acceptor
from isolator.base.pacing import TokenBucket
from isolator.ipc.body import Body, Json
from isolator.ipc.succession import Departure, Descriptors
from isolator.linux.peer import peer_ids

CONNECTIONS = 512
"""Connections of root and of uids with a role."""
KEPT_FOR_ROOT, SHARE = 32, 384
"""Places that only root can take, and the most that one uid can take beside root."""
BACKLOG = 1024
"""Callers that may wait to be accepted (listen(2): at most net.core.somaxconn); the next one that does not block gets
EAGAIN, and most runtimes do not block."""
STRANGERS, STRANGER_SHARE = 64, 8
"""Connections of uids without a role, beside those: of all and of one."""
FLOOD, FLOOD_BURST, SHUT_AGAIN = 200.0, 1000.0, 10.0
"""Connections of strangers that are refused in a second, and at once, before the kernel is to refuse them for a while;
seconds before that is asked for again."""
STRANGER_CONNECTS, STRANGER_BYTES = 20.0, 4096.0
"""Connections and bytes that all uids without a role have in a second: they get nothing but refusals. At once they have
as many connections as may be open, and four seconds' bytes."""


class ControlState(Body):
    """The control socket on its way to another host."""

    listener: int
    connections: tuple[ConnectionState, ...]


class ControlServer:
    """Server of the control socket.

    ``role_of``: uid → role, or None for a stranger. ``record`` takes ``ControlCalled`` records, and ``debts`` owes
    those of calls that change something. ``restore``: by verb, the function that takes over a belonging of a caller
    from the host whose place this one takes. ``console``: uid of the console. ``may_call``: whether a uid has the role
    ``caller``, which one may have besides another. ``shut_out``: called with the uid of a stranger when such connect
    without end.
    """

    def __init__(
        self,
        endpoints: Iterable[AnyEndpoint],
        role_of: Callable[[int], str | None],
        record: Callable[..., None],
        restore: Mapping[str, Callable[[Caller, Json], None]] | None = None,
        debts: Debts | None = None,
        console: int | None = None,
        may_call: Callable[[int], bool] = lambda _: False,
        shut_out: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._restore = restore or {}
        self._taken_over: list[Connection] = []
        self._listener: socket.socket | None = None
        """The listener that was taken over, until ``begin``."""
        self.console = console
        self.leaving = False
        """No request is begun any more: another process takes this one's place."""
        self._endpoints = {endpoint.request.spec.verb: endpoint for endpoint in endpoints}
        self.role_of, self.may_call = role_of, may_call
        self.record, self.debts = record, debts
        self._acceptor: Acceptor | None = None
        self._connections: set[Connection] = set()
        self._of_uid: Counter[int] = Counter()
        """Connections by uid."""
        self._strangers = 0
        self._stranger_connects = TokenBucket(STRANGER_CONNECTS, STRANGERS)
        self._refusals, self._shut_out, self._shut_at = TokenBucket(FLOOD, FLOOD_BURST), shut_out, -math.inf
        self.stranger_bytes = TokenBucket(STRANGER_BYTES, 4 * STRANGER_BYTES)

    async def start(self, listener: socket.socket) -> None:
        """Accept on ``listener``, a listening Unix socket that the supervisor made, from now on."""
        listener.listen(BACKLOG)
        self._acceptor = Acceptor(listener, lambda: Connection(self), refuse=_refuse, admit=self._admits)

    def _admits(self, connection: socket.socket) -> bool:
        """Decide whether a connection is served; strangers who come too fast get one line, at little cost."""
        uid = peer_ids(connection)[1]
        if self.role_of(uid) is not None or self._stranger_connects.try_take():
            return True
        with contextlib.suppress(OSError):
            connection.send(_TOO_FAST)
        if not self._refusals.try_take() and (now := time.monotonic()) >= self._shut_at + SHUT_AGAIN:
            self._shut_at = now
            self._shut_out(uid)
        return False

    def endpoint(self, verb: Any) -> AnyEndpoint | None:
        """The endpoint of a verb, or None when there is no such verb."""
        return self._endpoints.get(verb) if isinstance(verb, str) else None

    def opened(self, connection: Connection, caller: Caller) -> str | None:
        """Count a connection; returns why it is one too many, or None."""
        why = self._too_many(caller)
        if why is None:
            self._connections.add(connection)
            self._of_uid[caller.uid] += 1
            self._strangers += caller.role is None
        return why

    def _too_many(self, caller: Caller) -> str | None:
        known = len(self._connections) - self._strangers
        mine = self._of_uid[caller.uid]
        share = STRANGER_SHARE if caller.role is None else SHARE if caller.uid != 0 else CONNECTIONS
        if mine >= share:
            return f"{mine} connections of uid {caller.uid} are open, more are not served"
        if caller.role is None:
            return f"{STRANGERS} connections without a role are open" if self._strangers >= STRANGERS else None
        most = CONNECTIONS if caller.uid == 0 else CONNECTIONS - KEPT_FOR_ROOT
        return f"{known} connections are open, more are not served" if known >= most else None

    def closed(self, connection: Connection, caller: Caller) -> None:
        """Stop counting a closed connection."""
        if connection in self._connections:
            self._connections.discard(connection)
            self._of_uid[caller.uid] -= 1
            if not self._of_uid[caller.uid]:
                del self._of_uid[caller.uid]
            self._strangers -= caller.role is None

    # --- one host in the place of another ------------------------------------------------------------------------

    @property
    def changes(self) -> bool:
        """Whether a request is open that could not be made again."""
        return any(connection.changes for connection in self._connections)

    async def hold(self) -> socket.socket | None:
        """Accept no connection and read no request from now on; returns the listener, in whose backlog callers wait."""
        listener, self.leaving = None, True
        if self._acceptor is not None:
            listener = self._acceptor.release()
            await self._acceptor.accepted_all()
        for connection in self._connections:
            connection.hold("leaving")
        return listener

    def drop_debts(self) -> None:
        """Owe no record of what ``pass_on`` has begun anew; the database, which is closed by then, is open still."""
        if self.debts is not None:
            self.debts.drop([one for connection in self._connections for one in connection.begun_anew])

    def pass_on(self, listener: socket.socket, departure: Departure) -> ControlState:
        """Hand the listener and every connection to the successor of this process; the answers are written before."""
        connections = [connection.pass_on_all(departure) for connection in list(self._connections)]
        return ControlState(
            listener=departure.add(listener.detach()), connections=tuple(c for c in connections if c is not None)
        )

    async def take_over(self, state: ControlState, descriptors: Descriptors) -> None:
        """Take the connections of another host; nothing is read or accepted before ``begin``."""
        for one in state.connections:
            connection = Connection(self)
            with contextlib.suppress(OSError):
                await connection.take_over(one.line, descriptors)
                connection.restore(one.belongings, self._restore)
                self._taken_over.append(connection)
        self._listener = socket.socket(fileno=descriptors.take(state.listener))

    async def begin(self) -> None:
        """Go on with the connections that were taken over, then accept."""
        taken_over, self._taken_over = self._taken_over, []
        for connection in taken_over:
            connection.begin()
        if self._listener is not None:
            listener, self._listener = self._listener, None
            await self.start(listener)

    async def close(self) -> None:
        """Stop accepting and close every connection."""
        if self._acceptor is not None:
            self._acceptor.close()
        for connection in list(self._connections):
            connection.end()


_TOO_FAST = refusal("connections without a role are open, and come, in great number", "try again")


def _refuse(connection: socket.socket) -> None:
    """Tell a caller for whom there is no descriptor."""
    with contextlib.suppress(OSError):
        connection.send(refusal("the daemon has no descriptor left", "try again; raise LimitNOFILE"))
