"""The host's own addresses, gateways and neighbours, kept current: no cage may reach them, whatever is granted.

The kernel answers for each connection whether an address is the host's own, or that of a neighbour, so a new one has no
moment in which it could be reached. A neighbour is an IPv6 address that the host would look for on its own link: with
IPv4 whatever is at home or in the office has a private address, with IPv6 a public one. Gateways are read in the
broker's (the host's) namespace, in a thread, for a router has a million routes; a netlink socket that is subscribed to
changes says when to read again.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

from isolator.ipc.tasks import Tasks
from isolator.linux.netlink import RouteQuery
from isolator.linux.routes import read_network
from isolator.policy.addresses import Address, spellings
from isolator.policy.denial import DenialRule

_GROUPS = 0x10 | 0x40 | 0x100 | 0x400  # RTMGRP_IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE
_DEBOUNCE = 0.05
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
        self._stale = asyncio.Event()
        self._tasks = Tasks()

    def owner(self, address: Address) -> DenialRule | None:
        """The rule that refuses ``address`` (HOST_ADDRESS, GATEWAY, NEIGHBOUR), or None; any spelling counts."""
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

    async def watch(self) -> None:
        """Read now, and again after each change, on the running event loop; raises OSError."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.setblocking(False)
        self._socket.bind((0, _GROUPS))
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
            self._socket.close()
            self._socket = None

    def _changed(self) -> None:
        # Everything is read again, whichever part has changed and even if notices were lost (ENOBUFS).
        with contextlib.suppress(OSError):
            while self._socket is not None and self._socket.recv(65536):
                pass
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
