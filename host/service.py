"""The host process: ``python3 -I -m host.service --channel-fd N --audit-fd M``, started by the supervisor.

It runs as a user of its own without any privilege, and ends when its channel closes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable

import prctl

from host.composition.handover import FORMATS
from host.composition.host import Host
from host.composition.introduction import HostParts, Introduction
from host.wire.strict_json import encode
from isolator.audit.client import AuditClient
from isolator.errors import IsolatorError, UsageError
from isolator.ipc.body import by_op
from isolator.ipc.channel import Channel
from isolator.ipc.messages import HostHello, NewAuditSocket
from isolator.ipc.succession import Descriptors, Succession
from isolator.linux import daemon_log
from isolator.linux.descriptors import open_standard_streams
from isolator.linux.garbage import spare_the_collector
from isolator.linux.unprivileged import inherited
from isolator.paths import Paths

_logger = logging.getLogger(__name__)


async def serve(channel_fd: int, audit_fd: int | None, parts: Callable[[Paths], HostParts]) -> int:
    """Serve until the supervisor closes its channel, or until SIGTERM; returns the exit code."""
    loop = asyncio.get_running_loop()
    channel = Channel(socket.socket(fileno=channel_fd), name="supervisor")
    audit = AuditClient(socket.socket(fileno=audit_fd) if audit_fd is not None else None, encode)
    running: asyncio.Future[Host] = loop.create_future()
    succession = Succession(FORMATS)

    async def hello(request: HostHello, fds: list[int]) -> None:
        if running.done():
            raise UsageError("hello", "was already said")
        introduction = Introduction.read(request, fds)
        state, descriptors = None, Descriptors([])
        if request.parts:
            state, descriptors = succession.unpack(request.parts)
            audit.take_over(state.audit, descriptors)
        host = Host(
            introduction.paths, introduction.settings, channel, audit, succession, state, parts(introduction.paths)
        )  # fmt: skip
        running.set_result(host)
        # Before anything is awaited: a message behind the hello finds its handler.
        for op, handler in host.handlers().items():
            channel.handle(op, handler)
        with descriptors:
            await (host.go_on(introduction, state, descriptors) if state is not None else host.start(introduction))
        loop.call_soon(spare_the_collector)

    async def audit_source(_: NewAuditSocket, fds: list[int]) -> None:
        audit.reconnect(socket.socket(fileno=fds.pop()))

    first = by_op(HostHello.on_fds(hello), NewAuditSocket.on_fds(audit_source))
    for op, handler in (succession.handlers() | first).items():
        channel.handle(op, handler)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    ends = [asyncio.create_task(channel.closed.wait()), asyncio.create_task(stop.wait())]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    for task in ends:
        task.cancel()
    if running.done() and not running.result().left:
        await running.result().close()
    channel.close()
    audit.close()
    return 0


def main(parts: Callable[[Paths], HostParts] = lambda _: HostParts()) -> None:
    """Entry point of the process; ``parts`` of a daemon with these paths."""
    open_standard_streams()
    fds = inherited()
    daemon_log.set_up()
    if os.geteuid() == 0:
        # Bytes of plugins are parsed here: this process must never be one that can do harm.
        _logger.error("host.service: refuses to run as root; it is started by 'isolator serve'")
        sys.exit(2)
    os.umask(0o027)
    # This process knows every secret: no dump of it, and no debugger of the same uid.
    prctl.set_dumpable(False)
    try:
        sys.exit(asyncio.run(serve(fds["channel"], fds.get("audit"), parts)))
    except IsolatorError as error:
        _logger.error("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
