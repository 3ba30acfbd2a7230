"""Warm pool: the parts of a cage that no plan changes, built before a start asks for them.

A *spare* is a parked process (isolator.launcher.prefork), its v1 groups on a hybrid host, and a network namespace that
has no rules yet: nearly all of what a start waits for. None of it belongs to a plugin yet, and nothing of a plugin has
ever been in it; a spare is used once. ``take`` gives the one that is waiting, or makes one; ``refill`` makes the next
one when the daemon has had a moment's rest, so that a burst of starts is not slowed by it.

What is outside a process, the v1 groups, is journalled first, under a name that no plugin can have. The rest ends with
its last descriptor: the parked process sees the end of its link, the namespace goes with its sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
from typing import TYPE_CHECKING

from isolator.base.structs import struct_class
from isolator.errors import IsolatorError
from isolator.ipc.packet import pair
from isolator.ipc.tasks import Tasks
from isolator.layers.cgroup.leaf import Leaf
from isolator.layers.proc.layer import new_figures
from isolator.linux.readable import readable
from isolator.recovery.journal import Entry

if TYPE_CHECKING:
    from collections.abc import Callable

    from isolator.launcher.client import Launcher
    from isolator.layers.cgroup.subtree import Subtree
    from isolator.layers.network.namespace import CageNetwork
    from isolator.recovery.journal import Journal

PREFIX = "_spare."
"""Begins the names of the groups; a plugin's name begins with a letter."""

_REST_SECONDS = 0.1
_EXPECTED = (IsolatorError, OSError)


@struct_class()
class Spare:
    """A parked process with its groups and network. Its taker owns all of it, and calls ``release`` for the rest."""

    name: str
    layers: frozenset[str]
    """The layers that its cage can have."""
    launcher: Launcher
    journal: Journal
    link: socket.socket
    """Socket to the parked process, later to the cage that it becomes; non-blocking."""
    status: int
    """The pipe's end on which pid 1 of the cage reports; non-blocking."""
    pid: int
    """Pid of the parked process."""
    pidfd: int
    """Pidfd of the parked process until it has ended; then -1."""
    figures: int = -1
    """A file system for the figures of the cage's /proc."""
    network: CageNetwork | None = None
    groups: Leaf | None = None
    """The v1 groups of the parked process, where there are any, until a cage has taken them over."""

    @classmethod
    def spent(
        cls, name: str, launcher: Launcher, journal: Journal, status: int, figures: int, network: CageNetwork | None
    ) -> Spare:
        """Remainder of a spare that has become a cage before this process's exec."""
        link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        link.close()
        return cls(name, frozenset(), launcher, journal, link, status, 0, -1, figures, network)

    @property
    def usable(self) -> bool:
        """Whether the parked process and the launcher that made it still run."""
        waits = select.poll()
        waits.register(self.pidfd, select.POLLIN)
        return not self.launcher.closed.is_set() and not waits.poll(0)

    async def ended(self) -> None:
        """Wait for the end of the parked process: it ends once it has cloned the cage, or lost its link."""
        if self.pidfd < 0:
            return
        await readable(self.pidfd)
        self._reap()

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        os.close(self.pidfd)
        self.pidfd = -1

    def hand_over_groups(self) -> None:
        """Give up the groups: they have become those of a cage."""
        self.groups = None
        self.journal.forget(self.name)

    async def release(self) -> None:
        """End and remove every part that nobody has taken over; idempotent."""
        self.link.close()
        await self.ended()
        if self.status >= 0:
            os.close(self.status)
            self.status = -1
        if self.figures >= 0:
            os.close(self.figures)
            self.figures = -1
        if self.network is not None:
            from isolator.layers.network import namespace as network_layer

            network_layer.release(self.network)
        if self.groups is not None:
            self.groups.remove()
            self.hand_over_groups()


class WarmPool:
    """The spares of one process: at most one waits. ``close`` before the launcher ends."""

    def __init__(self, launcher: Callable[[], Launcher], journal: Journal, subtree: Subtree) -> None:
        """``launcher`` gives the one that runs now: a launcher that dies is replaced."""
        self._launcher, self._journal, self._subtree = launcher, journal, subtree
        self._waiting: asyncio.Task[Spare] | None = None
        self._rest: asyncio.TimerHandle | None = None
        self._closed = False
        self._tasks = Tasks()
        self._disposals: set[asyncio.Task[None]] = set()

    async def take(self, layers: frozenset[str]) -> Spare:
        """A spare for a cage with these layers: the one that waits if it fits, or a new one.

        Raises ConfinementError when this host cannot make it, UnavailableError while the launcher is away.
        """
        making, self._waiting = self._waiting, None
        if making is not None:
            with contextlib.suppress(Exception):  # made anew below, and then it counts
                try:
                    spare = await asyncio.shield(making)
                except asyncio.CancelledError:
                    self._give_back(making)
                    raise
                if spare.layers == layers and spare.usable:
                    return spare
                self._dispose(making)
        return await self._make(layers, hurried=True)

    def begin(self, layers: frozenset[str], *, hurried: bool = False) -> None:
        """Make one now, in the background, unless one waits already. ``hurried``: it may be taken at once."""
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None
        if self._waiting is None and not self._closed:
            # What a host or a launcher refuses, the next start tries again, and reports.
            self._waiting = self._tasks.run(
                "making of a spare", self._make(layers, hurried=hurried), expected=_EXPECTED
            )

    def refill(self, layers: frozenset[str]) -> None:
        """Make one when no start has needed anything for a moment."""
        if self._rest is not None:
            self._rest.cancel()
        if not self._closed:
            self._rest = asyncio.get_running_loop().call_later(_REST_SECONDS, self.begin, layers)

    async def filled(self) -> None:
        """Wait until a spare is there (benchmarks and tests)."""
        if self._waiting is not None:
            await asyncio.wait([self._waiting])

    async def close(self) -> None:
        """Remove the one that waits; none is made from now on."""
        self._closed = True
        if self._rest is not None:
            self._rest.cancel()
        if self._waiting is not None:
            self._dispose(self._waiting)
            self._waiting = None
        while self._disposals:
            await asyncio.wait(self._disposals)

    def reopen(self) -> None:
        """Make spares again after ``close``."""
        self._closed = False

    async def _make(self, layers: frozenset[str], *, hurried: bool) -> Spare:
        return await _make_spare(self._launcher(), self._journal, self._subtree, layers, hurried=hurried)

    def _give_back(self, making: asyncio.Task[Spare]) -> None:
        if self._waiting is None and not self._closed:
            self._waiting = making
        else:
            self._dispose(making)

    def _dispose(self, making: asyncio.Task[Spare]) -> None:
        async def release() -> None:
            try:
                spare = await making
            except Exception:  # nothing is left of it, and its owner has noticed
                return
            await spare.release()

        task = self._tasks.run("removal of a spare", release())
        self._disposals.add(task)
        task.add_done_callback(self._disposals.discard)


async def _make_spare(
    launcher: Launcher, journal: Journal, subtree: Subtree, layers: frozenset[str], *, hurried: bool
) -> Spare:
    """A new spare; raises as ``WarmPool.take`` does, and nothing is left then."""
    from isolator.layers.network import namespace as network_layer

    name = PREFIX + os.urandom(6).hex()
    groups = Leaf.under(subtree, name) if "cgroup" in layers and subtree.v1 else None
    async with contextlib.AsyncExitStack() as undo:
        making: asyncio.Task[CageNetwork] | None = None
        if "network" in layers:
            making = asyncio.create_task(asyncio.to_thread(network_layer.make))
            undo.push_async_callback(_release_network, making)
        link, its_link = pair()
        undo.callback(link.close)
        link.setblocking(False)
        status, its_status = os.pipe2(os.O_CLOEXEC)
        undo.callback(os.close, status)
        os.set_blocking(status, False)
        try:
            parked = await launcher.park(its_link.fileno(), its_status, layers=layers, hurried=hurried)
        finally:
            its_link.close()
            os.close(its_status)
        spare = Spare(name, layers, launcher, journal, link, status, parked.pid, parked.pidfd)
        undo.pop_all()
        undo.push_async_callback(spare.release)
        if making is not None:
            undo.push_async_callback(_release_network, making)
        if "proc" in layers:
            spare.figures = new_figures()
        if groups is not None:
            journal.record(Entry(name, "spare", tuple(map(str, dict.fromkeys(groups.v1.values())))))
            spare.groups = groups
            groups.create_v1()
            attaching = asyncio.create_task(asyncio.to_thread(groups.attach_v1, parked.pid))
            undo.push_async_callback(asyncio.wait, [attaching])  # by its pid, so before the process can be gone
            await asyncio.shield(attaching)
        elif "cgroup" in layers:
            Leaf.under(subtree, name).attach_v1(parked.pid)
        if making is not None:
            spare.network = await asyncio.shield(making)  # a thread cannot be cancelled: what it made would be lost
        undo.pop_all()
        return spare


async def _release_network(making: asyncio.Task[CageNetwork]) -> None:
    from isolator.layers.network import namespace as network_layer

    with contextlib.suppress(IsolatorError):
        network_layer.release(await making)
