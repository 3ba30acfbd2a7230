"""Parking: what belongs to one parked process, made before it is asked for. It needs no event loop.

So a command that has one cage to build can ask for its parked process before it imports the rest of itself.
"""

from __future__ import annotations

import os
import socket

from isolator.base.structs import struct_class
from isolator.ipc.packet import pair
from isolator.layers.cgroup.leaf import Leaf
from isolator.layers.cgroup.subtree import Subtree
from isolator.layers.plan import ParkOrder
from isolator.layers.proc.layer import new_figures
from isolator.linux.capability import last_capability
from isolator.linux.descriptors import FdSet
from isolator.recovery.journal import Entry, Journal

PREFIX = "_spare."
"""Begins the names of the groups; a plugin's name begins with a letter."""


@struct_class()
class Parking:
    """What one parked process has in common with its maker: link, status pipe, figures, and v1 groups."""

    name: str
    layers: frozenset[str]
    """The layers that its cage can have."""
    journal: Journal
    link: socket.socket
    """Socket to the parked process; non-blocking."""
    status: int
    """The pipe's end on which pid 1 of the cage reports; non-blocking."""
    groups: Leaf | None
    """The v1 groups, where there are any."""
    figures: int
    """A file system for the figures of the cage's /proc; -1: its cage has none."""
    its: FdSet
    """What is for the parked process: its ends, the figures, and each of the groups."""
    asked: bool = False
    """Whether the launcher has the order."""

    def order(self) -> tuple[bytes, list[int]]:
        """The packet to a launcher that is asked a while before the plan comes, and the descriptors that go with it."""
        return ParkOrder(self.layers, last_capability()).pack(), list(self.its)

    def close(self) -> None:
        """Close every descriptor and remove the groups: the process has never been, or ended."""
        self.its.close()
        self.link.close()
        os.close(self.status)
        if self.figures >= 0:
            os.close(self.figures)
        if self.groups is not None:
            self.groups.remove_v1()
            if self.name.startswith(PREFIX):
                self.journal.forget(self.name)


def new_parking(journal: Journal, subtree: Subtree, layers: frozenset[str], cage: Leaf | None = None) -> Parking:
    """Make everything for one parked process; raises OSError, and nothing is left then.

    What is outside a process, the v1 groups, is journalled first, under a name that no plugin can have; or they are
    those of the ``cage`` that waits for it, which has journalled them.
    """
    name = PREFIX + os.urandom(6).hex() if cage is None else cage.unified.name
    link, its_link = pair()
    status, its_status = os.pipe2(os.O_CLOEXEC)
    parking = Parking(name, layers, journal, link, status, None, -1, FdSet([its_link.detach(), its_status]))
    link.setblocking(False)
    os.set_blocking(status, False)
    try:
        if "proc" in layers:
            parking.figures = new_figures()
            parking.its.add(os.dup(parking.figures))
        if "cgroup" in layers and subtree.v1:
            groups = cage
            if groups is None:
                groups = Leaf.under(subtree, name)
                journal.record(Entry(name, "spare", tuple(map(str, dict.fromkeys(groups.v1.values())))))
            parking.groups = groups
            groups.create_v1()
            groups.open_v1(parking.its)
    except BaseException:
        parking.close()
        raise
    return parking
