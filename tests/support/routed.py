"""Machines in a network of their own: a network namespace for each, and one between them that routes, or drops.

    outside  44.128.0.1   of the router itself: whatever is not of the machines listens there
    machine  44.128.N.2   N from 1 on; its only way, to the others and outside, leads through the router

What is *cut* is dropped by the router without a word, in one direction, so neither end learns of it. Nothing leaves the
machine on which this runs, and all of it ends with the process that made it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from isolator.linux import netns

OUTSIDE = "44.128.0.1"
_RULES = """
table ip routed {
  set cut { type ipv4_addr . ipv4_addr; }
  chain forward { type filter hook forward priority 0; ip saddr . ip daddr @cut drop; }
}
"""

Way = tuple["Machine", "Machine"]
"""From where, and to where."""


class Machine:
    """A network namespace, by its descriptor ``fd``, with an address."""

    def __init__(self, number: int) -> None:
        self.name, self.address = f"m{number}", f"44.128.{number}.2"
        self.fd = netns.in_new_network(netns.current_network)

    @property
    def enter(self) -> list[str]:
        """A command's beginning that takes the rest of it into the namespace."""
        return ["nsenter", f"--net=/proc/{os.getpid()}/fd/{self.fd}"]

    def reaches(self, port: int) -> bool:
        """Whether a TCP connection from here to a port outside comes about."""
        with contextlib.suppress(OSError):
            netns.in_network(self.fd, lambda: socket.create_connection((OUTSIDE, port), 5)).close()
            return True
        return False


class Network:
    """Machines, and the router between them."""

    def __init__(self, count: int) -> None:
        self._router = netns.in_new_network(netns.current_network)
        self.machines = [Machine(number) for number in range(1, count + 1)]
        self._cuts: Counter[Way] = Counter()
        self._lock = threading.Lock()
        _run(self._router, "ip", "link", "set", "lo", "up")
        _run(self._router, "ip", "addr", "add", f"{OUTSIDE}/32", "dev", "lo")
        for machine in self.machines:
            self._join(machine)
        netns.in_network(self._router, lambda: Path("/proc/sys/net/ipv4/ip_forward").write_text("1"))
        _run(self._router, "nft", "-f", "-", text=_RULES)

    def _join(self, machine: Machine) -> None:
        gateway = f"{machine.address.rpartition('.')[0]}.1"
        _run(self._router, "ip", "link", "add", machine.name, "type", "veth", "peer", "name", "up0",
             "netns", f"/proc/{os.getpid()}/fd/{machine.fd}")  # fmt: skip
        _run(self._router, "ip", "addr", "add", f"{gateway}/24", "dev", machine.name)
        _run(self._router, "ip", "link", "set", machine.name, "up")
        _run(machine.fd, "ip", "link", "set", "lo", "up")
        _run(machine.fd, "ip", "addr", "add", f"{machine.address}/24", "dev", "up0")
        _run(machine.fd, "ip", "link", "set", "up0", "up")
        _run(machine.fd, "ip", "route", "add", "default", "via", gateway)

    def listener(self, port: int) -> socket.socket:
        """A TCP socket that listens outside."""
        return netns.in_network(self._router, lambda: socket.create_server((OUTSIDE, port)))

    @contextlib.contextmanager
    def cut(self, ways: Iterable[Way]) -> Iterator[None]:
        """Drop what goes these ways meanwhile; others may have cut them, too."""
        ways = [*ways]
        self._count(ways, 1)
        try:
            yield
        finally:
            self._count(ways, -1)

    def _count(self, ways: list[Way], by: int) -> None:
        with self._lock:
            before = {way for way in ways if self._cuts[way]}
            for way in ways:
                self._cuts[way] += by
            after = {way for way in ways if self._cuts[way]}
            changed = sorted(f"{a.address} . {b.address}" for a, b in before ^ after)
            if changed:
                verb = "add" if by > 0 else "delete"
                _run(self._router, "nft", verb, "element", "ip", "routed", "cut", f"{{ {', '.join(changed)} }}")

    def close(self) -> None:
        """Remove everything, once no process is left in it."""
        for fd in (*(machine.fd for machine in self.machines), self._router):
            os.close(fd)


@contextlib.contextmanager
def network(count: int) -> Iterator[Network]:
    """As many machines, joined."""
    made = Network(count)
    try:
        yield made
    finally:
        made.close()


def both_ways(some: Iterable[Machine], others: Iterable[Machine]) -> list[Way]:
    """All ways between some machines and others."""
    others = [*others]
    return [way for a in some for b in others if a is not b for way in ((a, b), (b, a))]


def _run(fd: int, *command: str, text: str = "") -> None:
    """Run a command in a network namespace."""
    done = netns.in_network(
        fd, lambda: subprocess.run(command, input=text, check=False, capture_output=True, text=True)
    )
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
