# SPDX-FileCopyrightText: Isolator contributors
# SPDX-License-Identifier: Apache-2.0
"""Address of the control socket, a name for it that connect(2) takes, and the reason of a failure."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from isolator_client.errors import DeniedError, IsolatorError, UnavailableError

SUN_PATH = 107
"""Longest path in bytes that fits into a ``sockaddr_un`` together with its final NUL, see unix(7)."""

_START = "start it with 'systemctl start isolator' or 'isolator serve'"

StrPath = str | os.PathLike[str]


def control_socket(path: StrPath | None = None, root: StrPath | None = None) -> str:
    """Choose the socket: ``path``, else the one below ``root``, else below ``$ISOLATOR_ROOT``, else below ``/``."""
    if path is not None:
        return os.path.abspath(path)
    top = os.fspath(root) if root else os.environ.get("ISOLATOR_ROOT", "")
    return os.path.join(os.path.realpath(top or "/"), "run/isolator/control.sock")


@contextlib.contextmanager
def short_name(path: str) -> Iterator[str]:
    """Provide a name of ``path`` that fits into ``sun_path``; it is valid inside the ``with`` block.

    A long path is reached through a descriptor of its folder. Raises OSError when there is no such folder.
    """
    if len(os.fsencode(path)) <= SUN_PATH:
        yield path
        return
    folder, name = os.path.split(path)
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)


def refusal(error: OSError, path: str) -> IsolatorError:
    """Say why connecting to ``path`` failed. A full backlog (EAGAIN) means that its patience has run out."""
    if isinstance(error, PermissionError):
        why = (
            "this user may not connect to it: a folder is closed to it, or it has no role while others flood the socket"
        )
        remedy = "let this user reach that path, try again in a minute, give it a role in host.toml, or use sudo"
        return DeniedError(path, why, remedy)
    if isinstance(error, (BlockingIOError, TimeoutError)):
        return UnavailableError("the daemon", "too many callers are waiting", "try again")
    if isinstance(error, ConnectionRefusedError):
        why = f"nobody listens at {path} at the moment: a part of it is being started again, or it was killed"
        return UnavailableError("the daemon", why, f"try again; if that does not help, {_START}")
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return UnavailableError("the daemon is not running", f"no {path}", f"{_START}, or name its --root")
    return UnavailableError("the daemon", f"cannot be reached at {path}: {error.strerror or error}", "try again")
