"""Capability sets of the calling thread by number (capabilities(7)).

python-prctl names capabilities at compile time; sets are handled here by number up to the running kernel's
``cap_last_cap``, so a capability that is newer than the build is dropped too.
"""

from __future__ import annotations

import ctypes
import functools

from isolator.linux._libc import failed, libc, syscall

_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24
_PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL = 47, 4
_PR_SET_SECUREBITS = 28
_PR_SET_NO_NEW_PRIVS = 38
_VERSION_3 = 0x20080522


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@functools.cache
def last_capability() -> int:
    """The highest capability number of the running kernel."""
    with open("/proc/sys/kernel/cap_last_cap") as file:  # noqa: PTH123  # the launcher avoids importing pathlib
        return int(file.read())


def has_capability(number: int) -> bool:
    """Whether the calling thread has a capability in its effective set."""
    data = (_Data * 2)()
    syscall("capget", ctypes.byref(_Header(_VERSION_3, 0)), ctypes.byref(data))
    return bool(data[number // 32].effective >> number % 32 & 1)


def drop_bounding_set(last: int) -> None:
    """Empty the bounding set, every number up to ``last``."""
    for number in range(last + 1):
        _prctl(_PR_CAPBSET_DROP, number)


def clear_sets() -> None:
    """Empty the effective, permitted, inheritable and ambient sets."""
    _prctl(_PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL)
    syscall("capset", ctypes.byref(_Header(_VERSION_3, 0)), ctypes.byref((_Data * 2)()))


def keep_only(number: int) -> None:
    """Empty the inheritable and ambient sets, and leave one capability below 32 in the other two."""
    _prctl(_PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL)
    sets = (_Data * 2)()
    sets[0].effective = sets[0].permitted = 1 << number
    syscall("capset", ctypes.byref(_Header(_VERSION_3, 0)), ctypes.byref(sets))


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
