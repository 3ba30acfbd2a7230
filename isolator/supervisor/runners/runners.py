"""The socket for ``isolator run`` of users with the role ``runner``, and the runs that go on.

One connection is one run. The kernel names the caller; nobody else than the runners can connect. What comes is one
packet (``ipc/run_request.py``), bounded, and descriptors, which this process passes on and never reads, asks about or
closes by itself: each of that may take as long as a stranger likes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from isolator.errors import DeniedError, IsolatorError, UsageError
from isolator.ipc.accept_loop import AcceptLoop
from isolator.ipc.messages import Origin
from isolator.ipc.packet import receive_anything
from isolator.ipc.run_request import MAX_BYTES, error_fields, read_request
from isolator.linux.peer import allow_only, peer_groups, peer_ids
from isolator.linux.readable import readable
from isolator.pacing import TokenBucket
from isolator.registration.collecting import MOST_GROUPS
from isolator.supervisor.listener import listen
from isolator.supervisor.runners.apart import Closers
from isolator.supervisor.runners.run import STREAMS, RunnerRun, answer
from isolator.supervisor.runners.shares import Place, Shares

if TYPE_CHECKING:
    from isolator.policy.host import HostConfig
    from isolator.supervisor.run import RunContext

logger = logging.getLogger(__name__)

_BACKLOG = 128
_CONNECTIONS = 100.0
"""Connections a second that are accepted, of all runners; the others wait in the backlog."""
_STARTS, _BURST = 10.0, 40.0
"""Runs a second of one user, and how many at once; further ones begin later."""
_REQUEST_SECONDS = 10.0
_CLOSE_SECONDS = 1.0
"""For descriptors of a run to be closed before its caller is told the end."""
_STOP_SECONDS = 5.0


class Runners:
    """The runs of all runners. Nothing listens before ``start``."""

    def __init__(self, context: RunContext, config: HostConfig) -> None:
        self._context, self._config = context, config
        self._shares = Shares(config.runner)
        self._closers = Closers()
        self._reading = asyncio.Semaphore(1)
        self._paces: dict[int, TokenBucket] = {}
        self._runs: set[RunnerRun] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._silent: set[asyncio.Task[None]] = set()
        """Those of the tasks that wait for a request."""
        self._accept: AcceptLoop | None = None

    def start(self) -> None:
        """Listen; for nobody if the file system of the socket has no access lists."""
        path = self._context.paths.run_socket
        listener = listen(path, mode=0o600, owner=0, backlog=_BACKLOG, kind=socket.SOCK_SEQPACKET)
        try:
            allow_only(path, self._config.roles.runner)
        except OSError as error:
            logger.error("%s: nobody can use isolator run but root: %s", path, error.strerror)
        self._accept = AcceptLoop(
            listener,
            lambda connection, _: self._accepted(connection),
            budget=TokenBucket(_CONNECTIONS, 2 * _CONNECTIONS),
            ready=lambda: not self._closers.exhausted and not self._context.rest.coming,
        )

    async def close(self) -> None:
        """Stop listening, and end every run; returns when they are gone."""
        if self._accept is not None:
            self._accept.close()
            self._context.paths.run_socket.unlink(missing_ok=True)
        self.terminate("the daemon stops")
        for task in list(self._silent):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_STOP_SECONDS)
        for task in list(self._tasks):  # a cage that does not end, or a descriptor that cannot be closed
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def under_way(self) -> list[str]:
        """The runs that a reload would end, and whatever else has a caller that waits for its end."""
        others = len(self._tasks - self._silent) - len(self._runs)
        return [*(f"run {run.id} of {run.name}" for run in self._runs), *["the end of a run"] * (others > 0)]

    def terminate(self, cause: str) -> None:
        """End every run, for a reason of the daemon's own."""
        for run in self._runs:
            run.terminate(cause, Origin.DAEMON)

    def take_snapshots(self) -> None:
        """Record the resources of every run, and end those that somebody has changed."""
        for run in list(self._runs):
            try:
                run.take_snapshot()
            except OSError as error:
                logger.error("run %s of %s: no snapshot: %s", run.id, run.name, error)

    # --- one connection ----------------------------------------------------------------------------------------

    def _accepted(self, connection: socket.socket) -> None:
        try:
            _, uid, gid = peer_ids(connection)
            if uid not in self._config.roles.runner:
                remedy = "add it to [roles] runner in host.toml and start the daemon again, or use sudo"
                raise DeniedError("isolator run", f"uid {uid} is no runner", remedy)
            place = self._shares.enter(uid)
        except (IsolatorError, OSError) as error:
            self._own(self._refuse(connection, error))
        else:
            self._own(self._serve(connection, uid, gid, place))

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="runner")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _refuse(self, connection: socket.socket, error: Exception) -> None:
        await self._finish(connection, error_fields(error), [])

    async def _serve(self, connection: socket.socket, uid: int, gid: int, place: Place) -> None:
        fds: list[int] = []
        run: RunnerRun | None = None
        fields: Sequence[tuple[str, str]] = ()
        try:
            await self._first_packet(connection)
            packet, fds = receive_anything(connection, MAX_BYTES)
            await asyncio.sleep(self._paces.setdefault(uid, TokenBucket(_STARTS, _BURST)).take())
            request = read_request(packet)
            if len(fds) != STREAMS + len(request.paths):
                raise UsageError("isolator run", "another number of descriptors than paths", "pass one for each")
            caller = (uid, gid, tuple(peer_groups(connection, most=MOST_GROUPS)))
            run = RunnerRun(self._context, self._config, connection, caller, self._reading)
            self._runs.add(run)
            fields = await run.serve(request, fds[:STREAMS], fds[STREAMS:], place)
        except TimeoutError:
            pass  # it has sent nothing
        except (IsolatorError, OSError) as error:
            fields = error_fields(error)
        except Exception as error:  # whatever it was, it is one run's alone
            context = {"message": f"a run of uid {uid} has failed", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)
            fields = error_fields(IsolatorError("isolator run", "a fault of the daemon", "see its log"))
        finally:
            if run is not None:
                self._runs.discard(run)
                fds += run.spilled
            try:
                await self._finish(connection, fields, fds)
            finally:
                place.leave()

    async def _first_packet(self, connection: socket.socket) -> None:
        """Wait for it; raises TimeoutError."""
        task = asyncio.current_task()
        assert task is not None
        self._silent.add(task)
        try:
            async with asyncio.timeout(_REQUEST_SECONDS):
                await readable(connection.fileno())
        finally:
            self._silent.discard(task)

    async def _finish(self, connection: socket.socket, fields: Sequence[tuple[str, str]], fds: Sequence[int]) -> None:
        """Close what the caller sent, tell the caller, and close the connection, however long that takes."""
        closing = asyncio.ensure_future(self._closers.close(fds))
        await asyncio.wait({closing}, timeout=_CLOSE_SECONDS)
        if fields:
            answer(connection, fields)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        await self._closers.close([connection.detach()])
        await closing
