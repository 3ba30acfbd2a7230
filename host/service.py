"""The host process: ``python3 -I -m host.service --channel-fd N --audit-fd M``, started by the supervisor.

It runs as a user of its own without any privilege, and ends when its channel closes.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import socket
import sys

import prctl

from host.host import Host
from isolator.audit.client import AuditClient
from isolator.errors import IsolatorError
from isolator.ipc.channel import Channel


async def serve(channel_fd: int, audit_fd: int | None) -> int:
    """Serve until the supervisor goes away or says SIGTERM."""
    loop = asyncio.get_running_loop()
    channel = Channel(socket.socket(fileno=channel_fd), name="supervisor")
    audit = AuditClient(socket.socket(fileno=audit_fd) if audit_fd is not None else None)
    host = Host(channel, audit)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    closed = asyncio.create_task(channel.closed.wait())
    stopped = asyncio.create_task(stop.wait())
    frozen = asyncio.create_task(_settle(host))
    await asyncio.wait((closed, stopped), return_when=asyncio.FIRST_COMPLETED)
    for task in (closed, stopped, frozen):
        task.cancel()
    await host.close()
    channel.close()
    audit.close()
    return 0


async def _settle(host: Host) -> None:
    """After the start-up no object of it will ever be garbage: keep the collector from walking them all again."""
    await host.started.wait()
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="host.service")
    parser.add_argument("--channel-fd", type=int, required=True)
    parser.add_argument("--audit-fd", type=int)
    arguments = parser.parse_args()
    if os.geteuid() == 0:
        # What plugins send is parsed here: this process must never be one that can do harm.
        os.write(2, b"isolator: host.service: refuses to run as root; it is started by 'isolator serve'\n")
        sys.exit(2)
    os.umask(0o027)
    # This process knows every secret: no dump of it, and no debugger of the same uid.
    prctl.set_dumpable(False)
    try:
        sys.exit(asyncio.run(serve(arguments.channel_fd, arguments.audit_fd)))
    except IsolatorError as error:
        os.write(2, f"isolator: {error}\n".encode())
        sys.exit(1)


if __name__ == "__main__":
    main()
