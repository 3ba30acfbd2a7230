"""A console that serves: in its own process, or in the foreground of ``isolator console``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator, Sequence

import uvicorn

from host.console.app import App
from host.console.connections import Places, protocol
from host.console.sessions import Sessions
from host.console.upstream import Live, Upstream
from isolator.ipc.tasks import Tasks
from isolator.paths import Paths
from isolator.policy.host import HostConfig

LEAVE_SECONDS = 3
"""For open requests, when the console ends or another process takes its place."""
LONGEST_HEAD = 16_384
"""Bytes of a request's line and headers."""


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to whoever runs this."""
        yield


class Serving:
    """A console on these listeners, which it owns."""

    def __init__(
        self, paths: Paths, listeners: Sequence[socket.socket], sessions: Sessions, *, config: HostConfig | None = None,
        secrets: dict[str, tuple[str, ...]] | None = None,
    ) -> None:  # fmt: skip
        self.listeners, self.sessions = list(listeners), sessions
        ports = [one.getsockname()[1] for one in listeners if one.family != socket.AF_UNIX]
        self._upstream = Upstream(paths.control_socket)
        self._live = Live(self._upstream)
        self.app = App(
            self._upstream, self._live, sessions, paths.audit_log, port=ports[0] if ports else None, config=config,
            secrets=secrets,
        )  # fmt: skip
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it has a line for each request that is no HTTP
        self._server = _Server(
            uvicorn.Config(
                self.app.asgi, http=protocol(Places()), ws="none", lifespan="off", log_config=None, access_log=False,
                proxy_headers=False, server_header=False, interface="asgi3", loop="none", backlog=64,
                h11_max_incomplete_event_size=LONGEST_HEAD, timeout_graceful_shutdown=LEAVE_SECONDS,
            )
        )  # fmt: skip
        self._tasks = Tasks()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Connect to the daemon and serve; raises IsolatorError."""
        await self._upstream.open()
        self._tasks.keep("trail of the console", self._live.run)
        self._task = asyncio.create_task(self._server.serve(self.listeners))

    async def check(self) -> None:
        """Ask the daemon anything; raises DeniedError where this user may not."""
        await self._upstream.call("status")

    async def end(self) -> None:
        """Accept nothing more, and give open requests ``LEAVE_SECONDS``."""
        self.app.end()
        self._server.should_exit = True
        if self._task is not None:
            await self._task
        await self._tasks.close()
        await self._upstream.close()
