"""Loading a compiled seccomp filter, and answering its notifications (seccomp(2), seccomp_unotify(2))."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import struct

from isolator.base.structs import struct_class
from isolator.linux._libc import call, libc, syscall

_SET_MODE_FILTER = 1
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_GET_ACTION_AVAIL = 2
_NEW_LISTENER = 1 << 3
_WAIT_KILLABLE_RECV = 1 << 5  # from 5.19; without it a signal can make a denied call look interrupted

RET_KILL_PROCESS, RET_USER_NOTIF, RET_ERRNO, RET_ALLOW = 0x80000000, 0x7FC00000, 0x00050000, 0x7FFF0000

_RECV, _SEND, _ID_VALID, _ADD_DESCRIPTOR = 0xC0502100, 0xC0182101, 0x40082102, 0x40182103
_NOTIFICATION = struct.Struct("=QIIiIQ6Q")  # id, pid, flags, then seccomp_data: nr, arch, ip, args
_RESPONSE = struct.Struct("=QqiI")
_DESCRIPTOR = struct.Struct("=QIIII")  # id, flags, ours, its number, its flags
_AND_ANSWER = 2  # SECCOMP_ADDFD_FLAG_SEND, from 5.14


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


@struct_class(frozen=True)
class Notification:
    """A call that the filter handed over; ``pid`` is in the reader's pid namespace."""

    id: int
    pid: int
    number: int
    arch: int
    args: tuple[int, ...]


def load_filter(program: bytes, *, listener: bool) -> int:
    """Install a BPF program (8 bytes an instruction) on the calling thread; returns the listener or -1.

    Needs no_new_privs or CAP_SYS_ADMIN.
    """
    prog = _Program(len(program) // 8, program)
    if not listener:
        syscall("seccomp", _SET_MODE_FILTER, 0, ctypes.byref(prog))
        return -1
    try:
        return syscall("seccomp", _SET_MODE_FILTER, _NEW_LISTENER | _WAIT_KILLABLE_RECV, ctypes.byref(prog))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return syscall("seccomp", _SET_MODE_FILTER, _NEW_LISTENER, ctypes.byref(prog))


def add_filter(program: bytes) -> None:
    """Install a further BPF program by prctl(2), which a filter can allow apart from seccomp(2) and its listeners."""
    prog = _Program(len(program) // 8, program)
    zero = ctypes.c_ulong(0)
    mode = ctypes.c_ulong(_MODE_FILTER)
    call(libc.prctl, "prctl(PR_SET_SECCOMP)", ctypes.c_int(_PR_SET_SECCOMP), mode, ctypes.byref(prog), zero, zero)


def action_available(action: int) -> bool:
    """Whether the running kernel knows a filter action."""
    try:
        syscall("seccomp", _GET_ACTION_AVAIL, 0, ctypes.byref(ctypes.c_uint32(action)))
    except OSError:
        return False
    return True


def receive(listener: int) -> Notification | None:
    """Take one waiting notification; None when the caller has ended meanwhile."""
    buffer = bytearray(_NOTIFICATION.size)
    try:
        fcntl.ioctl(listener, _RECV, buffer)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
            return None
        raise
    number, pid, _flags, called, arch, _ip, *args = _NOTIFICATION.unpack(buffer)
    return Notification(number, pid, called, arch & 0xFFFFFFFF, tuple(args))


def deny(listener: int, notification: Notification, error: int = errno.EPERM) -> None:
    """Make the call fail with ``error``. Never used to allow: what its pointers mean could change meanwhile."""
    try:
        fcntl.ioctl(listener, _SEND, bytearray(_RESPONSE.pack(notification.id, 0, -error, 0)))
    except OSError as failure:
        if failure.errno != errno.ENOENT:  # the caller was killed
            raise


def is_waiting(listener: int, notification: Notification) -> bool:
    """Whether the caller still waits for its answer, so that its pid is still its own."""
    try:
        fcntl.ioctl(listener, _ID_VALID, struct.pack("=Q", notification.id))
    except OSError:
        return False
    return True


def answer_with(listener: int, notification: Notification, fd: int, flags: int) -> None:
    """Make the call return a copy of ``fd``, with descriptor flags of the open(2) kind; raises OSError."""
    fcntl.ioctl(listener, _ADD_DESCRIPTOR, bytearray(_DESCRIPTOR.pack(notification.id, _AND_ANSWER, fd, 0, flags)))
