"""The host's own addresses, gateways and neighbours, kept current: no cage may reach them, whatever is granted.

The kernel says whether an address is the host's own, or that of a neighbour. That it is neither is believed for
``KEPT`` seconds at most, and only while no notice of a change has come, read or not: so a new one has no moment in
which it could be reached. A neighbour is an IPv6 address that the host would look for on its own link: with IPv4
whatever is at home or in the office has a private address, with IPv6 a public one. Gateways are read in the broker's
(the host's) namespace, in a thread, for a router has a million routes; the same notices say when to read again.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import time

from isolator.ipc.tasks import Tasks
from isolator.linux.netlink import RouteQuery
from isolator.linux.routes import read_network
from isolator.policy.addresses import Address, spellings
from isolator.policy.denial import DenialRule

_GROUPS = 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | 0x40000  # RTMGRP_IPV4_IFADDR, _ROUTE, _RULE, IPV6_IFADDR, _ROUTE, _RULE
_DEBOUNCE = 0.05
KEPT = 1.0
"""Seconds for which an answer counts, should something change of which no notice comes (a switch in /proc/sys)."""
_MOST_KEPT = 1024
_NO_NEIGHBOURS = 0x08 | 0x10 | 0x80  # IFF_LOOPBACK, IFF_POINTOPOINT, IFF_NOARP


class HostAddresses:
    """The host's addresses and gateways; the latter are known after ``watch``, which also keeps them current."""

    def __init__(self) -> None:
        self._own: frozenset[Address] = frozenset()
        self._gateways: frozenset[Address] = frozenset()
        self._tunnels: frozenset[int] = frozenset()
        """Devices with one other end, or without neighbours: routes through them have no gateway anyway."""
        self._routes = RouteQuery()
        self._socket: socket.socket | None = None
        self._notices = select.poll()
        self._stale = asyncio.Event()
        self._others: set[Address] = set()
        """Addresses that were neither when the kernel was asked; believed until ``_until``, on CLOCK_MONOTONIC."""
        self._until = 0.0
        self._tasks = Tasks()

    def owner(self, address: Address) -> DenialRule | None:
        """The rule that refuses ``address`` (HOST_ADDRESS, GATEWAY, NEIGHBOUR), or None; any spelling counts."""
        if self._socket is None or time.monotonic() >= self._until or self._notices.poll(0):
            self._forget()
        others = self._others
        if address in others:
            return None
        found = self._ask(address)
        if found is None and len(others) < _MOST_KEPT:
            others.add(address)
        return found

    def _forget(self) -> None:
        # A new set, as this may be another thread: what is asked at this moment is added to the old one.
        self._others, self._until = set(), time.monotonic() + KEPT

    def _ask(self, address: Address) -> DenialRule | None:
        for item in spellings(address):
            if item in self._own or self._routes.is_own(str(item)):
                return DenialRule.HOST_ADDRESS
            if item in self._gateways:
                return DenialRule.GATEWAY
            if item.version == 6 and self._is_neighbour(item):
                return DenialRule.NEIGHBOUR
        return None

    def _is_neighbour(self, address: Address) -> bool:
        device = self._routes.neighbours_device(str(address))
        return device != 0 and device not in self._tunnels

    def refresh(self) -> None:
        """Read addresses, broadcast addresses and gateways from the kernel; raises OSError."""
        found = read_network()
        self._tunnels = frozenset(index for index, flags in found.flags.items() if flags & _NO_NEIGHBOURS)
        self._own, self._gateways = found.own, found.gateways
        self._forget()

    async def watch(self) -> None:
        """Read now, and again after each change, on the running event loop; raises OSError."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.setblocking(False)
        self._socket.bind((0, _GROUPS))
        self._notices.register(self._socket, select.POLLIN)
        # Subscribed before the first reading: no change falls between the two.
        asyncio.get_running_loop().add_reader(self._socket, self._changed)
        await asyncio.to_thread(self.refresh)
        self._tasks.keep("refresh of the host's addresses", self._keep_current)

    def close(self) -> None:
        """Stop watching."""
        self._routes.close()
        self._tasks.cancel()
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._notices.unregister(self._socket)
            self._socket.close()
            self._socket = None

    def _changed(self) -> None:
        # Everything is read again, whichever part has changed and even if notices were lost (ENOBUFS).
        with contextlib.suppress(OSError):
            while self._socket is not None and self._socket.recv(65536):
                pass
        self._forget()
        self._stale.set()

    async def _keep_current(self) -> None:
        while True:
            await self._stale.wait()
            await asyncio.sleep(_DEBOUNCE)
            self._stale.clear()
            try:
                await asyncio.to_thread(self.refresh)
            except BaseException:
                self._stale.set()  # as stale as before
                raise
