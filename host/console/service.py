"""The console's process: ``python3 -I -m host.console.service --channel-fd N --filter-fd M``, for ``[console]``.

It runs as a user of its own without any privilege, in the group that may read the trail. It makes no sockets but Unix
sockets and starts no program: whoever breaks it can read what a viewer can, and emit where that is turned on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys

from host.console.serving import Serving
from host.console.sessions import Session, Sessions
from isolator.broker.hardening import harden
from isolator.errors import IsolatorError, UsageError
from isolator.ipc.body import Body, by_op
from isolator.ipc.channel import Channel
from isolator.ipc.formats import Formats
from isolator.ipc.messages import ConsoleHello, Leave, Left
from isolator.ipc.succession import Departure, Succession
from isolator.linux import daemon_log
from isolator.linux.descriptors import open_standard_streams
from isolator.linux.unprivileged import inherited
from isolator.paths import Paths
from isolator.policy.host import HostConfig

_logger = logging.getLogger(__name__)


class ConsoleState(Body):
    """A console on its way to another that takes its place.

    Whoever changes it, in whatever way, makes the next format of it.
    """

    listeners: tuple[int, ...]
    sessions: dict[str, Session]


FORMATS = Formats(ConsoleState, 1)


async def serve(channel_fd: int, filter_fd: int) -> None:
    """Serve until the supervisor closes its channel."""
    channel = Channel(socket.socket(fileno=channel_fd), name="supervisor")
    serving: Serving | None = None
    succession = Succession(FORMATS)

    async def hello(request: ConsoleHello, fds: list[int]) -> None:
        nonlocal serving
        if serving is not None:
            raise UsageError("hello", "was already said")
        paths, config = Paths.of(request.root), HostConfig.model_validate(request.config)
        with os.fdopen(filter_fd, "rb") as program:
            harden(program.read(), _readable(paths))
        sessions = Sessions()
        if request.parts:
            state, descriptors = succession.unpack(request.parts)
            with descriptors:
                listeners = [socket.socket(fileno=descriptors.take(number)) for number in state.listeners]
            sessions.take_over(state.sessions)
            if _port_of(listeners) != (config.console.port if config.console is not None else None):
                raise UsageError("[console] port", "was changed")  # the next process gets new listeners
        else:
            listeners = [socket.socket(fileno=fd) for fd in fds]
            fds.clear()
        serving = Serving(paths, listeners, sessions, config=config, secrets=request.secrets)
        await serving.start()

    async def leave(_: Leave) -> Left:
        if serving is None:
            return Left(refused="it does not serve yet")
        departure = Departure()
        numbers = tuple(departure.copy(one.fileno()) for one in serving.listeners)
        await serving.end()
        state = ConsoleState(listeners=numbers, sessions=serving.sessions.pass_on())
        return Left(parts=await succession.send(state, departure, channel))

    for op, handler in (succession.handlers() | by_op(ConsoleHello.on_fds(hello), Leave.on(leave))).items():
        channel.handle(op, handler)
    await channel.closed.wait()
    if serving is not None:
        await serving.end()


def _readable(paths: Paths) -> list[str]:
    """The program, its libraries, and the trail."""
    return [place for place in (*sys.path, sys.base_prefix, str(paths.audit_log)) if os.path.isdir(place)]


def _port_of(listeners: list[socket.socket]) -> int | None:
    ports = [one.getsockname()[1] for one in listeners if one.family != socket.AF_UNIX]
    return ports[0] if ports else None


def main() -> None:
    """Entry point of the process."""
    open_standard_streams()
    fds = inherited()
    daemon_log.set_up()
    if os.geteuid() == 0:
        _logger.error("host.console.service: refuses to run as root; it is started by 'isolator serve'")
        sys.exit(2)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the supervisor ends it, by its channel
    os.umask(0o027)
    try:
        asyncio.run(serve(fds["channel"], fds["filter"]))
    except IsolatorError as error:
        _logger.error("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
