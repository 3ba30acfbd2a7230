"""Capability sets of the calling thread by number (capabilities(7)).

python-prctl names capabilities at compile time; sets are handled here by number up to the running kernel's
``cap_last_cap``, so a capability that is newer than the build is dropped too.
"""

from __future__ import annotations

import ctypes
import functools
import struct

from isolator.linux._libc import failed, libc, syscall

_PR_CAPBSET_DROP = 24
_PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL = 47, 4
_PR_SET_SECUREBITS = 28
_PR_SET_NO_NEW_PRIVS = 38
_VERSION_3 = 0x20080522
_HEADER, _SETS = struct.Struct("=Ii"), struct.Struct("=3I3I")
"""Version and thread; the effective, permitted and inheritable set of the capabilities below 32, then of the others."""
_OWN = _HEADER.pack(_VERSION_3, 0)


@functools.cache
def last_capability() -> int:
    """The highest capability number of the running kernel."""
    with open("/proc/sys/kernel/cap_last_cap") as file:  # noqa: PTH123  # the launcher avoids importing pathlib
        return int(file.read())


def has_capability(number: int) -> bool:
    """Whether the calling thread has a capability in its effective set."""
    data = ctypes.create_string_buffer(_SETS.size)
    syscall("capget", _OWN, data)
    return bool(_SETS.unpack(data)[number // 32 * 3] >> number % 32 & 1)


def drop_bounding_set(last: int) -> None:
    """Empty the bounding set, every number up to ``last``."""
    for number in range(last + 1):
        _prctl(_PR_CAPBSET_DROP, number)


def clear_sets() -> None:
    """Empty the effective, permitted, inheritable and ambient sets."""
    _set(0)


def keep_only(number: int) -> None:
    """Empty the inheritable and ambient sets, and leave one capability below 32 in the other two."""
    _set(1 << number)


def _set(low: int) -> None:
    _prctl(_PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL)
    syscall("capset", _OWN, _SETS.pack(low, low, 0, 0, 0, 0))


def set_securebits(bits: int) -> None:
    """Set the securebits; python-prctl refuses the ambient ones, which are newer than it."""
    _prctl(_PR_SET_SECUREBITS, bits)


def gain_no_privileges() -> None:
    """Set no_new_privs for good (prctl(2)): no exec of this thread gains a privilege any more."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _prctl(option: int, argument: int) -> None:
    zero = ctypes.c_ulong(0)
    if libc.prctl(option, ctypes.c_ulong(argument), zero, zero, zero):
        raise failed(f"prctl({option}, {argument})")
