"""Virtual addresses: within a cage every name has an address of its own, so a connection shows its name.

An address is derived from the name (hash, then the next free slot), and names that are granted exactly have theirs from
the start. A broker that was restarted therefore gives most names the address they had, which programs may still hold.
An address goes to another name only when the pool is full, it was last answered long ago, and no flow uses it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address

from isolator.ipc.body import Body
from isolator.policy.destinations import Rules, VirtualGroup

TTL = 30
"""Seconds that a cage may keep an answer."""
KEEP = 600.0
"""Seconds after its last answer in which an address stays with its name: well over TTL, which some programs ignore."""
CAPACITY = 2048


@dataclass
class Entry:
    """A name's address in one cage; ``flows`` counts connections that use it."""

    name: str
    address: IPv4Address
    answered: float
    flows: int = 0
    fixed: bool = False


class EntryState(Body):
    """A name's address on its way to another broker."""

    name: str
    address: str
    answered: float
    fixed: bool


class VirtualPool:
    """The virtual addresses of one cage. ``clock`` is monotonic, in seconds."""

    def __init__(self, rules: Rules, clock: Callable[[], float], *, capacity: int = CAPACITY) -> None:
        self._groups = rules.virtual_groups
        self._ports = rules.name_ports
        self._clock = clock
        self._capacity = capacity
        # Oldest answer first: ``lookup`` moves a name to the end.
        self._by_name: dict[str, Entry] = {}
        self._by_address: dict[IPv4Address, Entry] = {}
        for name in rules.exact_names:
            self._allocate(name, fixed=True)

    def __len__(self) -> int:
        return len(self._by_name)

    def pass_on(self) -> tuple[EntryState, ...]:
        """Every address with its name, for another broker; the oldest answer first."""
        return tuple(
            EntryState(name=e.name, address=str(e.address), answered=e.answered, fixed=e.fixed)
            for e in self._by_name.values()
        )

    def take_over(self, entries: Iterable[EntryState]) -> None:
        """Go on with the addresses that another broker has answered."""
        self._by_name.clear()
        self._by_address.clear()
        for one in entries:
            entry = Entry(one.name, IPv4Address(one.address), one.answered, fixed=one.fixed)
            self._by_name[entry.name] = self._by_address[entry.address] = entry

    def lookup(self, name: str) -> IPv4Address | None:
        """The address to answer for a granted name, allocated if need be; None when the pool is full."""
        entry = self._by_name.pop(name, None)
        if entry is not None:
            self._by_name[name] = entry
            entry.answered = self._clock()
            return entry.address
        if len(self._by_name) >= self._capacity and not self._recycle():
            return None
        return self._allocate(name, fixed=False)

    def entry(self, address: IPv4Address) -> Entry | None:
        """The name that has ``address``, or None when it was never answered or belongs to another by now."""
        return self._by_address.get(address)

    def _allocate(self, name: str, *, fixed: bool) -> IPv4Address | None:
        group = self._group(self._ports(name))
        if group is None:
            return None
        # The first and the last address of a subnet confuse some programs.
        size = group.network.num_addresses - 2
        start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % size
        for offset in range(size):
            address = group.network[1 + (start + offset) % size]
            if address not in self._by_address:
                entry = Entry(name, address, self._clock(), fixed=fixed)
                self._by_name[name] = self._by_address[address] = entry
                return address
        return None

    def _group(self, ports: frozenset[int]) -> VirtualGroup | None:
        """The group with exactly these ports, else the first, which has the ports of all."""
        return next((one for one in self._groups if one.ports == ports), self._groups[0] if self._groups else None)

    def _recycle(self) -> bool:
        """Free the address whose last answer is longest ago, if that is long enough and nothing uses it."""
        oldest = self._clock() - KEEP
        for entry in self._by_name.values():
            if entry.answered > oldest:
                return False
            if not entry.flows and not entry.fixed:
                del self._by_name[entry.name], self._by_address[entry.address]
                return True
        return False
