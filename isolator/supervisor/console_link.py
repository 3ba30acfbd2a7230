"""The console's process: HTTP for people and programs, with the rights of a viewer.

It gets its listeners: it cannot make sockets of the network itself. The secrets of the ingresses are read here, from
files of root's, and told to nobody else.
"""

from __future__ import annotations

import contextlib
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from isolator.broker.hardening import CONSOLE, filter_file
from isolator.errors import IsolatorError, UnavailableError
from isolator.ipc.channel import Channel
from isolator.ipc.messages import ConsoleHello
from isolator.layers.user import add_group
from isolator.paths import Paths
from isolator.policy.host import Console, HostConfig
from isolator.supervisor.alarms import ServiceHealth
from isolator.supervisor.listener import listen
from isolator.supervisor.secret_file import secrets_of
from isolator.supervisor.service import ChildProcess, Ways

if TYPE_CHECKING:
    from isolator.ipc.handover import ServiceState

MODULE = "host.console.service"
"""Named, never imported, as the host's."""
_NEEDED = ("starlette", "uvicorn", "jinja2")


class ConsoleLink:
    """The console's process."""

    def __init__(
        self, process: ChildProcess, paths: Paths, config: HostConfig, settings: Console, health: ServiceHealth
    ) -> None:
        self.process = process
        self._paths, self._config, self._settings, self._health = paths, config, settings, health
        self._group = add_group(paths.named("isolator"))

    async def start(self) -> bool:
        """Start the process; False, with an alarm, when it cannot be: the daemon does without it."""
        try:
            missing = [name for name in _NEEDED if find_spec(name) is None]
            if missing:
                why = f"{', '.join(missing)} not installed"
                raise UnavailableError("[console]", why, "pip install 'isolator[console]', then isolator reload")
            await self.process.start(self._ways)
        except (IsolatorError, OSError) as error:
            await self.process.stop()
            self._health.does_not_start(CONSOLE, error)
            return False
        return True

    def adopt(self, before: ServiceState) -> None:
        """Keep the process running that is there since before this process's exec."""
        self.process.adopt(before, self._ways)

    @property
    def _ways(self) -> Ways:
        return Ways(
            self.introduce, inherit=self.inherited, succeed=lambda: self.succeed, succession=self.inherited
        )  # fmt: skip

    def inherited(self) -> dict[str, int]:
        """The descriptors that every process of it gets."""
        return {"filter": filter_file(self._paths.cache, CONSOLE)}

    async def introduce(self, channel: Channel) -> None:
        """Say hello to a new process, with new listeners."""
        with contextlib.ExitStack() as stack:
            path = self._paths.console_socket
            listeners = [stack.enter_context(listen(path, mode=0o660, owner=0, group=self._group, backlog=64))]
            if (port := self._settings.port) is not None:
                try:
                    listeners.append(stack.enter_context(socket.create_server(("127.0.0.1", port), backlog=64)))
                except OSError as error:
                    raise UnavailableError(f"[console] port {port}", error.strerror or str(error)) from None
            fds = [listener.fileno() for listener in listeners]
            await self.process.first_answer(channel.ask(self._hello(0), fds=fds))

    async def succeed(self, channel: Channel, parts: int) -> None:
        """Say hello to a process that takes the place of another, with the listeners of that one."""
        await channel.ask(self._hello(parts))

    def _hello(self, parts: int) -> ConsoleHello:
        # Its own settings and the roles: nothing else is its business.
        config = HostConfig(roles=self._config.roles, console=self._settings).model_dump(mode="json")
        return ConsoleHello(root=str(self._paths.root), config=config, secrets=self._secrets(), parts=parts)

    def _secrets(self) -> dict[str, tuple[str, ...]]:
        found = {}
        for name, ingress in self._settings.ingress.items():
            alarm = f"ingress {name}"
            try:
                found[name] = secrets_of(
                    Path(ingress.secret_file), "put the ingress's secret there", "one secret a line, whsec_ and base64"
                )
                self._health.alarms.settle(alarm, 0.0)
            except IsolatorError as error:
                found[name] = ()  # nothing gets in there; the others go on
                self._health.alarms.raise_(alarm, str(error))
        return found
