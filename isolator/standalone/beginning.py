"""Beginning of a command that has one cage to build: what takes long and needs neither asyncio nor the policy.

The launcher builds the cages' view and parks a process; asyncio and the policy's modules are imported meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import socket

from isolator.cage.parking import Parking, new_parking
from isolator.ipc.packet import receive_packet, send_packet
from isolator.layers.cgroup.subtree import LIMITING, Subtree, open_subtree
from isolator.layers.ledger import EVERY_LAYER
from isolator.paths import Paths
from isolator.recovery.journal import Entry, Journal
from isolator.standalone.launcher import ForkedLauncher

_END_SECONDS = 5.0


def open_place(
    paths: Paths, stack: contextlib.ExitStack | contextlib.AsyncExitStack, optional: frozenset[str]
) -> tuple[Journal, Subtree]:
    """A journal and control groups of this command's own, until ``stack`` ends; raises ConfinementError.

    ``optional``: the controllers that this host may lack.
    """
    run = os.urandom(5).hex()
    journal = Journal(paths.run / f"run-{run}.journal", wait=True)
    stack.callback(journal.close)
    subtree = open_subtree(paths.named("isolator") + f"-run-{run}", optional=optional)
    # Found by its name until here; from here on also when this process's group cannot be searched.
    journal.record(Entry("subtree", "subtree", tuple(map(str, subtree.folders()))))
    stack.callback(journal.forget, "subtree")
    stack.callback(subtree.remove)
    return journal, subtree


class Beginning:
    """A launcher with its first order, journal and control groups; a context manager that removes the latter."""

    def __init__(self, paths: Paths, launcher: ForkedLauncher) -> None:
        """Begin; raises ConfinementError. Which controllers this host may lack is not known yet: the session asks."""
        self.paths, self.launcher = paths, launcher
        self._parking: Parking | None = None
        with contextlib.ExitStack() as undo:
            self.journal, self.subtree = open_place(paths, undo, frozenset(LIMITING))
            undo.callback(self._abandon)
            self._parking = new_parking(self.journal, self.subtree, EVERY_LAYER)
            with contextlib.suppress(BrokenPipeError):  # it has ended, and said why to whoever reads its socket
                send_packet(launcher.sock, *self._parking.order())
            self._parking.asked = True
            self._stack = undo.pop_all()

    def __enter__(self) -> Beginning:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def take_parking(self) -> Parking:
        """What the launcher was asked for; the caller's from here on."""
        parking, self._parking = self._parking, None
        assert parking is not None
        return parking

    def _abandon(self) -> None:
        """End the launcher, and the parked process that nobody has taken."""
        if self._parking is None:
            return
        self._parking.link.close()
        sock = self.launcher.sock
        sock.settimeout(_END_SECONDS)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
            packet = b"begin"
            while packet:
                packet, fds = receive_packet(sock)
                for pidfd in fds:
                    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
                    os.close(pidfd)
        self._parking.close()
