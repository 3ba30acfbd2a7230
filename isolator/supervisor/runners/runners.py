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
from collections.abc import Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from isolator.base.pacing import TokenBucket
from isolator.errors import DeniedError, IsolatorError, UnavailableError, UsageError
from isolator.ipc.accept_loop import AcceptLoop
from isolator.ipc.messages import Origin
from isolator.ipc.packet import receive_anything
from isolator.ipc.run_request import MAX_BYTES, error_fields, read_request
from isolator.ipc.tasks import report
from isolator.linux.descriptors import check_open
from isolator.linux.peer import allow_only, peer_groups, peer_ids
from isolator.linux.readable import readable
from isolator.linux.shortage import is_shortage
from isolator.registration.collecting import MOST_GROUPS
from isolator.supervisor.listener import listen
from isolator.supervisor.runners.apart import Closers
from isolator.supervisor.runners.run import STREAMS, RunnerRun, answer
from isolator.supervisor.runners.shares import Place, Shares

if TYPE_CHECKING:
    from isolator.cage.cage import Cage
    from isolator.ipc.handover import RunnersState, RunnerState
    from isolator.launcher.client import Launcher
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
NOBODY = -1
"""In place of the uid of somebody whose runs are over."""


class Runners:
    """The runs of all runners. Nothing listens before ``start``."""

    def __init__(self, context: RunContext, config: HostConfig) -> None:
        self._context, self._config = context, config
        self._shares = Shares(config.runner)
        self._closers = Closers(self._admit)
        self._reading = asyncio.Semaphore(1)
        self._paces: dict[int, TokenBucket] = {}
        self._runs: set[RunnerRun] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._silent: dict[asyncio.Task[None], socket.socket] = {}
        """Those of the tasks that wait for a request, with their connections."""
        self._answered: set[asyncio.Task[None]] = set()
        """Those that only wait for descriptors to be closed."""
        self._accept: AcceptLoop | None = None

    def start(self, listener: socket.socket | None = None) -> None:
        """Listen; for nobody if the file system of the socket has no access lists.

        ``listener``: the one from before this process's exec.
        """
        if not self._config.roles.runner:
            return  # those that had the role are served to the end of their runs
        path = self._context.paths.run_socket
        listener = listener or listen(path, mode=0o600, owner=0, backlog=_BACKLOG, kind=socket.SOCK_SEQPACKET)
        self._accept = AcceptLoop(
            listener,
            lambda connection, _: self._accepted(connection),
            budget=TokenBucket(_CONNECTIONS, 2 * _CONNECTIONS),
            ready=lambda: not self._context.rest.coming,
        )
        self._admit()

    def _admit(self) -> None:
        """Let in those with the role, but for whoever has too much to close."""
        path = self._context.paths.run_socket
        if self._accept is not None:
            try:
                allow_only(path, {*self._config.roles.runner} - self._closers.exhausted)
            except OSError as error:
                logger.error("%s: nobody can use isolator run but root: %s", path, error.strerror)

    async def close(self) -> None:
        """Stop listening, and end every run; returns when they are gone."""
        if self._accept is not None:
            self._accept.close()
            self._context.paths.run_socket.unlink(missing_ok=True)
            self._accept = None
        self.terminate("the daemon stops")
        for task in list(self._silent):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_STOP_SECONDS)
        for task in list(self._tasks):  # a cage that does not end, or a descriptor that cannot be closed
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- over an exec of this process --------------------------------------------------------------------------

    @property
    def runs(self) -> list[RunnerRun]:
        """The runs that there are."""
        return [*self._runs]

    @property
    def cages(self) -> list[Cage]:
        """The cages of the runs that have one."""
        return [run.cage for run in self._runs if run.cage is not None and run.cage.started]

    @property
    def under_way(self) -> list[str]:
        """Changes under way that are not to be broken off, in words."""
        others = len(self._tasks - self._silent.keys() - self._answered) - len(self._runs)
        begun = [f"the start or end of run {run.id} of {run.name}" for run in self._runs if not run.settled]
        return [*begun, *["the end of a run"] * (others > 0)]

    def hand_over(self) -> RunnersState:
        """The state of the runs, and of all that callers have sent: none of it may be closed by an exec."""
        from isolator.ipc.handover import RunnersState

        return RunnersState(
            listener=self._accept.fileno() if self._accept is not None else -1,
            waiting=tuple(connection.fileno() for connection in self._silent.values()),
            runs=tuple(run.hand_over() for run in self._runs if run.settled),
            theirs=self._closers.unclosed,
        )

    async def pause(self) -> None:
        """Close nothing of callers' from now on: an exec would have to wait for it. Raises UnavailableError."""
        if stuck := await self._closers.pause():
            whose = ", ".join(f"uid {uid}" if uid != NOBODY else "a user" for uid in sorted(stuck))
            why = f"a descriptor that {whose} has handed over does not close, and would keep the daemon waiting"
            raise UnavailableError("reload", why, "end the file system behind it, or restart the daemon")

    def go_on(self) -> None:
        """Go on after an exec that came to nothing."""
        self._closers.go_on()

    def take_over(self, before: RunnersState, kept_by: Launcher) -> Iterator[tuple[RunnerState, str]]:
        """Go on with the runs from before the exec, and listen; each run comes with why it does not go on, if so."""
        for one in before.runs:
            yield one, self._take_over(one, kept_by)
        self._left(before.theirs)
        listener = socket.socket(fileno=before.listener) if before.listener >= 0 else None
        self.start(listener)
        if self._accept is None and listener is not None:
            listener.close()
            self._context.paths.run_socket.unlink(missing_ok=True)
        for fd in before.waiting:
            with contextlib.suppress(OSError):  # of that one alone
                connection = socket.socket(fileno=fd)
                connection.setblocking(False)
                self._accepted(connection)

    def _left(self, theirs: Sequence[int]) -> None:
        """Close descriptors of callers of whom nobody waits any more."""
        left = self._own(self._closers.close(NOBODY, theirs))
        self._answered.add(left)
        left.add_done_callback(self._answered.discard)

    def _take_over(self, before: RunnerState, kept_by: Launcher) -> str:
        from isolator.ipc.handover import descriptors

        caller, theirs = (before.uid, before.gid, before.groups), list(before.theirs)
        try:
            connection = socket.socket(fileno=before.connection)
        except OSError as error:
            self._left(before.theirs)
            return f"its connection: {error.strerror}"
        connection.setblocking(False)
        run = RunnerRun(self._context, self._config, connection, caller, self._reading, theirs, before.id)
        try:
            check_open(descriptors(before))
            caps = run.take_over(before, kept_by).resources
        except Exception as error:  # whatever it was, the others go on
            self._own(self._conclude(connection, before.uid, error_fields(_fault(error)), theirs))
            return f"{type(error).__name__}: {error}"
        self._runs.add(run)
        place = self._shares.keep(before.uid, tasks=caps.tasks, memory=caps.memory)
        self._own(self._go_on(run, connection, before.uid, place))
        return ""

    def terminate(self, cause: str) -> None:
        """End every run, for a reason of the daemon's own."""
        for run in self._runs:
            run.terminate(cause, Origin.DAEMON)

    def take_snapshots(self) -> OSError | None:
        """Record the resources of every run, end those that somebody has changed, and return what was too short to."""
        unseen = None
        for run in list(self._runs):
            try:
                run.take_snapshot()
            except OSError as error:
                logger.error("run %s of %s: no snapshot: %s", run.id, run.name, error)
                unseen = error if is_shortage(error) else unseen
            except Exception as error:  # whatever it was, it is one run's; the others' turn comes
                report(asyncio.get_running_loop(), "snapshots", error, f"; run {run.id} is left out")
        return unseen

    # --- one connection ----------------------------------------------------------------------------------------

    def _accepted(self, connection: socket.socket) -> None:
        try:
            _, uid, gid = peer_ids(connection)
            if uid not in self._config.roles.runner:
                remedy = "add it to [roles] runner in host.toml, then 'isolator reload'; or use sudo"
                raise DeniedError("isolator run", f"uid {uid} is no runner", remedy)
            place = self._shares.enter(uid)
        except (IsolatorError, OSError) as error:
            self._own(self._conclude(connection, uid, error_fields(error), []))
        else:
            self._own(self._serve(connection, uid, gid, place))

    def _own(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name="runner")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

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
            run = RunnerRun(self._context, self._config, connection, caller, self._reading, fds)
            self._runs.add(run)
            fields = await run.serve(request, fds[:STREAMS], fds[STREAMS:], place)
        except TimeoutError:
            pass  # it has sent nothing
        except (IsolatorError, OSError) as error:
            fields = error_fields(error)
        except Exception as error:  # whatever it was, it is one run's alone
            fields = error_fields(_fault(error))
        finally:
            await self._conclude(connection, uid, fields, fds, run, place)

    async def _go_on(self, run: RunnerRun, connection: socket.socket, uid: int, place: Place) -> None:
        fields: Sequence[tuple[str, str]] = ()
        try:
            fields = await run.go_on()
        except Exception as error:  # whatever it was, it is one run's alone
            fields = error_fields(_fault(error))
        finally:
            await self._conclude(connection, uid, fields, run.theirs, run, place)

    async def _first_packet(self, connection: socket.socket) -> None:
        """Wait for it; raises TimeoutError."""
        task = asyncio.current_task()
        assert task is not None
        self._silent[task] = connection
        try:
            async with asyncio.timeout(_REQUEST_SECONDS):
                await readable(connection.fileno())
        finally:
            del self._silent[task]

    async def _conclude(
        self, connection: socket.socket, uid: int, fields: Sequence[tuple[str, str]], fds: Sequence[int],
        run: RunnerRun | None = None, place: Place | None = None,
    ) -> None:  # fmt: skip
        """Close what the caller sent, tell the caller, and close the connection, however long that takes."""
        task = asyncio.current_task()
        assert task is not None
        try:
            if run is not None:
                self._runs.discard(run)
                fds = [*fds, *run.trees.release_all()]
            closing = asyncio.ensure_future(self._closers.close(uid, fds))
            closed, _ = await asyncio.wait({closing}, timeout=_CLOSE_SECONDS)
            if closed and place is not None:
                place.leave()  # before the answer, upon which the next run of this caller may come
            if fields:
                answer(connection, fields)
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            self._answered.add(task)
            await self._closers.close(uid, [connection.detach()])
            await closing
        finally:
            self._answered.discard(task)
            if place is not None:
                place.leave()


def _fault(error: Exception) -> IsolatorError:
    """A fault of the daemon, logged, as its caller is told of it."""
    context = {"message": "a run of a user has failed", "exception": error}
    asyncio.get_running_loop().call_exception_handler(context)
    return IsolatorError("isolator run", "a fault of the daemon", "see its log")
