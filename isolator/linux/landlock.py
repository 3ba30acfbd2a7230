"""Landlock rulesets (landlock(7)): file access by hierarchy, and scopes."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable

from isolator.linux._libc import syscall
from isolator.linux.descriptors import owning

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
REMOVE_DIR, REMOVE_FILE, MAKE_CHAR, MAKE_DIR, MAKE_REG = 16, 32, 64, 128, 256
MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK, MAKE_SYM, REFER = 512, 1024, 2048, 4096, 8192
TRUNCATE, IOCTL_DEV = 16384, 32768

READ = EXECUTE | READ_FILE | READ_DIR
WRITE = (
    WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SOCK | MAKE_FIFO | MAKE_SYM | REFER | TRUNCATE
)

SCOPE_ABSTRACT_UNIX_SOCKET, SCOPE_SIGNAL = 1, 2

_VERSION = 1
_PATH_BENEATH = 1
_RULESET_ATTR, _PATH_BENEATH_ATTR = struct.Struct("=3Q"), struct.Struct("=Qi")
"""Rights handled of files and of the network, and the scopes; rights, and the descriptor below which they hold."""


def abi() -> int:
    """The kernel's Landlock ABI; raises OSError when it is not compiled in (ENOSYS) or not enabled (EOPNOTSUPP)."""
    return syscall("landlock_create_ruleset", None, 0, _VERSION)


def handled_rights(version: int) -> int:
    """File rights that this ABI can deny."""
    rights = (1 << 13) - 1
    if version >= 2:
        rights |= REFER
    if version >= 3:
        rights |= TRUNCATE
    if version >= 5:
        rights |= IOCTL_DEV
    return rights


def read_only_below(places: Iterable[str | int]) -> None:
    """Leave the calling thread no right but to read below these paths and descriptors; needs no_new_privs.

    Nor, from ABI 6, may it signal anybody else. Without Landlock nothing changes: it is a second wall. Raises OSError.
    """
    try:
        version = abi()
    except OSError as error:
        if error.errno in {errno.ENOSYS, errno.EOPNOTSUPP}:
            return
        raise
    with owning(new_ruleset(version, scoped=SCOPE_SIGNAL | SCOPE_ABSTRACT_UNIX_SOCKET)) as ruleset:
        for place in places:
            if isinstance(place, int):
                allow_below(ruleset, version, place, READ_FILE | READ_DIR)
            else:
                allow(ruleset, version, place, READ_FILE | READ_DIR)
        restrict_self(ruleset)


def new_ruleset(version: int, *, scoped: int = 0) -> int:
    """A descriptor of a ruleset that denies every file right, and the scopes where this ABI has them."""
    attr = _RULESET_ATTR.pack(handled_rights(version), 0, scoped if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    return syscall("landlock_create_ruleset", attr, size, 0)


def allow(ruleset: int, version: int, path: str, rights: int) -> None:
    """Allow rights on what ``path`` is now, and below it."""
    with owning(os.open(path, os.O_PATH | os.O_CLOEXEC)) as fd:
        try:
            allow_below(ruleset, version, fd, rights)
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"landlock rule for {path}") from None


def allow_below(ruleset: int, version: int, fd: int, rights: int) -> None:
    """Allow rights on what a descriptor refers to, and below it."""
    rule = _PATH_BENEATH_ATTR.pack(rights & handled_rights(version), fd)
    syscall("landlock_add_rule", ruleset, _PATH_BENEATH, rule, 0)


def restrict_self(ruleset: int) -> None:
    """Put a ruleset in force for the calling thread; needs no_new_privs."""
    syscall("landlock_restrict_self", ruleset, 0)
