"""Credentials of the process at the other end of a Unix socket, as the kernel noted them when it connected."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterable

from isolator.linux._libc import failed, libc

_SO_PEERGROUPS = 59
_ACL, _ACL_VERSION = "system.posix_acl_access", 2
_USER_OBJ, _USER, _GROUP_OBJ, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x10, 0x20
_READ_WRITE, _NOBODY = 6, 0xFFFFFFFF


def peer_ids(sock: socket.socket) -> tuple[int, int, int]:
    """Return (pid, uid, gid) of the process at the other end, as the kernel noted it at connect or listen."""
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid, gid


def peer_groups(sock: socket.socket, *, most: int) -> list[int]:
    """Return the supplementary groups of the process that connected; raises OSError (ERANGE) for more than ``most``."""
    groups, size = (ctypes.c_uint32 * most)(), ctypes.c_uint32(4 * most)
    found = libc.getsockopt(sock.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, groups, ctypes.byref(size))
    if found < 0:
        error = failed("SO_PEERGROUPS")
        if error.errno == errno.ERANGE:
            raise OSError(errno.ERANGE, f"has more than {most} groups")
        raise error
    return groups[: size.value // 4]


def allow_only(path: str | os.PathLike[str], uids: Iterable[int]) -> None:
    """Let root and these users, and nobody else, read and write ``path`` (acl(5)), at once; raises OSError."""
    others = sorted({uid for uid in uids if uid != 0})
    if not others:
        allow_all(path, 0o600)
        return
    entries = [
        (_USER_OBJ, _READ_WRITE, _NOBODY),
        *((_USER, _READ_WRITE, uid) for uid in others),
        (_GROUP_OBJ, 0, _NOBODY),
        (_MASK, _READ_WRITE, _NOBODY),
        (_OTHER, 0, _NOBODY),
    ]
    os.setxattr(path, _ACL, struct.pack("<I", _ACL_VERSION) + b"".join(struct.pack("<HHI", *one) for one in entries))


def allow_all(path: str | os.PathLike[str], mode: int = 0o666) -> None:
    """Have ``mode`` alone say who may read and write ``path``, without the list of ``allow_only``; raises OSError."""
    try:
        os.removexattr(path, _ACL)
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise
    os.chmod(path, mode)
