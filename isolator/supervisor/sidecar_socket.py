"""The Unix socket of one run of a sidecar: looked for, connected to, lent to the host.

The plugin can put anything under its name at any moment. So what is there is opened anew for each use, must be a socket
of the plugin's own user, and is reached through the descriptor that was checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from isolator.audit.schema import FsDenied
from isolator.errors import DeniedError, UnavailableError
from isolator.linux.files import let_group_write, openat2
from isolator.linux.shortage import is_shortage
from isolator.supervisor import reach
from isolator.supervisor.cage_spec import SOCKET
from isolator.supervisor.reach import Identity, identity

if TYPE_CHECKING:
    from isolator.audit.client import AuditClient
    from isolator.cage.cage import Cage

CTIME_STEP = 0.02
"""Seconds after which a change of a file has another ``st_ctime``: two of the kernel's slowest ticks."""


@dataclass
class SidecarSocket:
    """The socket in the folder ``place`` of a cage."""

    plugin: str
    run: str
    cage: Cage
    place: Identity
    audit: AuditClient

    @contextlib.contextmanager
    def folder(self) -> Iterator[int]:
        """A descriptor of the socket directory (O_PATH); raises OSError, FileNotFoundError when the cage has ended."""
        if not self.cage.started:
            raise FileNotFoundError(errno.ENOENT, "the cage has ended", reach.SOCKET_FOLDER)
        folder = reach.open_folder(self.cage.pid, self.place)
        try:
            yield folder
        finally:
            os.close(folder)

    def exists(self) -> bool:
        """Whether anything has its name; raises OSError when no descriptor is free to look for it."""
        try:
            with self.folder() as folder:
                os.close(openat2(folder, SOCKET, os.O_PATH | os.O_NOFOLLOW))
        except OSError as error:
            if is_shortage(error):
                raise
            return False
        return True

    def connect(self, uid: int) -> socket.socket:
        """Connect to it at once; raises OSError when that takes longer, DeniedError if it is none of the user's."""
        fd = self._open(uid)
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.setblocking(False)
            try:
                # Through the descriptor that was just checked: the name may mean something else by now.
                connection.connect(f"/proc/self/fd/{fd}")
            except BaseException:
                connection.close()
                raise
            return connection
        finally:
            os.close(fd)

    async def lend(self, uid: int, gid: int, alive: Callable[[], bool]) -> tuple[int, int]:
        """Open its file for processes with the group ``gid``, which may connect from then on.

        Returns a descriptor that is good for nothing else, and the file's ``st_ctime_ns``. Until that changes, the name
        stands for this file: to rename, replace or remove it changes the time. Raises OSError, UnavailableError unless
        the run is ``alive``, or as ``connect``.
        """
        fd = self._open(uid)
        try:
            let_group_write(fd, gid)
            before = os.fstat(fd)
            await asyncio.sleep(CTIME_STEP)
            if alive():
                with self.folder() as folder:
                    now = os.stat(SOCKET, dir_fd=folder, follow_symlinks=False)
                if (identity(now), now.st_ctime_ns) == (identity(before), before.st_ctime_ns):
                    return fd, now.st_ctime_ns
            raise UnavailableError(f"plugin {self.plugin}", "its socket was just replaced", "tried again")
        except BaseException:
            os.close(fd)
            raise

    def _open(self, uid: int) -> int:
        """Open what has the socket's name (O_PATH); raises DeniedError if it is no socket of the user's, OSError."""
        try:
            with self.folder() as folder:
                fd = openat2(folder, SOCKET, os.O_PATH | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EXDEV):
                raise DeniedError(f"plugin {self.plugin}", "its socket is a link", "nothing was sent") from None
            raise
        info = os.fstat(fd)
        if stat.S_ISSOCK(info.st_mode) and info.st_uid == uid:
            return fd
        os.close(fd)
        denied = FsDenied(path=SOCKET, count=1, why="not a socket of the plugin's own")
        self.audit.record(denied, plugin=self.plugin, run=self.run)
        raise DeniedError(f"plugin {self.plugin}", "its socket was replaced by something else", "nothing was sent")
