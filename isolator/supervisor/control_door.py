"""Who may connect to the control socket: everybody, and while others flood it only users with a role.

Everybody may, as a rule: a caller without a role is told so, and is in the trail. One who connects without end gets the
refusals of the kernel instead, which cost nobody but itself, for ``SHUT`` seconds.
"""

from __future__ import annotations

import asyncio
import logging
import socket

from isolator.audit.client import AuditClient
from isolator.audit.schema import ControlShut
from isolator.ipc import messages
from isolator.linux.peer import allow_all, allow_only
from isolator.paths import Paths
from isolator.policy.host import HostConfig
from isolator.supervisor.listener import listen

SHUT = 60.0
"""Seconds for which only users with a role may connect."""
_BACKLOG = 1024  # until the host sets its own

_logger = logging.getLogger(__name__)


class ControlDoor:
    """The name of the control socket. Whether it is shut is handed over, and forgotten when the supervisor dies."""

    def __init__(self, paths: Paths, config: HostConfig, audit: AuditClient) -> None:
        self._path, self._config, self._audit = paths.control_socket, config, audit
        self._opens: asyncio.TimerHandle | None = None

    def listen(self) -> socket.socket:
        """Return a fresh listener, to which everybody may connect: the caller's uid decides what it may do."""
        self.close()
        return listen(self._path, mode=0o666, owner=0, backlog=_BACKLOG)

    async def shut(self, request: messages.ShutOut) -> None:
        """Let in only users with a role, for a while; they are let in without a moment between."""
        if self._opens is not None or not self._shut_until(asyncio.get_running_loop().time() + SHUT):
            return
        _logger.warning(
            "uid %d floods the control socket and has no role: for %.0f s only users with one can connect",
            request.uid, SHUT,
        )  # fmt: skip
        self._audit.record(ControlShut(uid=request.uid, seconds=SHUT))

    def _shut_until(self, until: float) -> bool:
        self._opens = asyncio.get_running_loop().call_at(until, self.open)
        try:
            allow_only(self._path, self._config.known())
        except OSError as error:
            _logger.warning("%s: cannot keep out users without a role: %s", self._path, error.strerror)
            return False
        return True

    @property
    def opens(self) -> float | None:
        """Loop time at which it opens; None while it is open."""
        return self._opens.when() if self._opens is not None else None

    def adopt(self, opens: float | None) -> None:
        """Go on with a door that was ``opens`` before this process's exec; who has a role may have changed."""
        if opens is None:
            self.open()
        else:
            self._shut_until(opens)

    def open(self) -> None:
        """Let in everybody again; nothing where there is no socket."""
        self.close()
        try:
            allow_all(self._path)
        except FileNotFoundError:
            pass
        except OSError as error:
            _logger.error("%s: users without a role are still kept out: %s", self._path, error.strerror)

    def close(self) -> None:
        """Forget that it is shut."""
        if self._opens is not None:
            self._opens.cancel()
            self._opens = None
