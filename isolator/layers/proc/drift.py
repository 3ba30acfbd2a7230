"""Whether the /proc of a running cage is still covered as it was made, whoever has changed it since.

An entry of the host's appears as somebody mounts or unmounts in the cage's mount namespace, or as the kernel gets a new
one, with a module. The kernel has an event for the first (isolator.linux.mount_watch), and the names of the second are
the same in every /proc. So the mounts are read only after one of the two, and where the kernel offers no event.
"""

from __future__ import annotations

import time

from isolator.layers.base import Process
from isolator.layers.proc.layer import covers, names_in, uncovered
from isolator.linux.mount_watch import MountWatch

_SAME_LOOK = 1.0
"""Seconds for which the names of the kernel's entries are known: those of one look at hundreds of cages."""


class ProcWatch:
    """The shared part of the looks at all cages: the events of their mounts, and the names of the kernel's entries."""

    def __init__(self) -> None:
        self.mounts = MountWatch()
        self._names: frozenset[str] = frozenset()
        self._known_until = 0.0

    def names(self, process: Process) -> frozenset[str]:
        """The names that are to be covered in any cage's /proc, read in that of a process; raises OSError."""
        if (now := time.monotonic()) >= self._known_until:
            self._names = names_in(process)
            self._known_until = now + _SAME_LOOK
        return self._names


class ProcDrift:
    """The /proc of one cage, compared with its making at each ``detect``. ``end`` lets go of it.

    ``names`` are those that were covered, and ``made`` tells by what (``covers``).
    """

    def __init__(self, watch: ProcWatch, names: frozenset[str], made: int) -> None:
        self._watch = watch
        self._names, self._made = names, made
        self._mounts = 0
        """The number of the cage's mounts in the watch."""

    def detect(self, process: Process) -> str:
        """See ``Proc.detect_drift``."""
        if self._watch.mounts.unchanged(self._mounts) and self._watch.names(process) == self._names:
            return ""
        self.end()
        self._mounts = self._watch.mounts.begin(process.pid)  # ahead of the look: nothing comes between the two
        try:
            names, mounts = names_in(process), Process(process.pid).mounts
        except OSError:
            self.end()  # nobody has seen what has changed: the next look has to
            raise
        if bare := uncovered(names, mounts):
            return f"/proc/{bare[0]} of the host is there"
        found = covers(names, mounts)
        if names != self._names:  # a module has gone, and the cover with its entry
            self._names, self._made = names, found
        return "" if found == self._made else "/proc/ has other mounts than it was made with"

    def end(self) -> None:
        """Let go of the cage's mounts."""
        self._watch.mounts.end(self._mounts)
        self._mounts = 0
