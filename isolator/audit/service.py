"""The audit process, ``python -I -m isolator.audit.service --channel-fd N``, under its own unprivileged user.

It is the only process that can write the trail or read the signing key. The supervisor speaks to it on the channel:
``hello``, ``source``, ``flush``, ``metrics`` (see docs/internals.md); each source sends its records on a socket of
its own to the writer (`writer.py`).

It ignores SIGINT and SIGTERM (a terminal and systemd send them to the whole group, and the last records of the others
still have to be written) and exits when its channel closes, after a last seal.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from isolator.audit.handover import FORMATS, AuditState
from isolator.audit.log import Limits
from isolator.audit.metrics import serve_metrics
from isolator.audit.schema import SENDERS
from isolator.audit.writer import Writer
from isolator.errors import IsolatorError, UsageError
from isolator.ipc import messages
from isolator.ipc.body import by_op
from isolator.ipc.channel import Channel
from isolator.ipc.succession import Departure, Succession
from isolator.linux import daemon_log
from isolator.linux.descriptors import open_standard_streams
from isolator.linux.garbage import spare_the_collector
from isolator.linux.unprivileged import inherited
from isolator.paths import Paths

_log = logging.getLogger("isolator.audit")


def limits_of(config: Mapping[str, Any]) -> Limits:
    """The limits in the ``audit`` section of the host's configuration (``AuditSettings``)."""
    section = config.get("audit") or {}
    return Limits(**{field.name: section[field.name] for field in fields(Limits) if field.name in section})


async def serve(channel: socket.socket) -> None:
    """Serve until the channel closes."""
    writer: Writer | None = None
    listeners: list[asyncio.Server] = []
    succession, left = Succession(FORMATS), False

    def ready() -> Writer:
        if writer is None:
            raise IsolatorError("audit", "hello has to come first")
        return writer

    async def hello(request: messages.AuditHello) -> messages.AuditReady:
        nonlocal writer
        if writer is not None:
            raise IsolatorError("audit", "hello came twice")
        config = request.config
        writer = Writer(Paths.of(request.root), limits_of(config))
        await writer.open()
        asyncio.get_running_loop().call_soon(spare_the_collector)
        section = config.get("metrics") or {}
        wanted = (str(section.get("address", "127.0.0.1")), int(section["port"])) if section.get("port") else None
        if request.parts and await go_on(writer, request.parts, wanted):
            wanted = None
        if wanted is not None:
            try:
                family = socket.AF_INET6 if ":" in wanted[0] else socket.AF_INET
                listener = socket.create_server(wanted, family=family)
                listeners.append(await serve_metrics(writer.metrics, listener))
            except OSError as error:  # the trail is worth more than its metrics
                _log.error("no metrics on %s:%s: %s", *wanted, error.strerror)
        return messages.AuditReady(blocked=writer.blocked, ended=writer.ended, runs=writer.runs)

    async def go_on(taking: Writer, parts: int, wanted: tuple[str, int] | None) -> bool:
        """Go on with another process's state; returns whether it listened on the loopback address that is wanted."""
        found = False
        state, descriptors = succession.unpack(parts)
        with descriptors:
            taking.take_over(state.writer, descriptors)
            for number in state.metrics:
                listener = socket.socket(fileno=descriptors.take(number))
                if listener.family != socket.AF_UNIX:
                    if listener.getsockname()[:2] != wanted:
                        listener.close()
                        continue
                    found = True
                listeners.append(await serve_metrics(taking.metrics, listener))
        return found

    async def leave(_: messages.Leave) -> messages.Left:
        nonlocal left
        leaving = ready()
        if leaving.blocked is not None:
            return messages.Left(refused=leaving.blocked)
        departure = Departure()
        handed = await leaving.pass_on(departure)
        numbers = [departure.copy(sock.fileno()) for one in listeners for sock in one.sockets]
        for one in listeners:
            one.close()
        left = True
        state = AuditState(writer=handed, metrics=tuple(numbers))
        return messages.Left(parts=await succession.send(state, departure, peer))

    async def source(request: messages.RecordSource, fds: list[int]) -> None:
        if request.name not in SENDERS:
            raise UsageError("audit source", f"no source is called {request.name!r}")
        ready().attach(request.name, socket.socket(fileno=fds.pop()))

    async def flush(_: messages.Flush) -> None:
        await ready().flush()

    async def metrics(_: messages.ServeMetrics, fds: list[int]) -> None:
        running = ready()
        while fds:
            listener = socket.socket(fileno=fds.pop())
            listeners.append(await serve_metrics(running.metrics, listener))

    handlers = succession.handlers() | by_op(
        messages.AuditHello.on(hello),
        messages.RecordSource.on_fds(source),
        messages.Flush.on(flush),
        messages.ServeMetrics.on_fds(metrics),
        messages.Leave.on(leave),
    )
    peer = Channel(channel, handlers, name="audit")
    await peer.closed.wait()
    for listener in listeners:
        listener.close()
    if writer is not None and not left:
        await writer.stop()


def main() -> None:
    """Entry point."""
    open_standard_streams()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    daemon_log.set_up("isolator audit")
    os.umask(0o027)
    asyncio.run(serve(socket.socket(fileno=inherited()["channel"])))
    sys.exit(0)


if __name__ == "__main__":
    main()
