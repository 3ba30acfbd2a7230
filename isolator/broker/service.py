"""The broker's process: ``python -I -m isolator.broker.service --channel-fd N --filter-fd F [--audit-fd M]``.

Started by the supervisor as an unprivileged user without capabilities, in the host's network namespace. It cannot make
sockets inside cages: the supervisor hands them over. It ends when its channel closes, and every cage's listeners with
it, so their connects are refused.
"""

from __future__ import annotations

import asyncio
import os
import socket

from isolator.audit.client import AuditClient
from isolator.broker.broker import Broker
from isolator.broker.hardening import harden
from isolator.ipc import messages
from isolator.ipc.body import by_op
from isolator.ipc.channel import Channel
from isolator.linux.descriptors import open_standard_streams
from isolator.linux.unprivileged import inherited


async def serve(channel_socket: socket.socket, audit_socket: socket.socket | None) -> None:
    """Serve the supervisor's calls until its channel closes."""
    audit = AuditClient(audit_socket)
    channel = Channel(channel_socket, name="supervisor")
    broker = Broker(audit, channel)
    handlers = broker.succession.handlers() | by_op(
        messages.BrokerHello.on(broker.hello),
        messages.AttachCage.on_fds(broker.attach),
        messages.DetachCage.on(broker.detach),
        messages.FencePlugin.on(broker.fence),
        messages.NewAuditSocket.on_fds(broker.audit_source),
        messages.Leave.on(broker.leave),
    )
    for op, handler in handlers.items():
        channel.handle(op, handler)
    try:
        await channel.closed.wait()
    finally:
        await broker.close()
        audit.close()


def main() -> None:
    """Entry point of the process."""
    open_standard_streams()
    fds = inherited()
    with os.fdopen(fds["filter"], "rb") as program:
        harden(program.read())
    audit = socket.socket(fileno=fds["audit"]) if "audit" in fds else None
    asyncio.run(serve(socket.socket(fileno=fds["channel"]), audit))


if __name__ == "__main__":
    main()
