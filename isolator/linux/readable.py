"""Await a descriptor in the running event loop: data to read, or the end of a process (pidfd)."""

from __future__ import annotations

import asyncio
import select
import socket


def is_readable(fd: int) -> bool:
    """Whether ``fd`` is readable now."""
    waits = select.poll()
    waits.register(fd, select.POLLIN)
    return bool(waits.poll(0))


async def readable(fd: int) -> None:
    """Wait until ``fd`` is readable; a pidfd is once its process has ended. No other reader of ``fd`` may be set."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, resolve, ready)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


async def receive(sock: socket.socket, most: int) -> bytes:
    """Read from a socket that does not block, once there is something; whoever is cancelled has read nothing.

    The event loop's ``sock_recv`` has, in the turn in which something comes. Raises OSError.
    """
    while True:
        try:
            return sock.recv(most)
        except BlockingIOError:
            await readable(sock.fileno())


def resolve(future: asyncio.Future[None]) -> None:
    """Set a future's result unless it is done (a callback may come twice in one turn of the loop)."""
    if not future.done():
        future.set_result(None)
