"""Paths of a runner, found for its cage: ``python3 -I -m isolator.collector.paths UID GID GROUPS CAGE``, as root.

Standard input is a packet socket. One packet comes, of the supervisor's making: for each path of the request a letter,
``r`` or ``w``, and the path, with a zero byte between them, and for each the descriptor that the caller has opened. The
answer is a line of its own form (``answer``) and a detached mount for each; or an error, as in ``ipc/run_request.py``.

Root looks, in its own view of mounts, for the very file that a descriptor is of, under its own name; then this process
becomes the caller and asks the kernel whether that one may change what is to be changed. Where a file system hangs it
is this process that hangs.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import stat
import sys
from collections.abc import Sequence

from isolator.collector.hardening import become
from isolator.errors import ConfinementError, DeniedError, IsolatorError, UsageError
from isolator.ipc.packet import receive_message, send_packet
from isolator.ipc.run_request import error_fields, pack
from isolator.layers.filesystem import map_ids
from isolator.linux.descriptors import owning
from isolator.linux.files import check_access
from isolator.linux.namespaces import exchange, new_user_namespace
from isolator.linux.own_view import clone_in_own_view

_SECONDS = 30
"""Its whole life, if nothing that it waits for hangs beyond signals."""


def main() -> None:
    signal.alarm(_SECONDS)
    uid, gid, cage = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[4])
    groups = [int(group) for group in sys.argv[3].split(",") if group]
    with socket.socket(fileno=0) as supervisor:
        packet, fds = receive_message(supervisor)
        paths = [(os.fsdecode(word[1:]), word[:1] == b"w") for word in packet.split(b"\0")]
        try:
            found = find(paths, fds, (uid, gid), groups, cage)
        except (IsolatorError, OSError) as error:
            send_packet(supervisor, pack(error_fields(error)))
        else:
            send_packet(supervisor, answer([os.fstat(tree) for tree in found]), found)


def find(
    paths: Sequence[tuple[str, bool]], fds: Sequence[int], caller: tuple[int, int], groups: Sequence[int], cage: int
) -> list[int]:
    """A detached mount for each path; this process is the caller afterwards. Raises IsolatorError."""
    trees = [_tree(path, fd, caller, cage, writable=writable) for (path, writable), fd in zip(paths, fds, strict=True)]
    become(*caller, groups)
    for (path, writable), fd in zip(paths, fds, strict=True):
        if writable:
            try:
                check_access(fd, os.W_OK | os.X_OK)
            except OSError as error:
                why = f"uid {caller[0]} may not change it: {error.strerror}"
                raise DeniedError(f"--write {path}", why, "name a folder of your own") from None
    return trees


def answer(found: Sequence[os.stat_result]) -> bytes:
    """The facts of each mount: ``f`` or ``d`` for file or folder, and the number of the device."""
    return b" ".join(b"%c%d" % (b"d" if stat.S_ISDIR(one.st_mode) else b"f", one.st_dev) for one in found)


def _tree(path: str, fd: int, caller: tuple[int, int], cage: int, *, writable: bool) -> int:
    what = f"--{'write' if writable else 'read'} {path}"
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_PATH or flags & os.O_ACCMODE == os.O_WRONLY:
        raise DeniedError(what, "was not handed over open for reading", "open it with O_RDONLY")
    name = os.readlink(f"/proc/self/fd/{fd}")
    if name != path:
        raise UsageError(what, f"is {name} in truth", "name a file or folder by its real path, without symbolic links")
    if writable and not stat.S_ISDIR(os.fstat(fd).st_mode):
        raise UsageError(what, "is not a folder", "name the folder that it is in")
    try:
        tree = clone_in_own_view(fd, writable=writable)
    except OSError as error:
        raise DeniedError(what, _reason(error), "use a path that the daemon sees as you do") from None
    if writable:
        _give(tree, what, path, caller, cage)
    return tree


def _give(tree: int, what: str, path: str, caller: tuple[int, int], cage: int) -> None:
    """Let the caller and the cage's user change places in a detached mount."""
    if os.fstat(tree).st_uid == 0:
        raise DeniedError(what, "it is root's, and nothing in a cage acts as root", "name a folder of a user's")
    if not caller[1]:
        raise DeniedError(what, "your group is root's, and nothing in a cage acts as root", "use another group: newgrp")
    try:
        ids = new_user_namespace(exchange(caller[0], cage), exchange(caller[1], cage))
    except OSError as error:
        remedy = "allow user namespaces to root: sysctl user.max_user_namespaces"
        raise ConfinementError(what, f"{error.strerror} ({error.filename})", remedy) from None
    with owning(ids):
        map_ids(tree, ids, path)


def _reason(error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ESTALE, errno.ELOOP, errno.EACCES):
        return "the daemon sees another file there, or none (a mount of yours alone; ProtectHome= of its service)"
    return error.strerror or "cannot be shown"


if __name__ == "__main__":
    main()
