"""Warm pool: the parts of a cage that no plan changes, built before a start asks for them.

A *spare* is a parked process (isolator.launcher.prefork), its v1 groups on a hybrid host, and a network namespace with
the rules of the cage before: nearly all of what a start waits for. None of it belongs to a plugin yet, and nothing of a
plugin has ever been in it; a spare is used once. ``take`` gives the one that is waiting, or makes one; ``refill`` makes
the next one when the daemon has had a moment's rest, so that a burst of starts is not slowed by it.

What is outside a process, the v1 groups, is journalled first, under a name that no plugin can have; those that are made
for a cage which waits are its own from the first. The rest ends with its last descriptor: the parked process sees the
end of its link, the namespace goes with its sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from typing import TYPE_CHECKING, Any

from isolator.base.structs import struct_class
from isolator.cage.parking import PREFIX, Parking, new_parking
from isolator.errors import ConfinementError, IsolatorError
from isolator.ipc.packet import receive_packet, send_message
from isolator.ipc.tasks import Tasks
from isolator.layers.cgroup.leaf import kill_first
from isolator.linux.apart import apart
from isolator.linux.readable import is_readable, readable

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from isolator.launcher.client import Clone, Launcher
    from isolator.layers.cgroup.leaf import Leaf
    from isolator.layers.cgroup.subtree import Subtree
    from isolator.layers.network.namespace import CageNetwork
    from isolator.policy.model import NetworkPolicy
    from isolator.recovery.journal import Journal

_REST_SECONDS = 0.1
_PARK_SECONDS = 20.0
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
        return not self.launcher.closed.is_set() and not is_readable(self.pidfd)

    def send(self, packet: bytes, fds: list[int]) -> None:
        """Send a message to the parked process, or to the cage that it has become; its link shows the end of either."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            send_message(self.link, packet, fds)

    async def ended(self) -> None:
        """Wait for the end of the parked process: it ends once it has cloned the cage, or lost its link."""
        if self.pidfd < 0:
            return
        if not is_readable(self.pidfd):
            await readable(self.pidfd)
        self._reap()

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        os.close(self.pidfd)
        self.pidfd = -1

    def hand_over_groups(self) -> None:
        """Give up the groups: they have become, or were, those of a cage."""
        self.groups = None
        if self.name.startswith(PREFIX):
            self.journal.forget(self.name)

    def kill(self) -> None:
        """Kill the parked process, which may hang, and what it has cloned: that is in its group, until it has told so.

        The group is there once ``prefork.park`` has begun; nothing is cloned before.
        """
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
                os.killpg(self.pid, signal.SIGKILL)

    async def release(self) -> None:
        """End and remove every part that nobody has taken over; idempotent."""
        self.link.close()
        self.kill()
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
            self.groups.remove_v1()
            self.hand_over_groups()


class WarmPool:
    """The spares of one process: at most one waits. ``close`` before the launcher ends."""

    def __init__(self, launcher: Callable[[], Launcher], journal: Journal, subtree: Subtree) -> None:
        """``launcher`` gives the one that runs now: a launcher that dies is replaced."""
        self._launcher, self._journal, self._subtree = launcher, journal, subtree
        self._network: NetworkPolicy | None = None
        """Policy of the last taker, whose rules the next network gets: most often they are the next taker's, too."""
        self._waiting: asyncio.Task[Spare] | None = None
        self._rest: asyncio.TimerHandle | None = None
        self._closed = False
        self._hurried = 0
        """Spares that are being made while their takers wait."""
        self._tasks = Tasks()
        self._disposals: set[asyncio.Task[None]] = set()

    async def take(self, layers: frozenset[str], network: NetworkPolicy, cage: Callable[[], Leaf]) -> Spare:
        """A spare for a cage with these layers: the one that waits if it fits, or a new one.

        That has the network's rules where others are being made at the same time: one thread for both is less work.
        Else they are loaded while the cage enters the rest, which is sooner than to wait for them here. A new one is in
        the groups of the taker's cage, which ``cage`` journals and returns; one that waits has some of its own. A taker
        that gets none has none: this forgets them, once they are gone.

        Raises ConfinementError when this host cannot make it, UnavailableError while the launcher is away.
        """
        self._network = network
        making, self._waiting = self._waiting, None
        if making is not None:
            with contextlib.suppress(Exception):  # made anew below, and then it counts
                spare = await self._made(making)
                if spare.layers == layers and spare.usable:
                    return spare
                self._dispose(making)
        return await self._made(self._run(self._make_for(cage(), layers, network)))

    async def _made(self, making: asyncio.Task[Spare]) -> Spare:
        """Wait for one. What comes of it behind a taker that is cancelled is removed: the launcher may hang."""
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            self._dispose(making)
            raise

    def adopt(self, parking: Parking) -> None:
        """Go on with one whose process the launcher was asked for; before anything else."""
        self._waiting = self._run(_make_spare(self._launcher(), parking, self._rules(), hurried=False))

    def begin(self, layers: frozenset[str], *, hurried: bool = False) -> None:
        """Make one now, in the background, unless one waits already. ``hurried``: it may be taken at once."""
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None
        if self._waiting is None and not self._closed:
            # What a host or a launcher refuses, the next start tries again, and reports.
            self._waiting = self._run(self._make(layers, self._rules(), hurried=hurried))

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

    def _run(self, work: Coroutine[Any, Any, Spare]) -> asyncio.Task[Spare]:
        return self._tasks.run("making of a spare", work, expected=_EXPECTED)

    async def _make(self, layers: frozenset[str], rules: NetworkPolicy, *, hurried: bool) -> Spare:
        launcher = self._launcher()  # first: nothing is left of a parking that nobody can be asked for
        return await _make_spare(launcher, new_parking(self._journal, self._subtree, layers), rules, hurried=hurried)

    async def _make_for(self, cage: Leaf, layers: frozenset[str], rules: NetworkPolicy) -> Spare:
        self._hurried += 1
        try:
            launcher, others = self._launcher(), self._hurried > 1
            parking = new_parking(self._journal, self._subtree, layers, cage)
            return await _make_spare(launcher, parking, rules if others else None, hurried=True)
        except BaseException:
            self._journal.forget(cage.unified.name)
            raise
        finally:
            self._hurried -= 1

    def _rules(self) -> NetworkPolicy:
        """The policy whose rules a network gets ahead: the last taker's, or one that lets nothing out."""
        from isolator.policy.model import NetworkPolicy

        return self._network or NetworkPolicy(mode="none")

    def _dispose(self, making: asyncio.Task[Spare]) -> asyncio.Task[None]:
        async def release() -> None:
            try:
                spare = await making
            except Exception:  # nothing is left of it, and its owner has noticed
                return
            await spare.release()
            self._journal.forget(spare.name)

        task = self._tasks.run("removal of a spare", release())
        self._disposals.add(task)
        task.add_done_callback(self._disposals.discard)
        return task


def not_parked(detail: object) -> ConfinementError:
    """The error of a process that could not be parked."""
    return ConfinementError("parked process", str(detail), "see 'isolator check'")


async def _make_spare(launcher: Launcher, parking: Parking, rules: NetworkPolicy | None, *, hurried: bool) -> Spare:
    """A new spare, whose network has the rules of a policy, or none.

    Raises as ``WarmPool.take`` does, and nothing is left then, of what was made for it neither.
    Nobody cancels it: a process that was asked for comes, and a thread makes its network in any case.
    """
    from isolator.layers.network import namespace as network_layer

    async with contextlib.AsyncExitStack() as undo:
        asking = asyncio.create_task(_ask(launcher, parking, hurried=hurried))
        undo.push_async_callback(_release_parked, asking, launcher, parking)
        making: asyncio.Task[CageNetwork] | None = None
        if "network" in parking.layers:
            making = asyncio.create_task(apart(lambda: network_layer.make(rules)))
            undo.push_async_callback(_release_network, making)
        parked = await asking
        spare = _spare(launcher, parking, parked)
        if "cgroup" in parking.layers:
            kill_first(spare.pid)
        if not hurried:
            await _parked(spare)
        if making is not None:
            spare.network = await making
        undo.pop_all()
        return spare


async def _ask(launcher: Launcher, parking: Parking, *, hurried: bool) -> Clone:
    try:
        if parking.asked:
            return await launcher.parked()
        return await launcher.park(*parking.its, layers=parking.layers, hurried=hurried)
    finally:
        parking.its.close()


async def _parked(spare: Spare) -> None:
    """Wait until the parked process has done all that can be done ahead: one that could not is never taken.

    That it is in its groups is confirmed. Where its taker waits, all that is left to the cage, which is born in the
    same groups and confirmed to be in its own.
    """
    try:
        async with asyncio.timeout(_PARK_SECONDS):
            if not is_readable(spare.link.fileno()):
                await readable(spare.link.fileno())
    except TimeoutError:
        raise not_parked(f"it has said nothing in {_PARK_SECONDS:g} s") from None
    packet, _ = receive_packet(spare.link)
    answer = json.loads(packet) if packet else {"detail": "it died"}
    if "detail" in answer:
        raise not_parked(answer["detail"])
    if spare.groups is not None:
        spare.groups.confirm_in(spare.pid)


def _spare(launcher: Launcher, parking: Parking, parked: Clone) -> Spare:
    return Spare(
        parking.name, parking.layers, launcher, parking.journal, parking.link, parking.status, parked.pid,
        parked.pidfd, parking.figures, groups=parking.groups,
    )  # fmt: skip


async def _release_parked(asking: asyncio.Task[Clone], launcher: Launcher, parking: Parking) -> None:
    """End the process that was asked for, if it came to be, and remove what was made for it."""
    parking.link.close()
    try:
        parked = await asking
    except _EXPECTED:
        parking.close()
    else:
        await _spare(launcher, parking, parked).release()


async def _release_network(making: asyncio.Task[CageNetwork]) -> None:
    from isolator.layers.network import namespace as network_layer

    with contextlib.suppress(*_EXPECTED):
        network_layer.release(await making)
