"""Attempts on the caps: memory, tasks, processor time, descriptors, locked memory. Every one of them is bounded."""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import errno
import mmap
import os
import resource
import signal
import socket
import time

from .kit import Held, Promise, attach_segment, attempt, last_error, libc, set_limit, syscall

_MIB = 1 << 20
_BEYOND = 1.25
"""Excess over a cap that counts as through: the kernel's rounding and per-processor stock are no escape."""


@attempt("cgroup", "use more memory than granted", alone=True, seconds=30)
def memory(promise: Promise) -> str:
    wanted = int(promise.memory * _BEYOND) + 16 * _MIB
    kept = []
    for _ in range(wanted // _MIB):
        area = mmap.mmap(-1, _MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for page in range(0, _MIB, mmap.PAGESIZE):
            area[page] = 1
        kept.append(area)
    return f"{len(kept)} MiB in use"


@attempt("cgroup", "the same in a file that lives in memory", alone=True, seconds=30)
def memory_in_files(promise: Promise) -> str:
    wanted = int(promise.memory * _BEYOND) + 16 * _MIB
    fd = syscall("memfd_create", b"probe", 0)
    for offset in range(0, wanted, _MIB):
        os.posix_fallocate(fd, offset, _MIB)
    return f"{wanted // _MIB} MiB in use"


@attempt("seccomp", "execute System V shared memory", strict=True)
def executable_segment(promise: Promise) -> str:
    segment = syscall("shmget", 0, mmap.PAGESIZE, 0o700)  # IPC_PRIVATE
    try:
        attach_segment(segment, 0o100000)  # SHM_EXEC
    finally:
        syscall("shmctl", segment, 0, None)  # IPC_RMID
    return "it is writable and executable"


@attempt("cgroup", "the same in System V shared memory", alone=True, seconds=30)
def memory_in_segments(promise: Promise) -> str:
    wanted = int(promise.memory * _BEYOND) + 16 * _MIB
    segment = syscall("shmget", 0, wanted, 0o600)  # IPC_PRIVATE
    try:
        ctypes.memset(attach_segment(segment), 1, wanted)
    finally:
        syscall("shmctl", segment, 0, None)  # IPC_RMID
    return f"{wanted // _MIB} MiB in use"


@attempt("cgroup", "the same in the kernel's socket buffers", alone=True, seconds=30)
def memory_in_sockets(promise: Promise) -> str:
    wanted = int(promise.memory * _BEYOND) + 16 * _MIB
    queued, chunk, pairs = 0, bytes(65536), []
    try:
        while queued < wanted:
            pair = socket.socketpair()
            pairs.append(pair)
            for end in pair:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 24)
                end.setblocking(False)
                try:
                    while queued < wanted:
                        queued += end.send(chunk)
                except BlockingIOError:
                    pass
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise Held(f"out of descriptors with {queued / _MIB:.0f} MiB queued") from None
        raise
    return f"{queued // _MIB} MiB queued"


@attempt("cgroup", "start more processes than granted", seconds=20)
def processes(promise: Promise) -> str:
    children: list[int] = []
    try:
        while len(children) <= promise.tasks + 8:
            pid = os.fork()
            if pid == 0:
                signal.pause()
                os._exit(0)
            children.append(pid)
    except OSError as error:
        # The battery's own process and this one count as well.
        if error.errno != errno.EAGAIN or len(children) + 2 > promise.tasks:
            raise
        raise Held(f"refused after {len(children)} of {promise.tasks}") from None
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)
    return f"{len(children)} children"


@attempt("cgroup", "start more threads than granted", seconds=20)
def threads(promise: Promise) -> str:
    _thread.stack_size(64 * 1024)
    gate = _thread.allocate_lock()
    gate.acquire()

    def wait() -> None:
        with gate:
            pass

    started = 0
    try:
        while started <= promise.tasks + 8:
            _thread.start_new_thread(wait, ())
            started += 1
    except RuntimeError:
        raise Held(f"refused after {started} of {promise.tasks}") from None
    finally:
        gate.release()
    return f"{started} threads"


def _burn(count: int) -> float:
    """Seconds of processor time that ``count`` processes get in a second and a half.

    Several, so that they get their share of a busy machine when nothing holds them back.
    """
    children = []
    try:
        for _ in range(count):
            pid = os.fork()
            if pid == 0:
                while True:
                    pass
            children.append(pid)
        time.sleep(1.5)  # what is measured is a share of time
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
        usages = [os.wait4(child, 0)[2] for child in children]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@attempt("cgroup", "use more processor time than granted", seconds=30)
def processor_time(promise: Promise) -> str:
    with contextlib.suppress(OSError):  # the kernel leaves out those that there are not
        os.sched_setaffinity(0, range(1024))
    began = time.monotonic()
    try:
        used = _burn(min(promise.cpu // 1000 + 8, promise.tasks // 2))
    except PermissionError:  # no process may be started: this one then, alone
        before = time.process_time()
        while time.monotonic() < began + 1.5:
            pass
        used = time.process_time() - before
    share = used / (time.monotonic() - began)
    if share > promise.cpu / 1000 * 1.3 + 0.05:
        return f"{share:.0%} of one core"
    raise Held(f"{share:.0%} of one core, {promise.cpu / 10:g} % granted")


@attempt("rlimits", "open more files than granted", seconds=20)
def descriptors(promise: Promise) -> str:
    opened = 0
    try:
        while opened <= promise.nofile:
            os.dup(2)
            opened += 1
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise Held(f"refused after {opened} of {promise.nofile}") from None
    return f"{opened} descriptors"


@attempt("rlimits", "lock memory", name="lock-memory")
def lock_memory(promise: Promise) -> str:
    area = mmap.mmap(-1, _MIB)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(_MIB)):
        raise last_error("mlock")
    return "1 MiB is locked"


@attempt("rlimits", "leave a core dump to the host's handler")
def core_dump(promise: Promise) -> str:
    set_limit(resource.RLIMIT_CORE, 4096)
    if resource.getrlimit(resource.RLIMIT_CORE)[0] != 4096:
        raise Held("the limit stays")
    return "core dumps are on"


@attempt("rlimits", "queue a great many signals")
def pending_signals(promise: Promise) -> str:
    number = signal.SIGRTMIN + 1
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    for sent in range(1200):
        if libc.sigqueue(os.getpid(), number, ctypes.c_void_p(0)):
            code = ctypes.get_errno()
            raise Held(f"{os.strerror(code)} after {sent}")
    return "1200 signals wait"
