"""Files that only root can write: host.toml and the policies.

These files decide what untrusted code may do, so they are believed only if nobody but root can write them: the file
is opened without following a link, and its owner, type and mode are checked on the descriptor that is then read.
The parser of TOML is imported where there is something to parse.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from isolator.errors import DeniedError, NotFoundError, UsageError
from isolator.linux.descriptors import owning
from isolator.policy.host import HostConfig

MAX_BYTES = 256 * 1024


def load_host_config(path: Path | str, *, also_owner: int | None = None) -> HostConfig:
    """``host.toml``; the defaults when there is no such file. Raises UsageError or DeniedError with file and line."""
    try:
        text = read_trusted(path, also_owner=also_owner)
    except NotFoundError:
        return HostConfig()
    from isolator.policy.parse.host_file import parse_host_config

    return parse_host_config(text, source=str(path))


def read_trusted(path: Path | str, *, also_owner: int | None = None) -> bytes:
    """The bytes of a file that only root can write.

    ``also_owner`` admits one more owner: the person at the command line who names a file of their own.
    """
    try:
        # O_NONBLOCK: opening a FIFO that somebody put there must not hang the daemon.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise NotFoundError(str(path), "no such file") from None
        if error.errno == errno.ELOOP:
            raise DeniedError(str(path), "is a symbolic link", "name the file itself") from None
        raise DeniedError(str(path), error.strerror or str(error), "run as root") from None
    with owning(fd):
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise DeniedError(str(path), "is not a regular file", "name a TOML file")
        if status.st_uid not in (0, also_owner):
            raise DeniedError(str(path), f"belongs to uid {status.st_uid}, not to root", f"chown root {path}")
        # Distributions with user-private groups make files 0664; such a group is its owner alone.
        too_open = stat.S_IWOTH if also_owner and status.st_uid == status.st_gid == also_owner else stat.S_IWOTH | 0o020
        if status.st_mode & too_open:
            mode = stat.S_IMODE(status.st_mode)
            raise DeniedError(str(path), f"others can write it (mode {mode:04o})", f"chmod go-w {path}")
        with open(fd, "rb", closefd=False) as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UsageError(str(path), f"larger than {MAX_BYTES} bytes", "split or shorten it")
        return content


def invoker() -> int:
    """The person at the terminal, through sudo too: their own files are believed there, never by the daemon."""
    if os.geteuid() == 0:
        uid = os.environ.get("SUDO_UID", "")
        return int(uid) if uid.isascii() and uid.isdigit() else 0
    return os.geteuid()
