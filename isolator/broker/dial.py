"""Connect to the first address that answers; the caller has checked each of them."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Sequence

from isolator.broker.buffers import keep_small
from isolator.ipc.fence import Fence
from isolator.ipc.tasks import cancel_all
from isolator.policy.addresses import Address

STAGGER = 0.25
"""Seconds that one address has before the next is tried beside it (RFC 8305)."""
TIMEOUT = 10.0
"""Seconds for all addresses together."""
_KIND = int(socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
_UNDER_WAY = frozenset({errno.EINPROGRESS, errno.EALREADY})


async def dial(
    addresses: Sequence[Address], port: int, fence: Fence, *, small: bool = False
) -> tuple[socket.socket, Address]:
    """Connect by TCP; returns the socket and the address that answered. Raises OSError, ETIMEDOUT after ``TIMEOUT``.

    ``fence``: no connection is begun past this deadline. ``small``: with buffers that do not grow. Nothing is awaited
    for an address nearby, which mostly answers at once.
    """
    loop = asyncio.get_running_loop()
    waiting = list(addresses)
    running: dict[asyncio.Task[socket.socket], Address] = {}
    failure: OSError | None = None
    end = loop.time() + TIMEOUT
    try:
        while waiting or running:
            if waiting:
                address = waiting.pop(0)
                if fence.closed:
                    await fence.opened()
                try:
                    sock, there = _begin(address, port, small=small)
                except OSError as error:
                    failure = error
                    continue
                if there:
                    return sock, address
                connecting = _established(sock, address, port, end)
                if not (waiting or running):
                    return await connecting, address
                running[loop.create_task(connecting)] = address
            left = end - loop.time()
            pause = min(STAGGER, left) if waiting else left
            done, _ = await asyncio.wait(running, timeout=max(pause, 0), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                address = running.pop(task)
                failed = task.exception()
                if failed is None:
                    return task.result(), address
                if not isinstance(failed, OSError):
                    raise failed
                failure = failed
            if loop.time() >= end:
                raise OSError(errno.ETIMEDOUT, "no answer in time")
        raise failure or OSError(errno.EADDRNOTAVAIL, "no address to connect to")
    finally:
        for result in await cancel_all(running):
            if isinstance(result, socket.socket):
                result.close()


def _begin(address: Address, port: int, *, small: bool) -> tuple[socket.socket, bool]:
    """A connection under way, and whether it is there already, as to one nearby it mostly is; raises OSError."""
    sock = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, _KIND)
    try:
        if small:
            keep_small(sock)
        where = (str(address), port)
        error = sock.connect_ex(where)
        if error in _UNDER_WAY:  # asked again, a near one has answered by now, and no turn of the loop is waited for
            error = sock.connect_ex(where)
        if error and error not in _UNDER_WAY:
            raise OSError(error, os.strerror(error))
    except BaseException:  # the socket has no other owner yet
        sock.close()
        raise
    return sock, not error


async def _established(sock: socket.socket, address: Address, port: int, end: float) -> socket.socket:
    """Wait for a connection that is under way; raises OSError, ETIMEDOUT at ``end``. Closes one that fails."""
    try:
        await asyncio.sleep(0)  # in a task from here on (``begun``), as a time-out needs one
        async with asyncio.timeout_at(end):
            await asyncio.get_running_loop().sock_connect(sock, (str(address), port))
    except BaseException as error:  # cancelled too
        sock.close()
        if isinstance(error, TimeoutError) and error.errno is None:
            raise OSError(errno.ETIMEDOUT, "no answer in time") from error
        raise
    return sock
