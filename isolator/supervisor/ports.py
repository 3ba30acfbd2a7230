"""Ports of a cage's own loopback, which nobody but its programs can listen on."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from isolator.base.pacing import Backoff
from isolator.ipc.tasks import opened_in_thread
from isolator.layers.network import namespace as network_layer

_SECONDS = 1.0
"""A connection takes no time, unless nobody accepts."""
_LISTEN = "0A"
"""The state of a listening socket in /proc/net/tcp."""


async def connect(network: network_layer.CageNetwork, port: int) -> socket.socket:
    """A connection to the port; raises OSError, BlockingIOError when the listener's backlog is full."""
    for version, address in ((4, "127.0.0.1"), (6, "::1")):
        connection = await _unconnected(network, version)
        try:
            async with asyncio.timeout(_SECONDS):
                await asyncio.get_running_loop().sock_connect(connection, (address, port))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except TimeoutError:
            connection.close()
            raise BlockingIOError(errno.EAGAIN, "its backlog is full") from None
        except ConnectionRefusedError:
            connection.close()
            if version == 6:
                raise
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    raise AssertionError


async def _unconnected(network: network_layer.CageNetwork, version: int) -> socket.socket:
    """A socket inside."""
    (fd,) = await opened_in_thread(partial(network_layer.connectors, network, 1, version=version))
    connection = socket.socket(fileno=fd)
    connection.setblocking(False)
    return connection


async def until_listening(pid: int, port: int) -> None:
    """Return once somebody listens on the port in the network of a process: nothing tells of that by itself."""
    pause = Backoff(0.01, 0.25)
    tables = [Path(f"/proc/{pid}/net/{name}") for name in ("tcp", "tcp6")]
    while not await asyncio.to_thread(_listens, tables, port):  # noqa: ASYNC110 # see above
        await asyncio.sleep(pause.next())


def _listens(tables: Iterable[Path], port: int) -> bool:
    """Whether one of these tables of sockets (proc_pid_net(5)) has a listener on the port."""
    for table in tables:
        with contextlib.suppress(OSError):
            for line in table.read_text("ascii").splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    return True
    return False
