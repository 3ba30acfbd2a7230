"""Attempts that need no right at all and yet reach past the cage: on what the kernel keeps for the host as a whole.

Watches on files that everybody uses, pools and counters of the whole host, protocols whose modules the kernel loads for
whoever asks, the handler of core dumps, precedence on the processors.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import resource
import signal
import socket
import struct

from .kit import Held, Promise, attempt, last_error, libc, set_limit, syscall


@attempt("seccomp", "watch which programs the host starts", name="watch-programs")
def watch_programs(promise: Promise) -> str:
    watcher = libc.inotify_init1(0)
    if libc.inotify_add_watch(watcher, b"/usr/bin", 0x20) < 0:  # IN_OPEN
        raise last_error("inotify_add_watch")
    return "every open of a file in /usr/bin would be told"


@attempt("seccomp", "the same with the older call")
def watch_programs_by_signal(promise: Promise) -> str:
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # it may come at once
    fcntl.fcntl(os.open("/usr/bin", os.O_RDONLY), fcntl.F_NOTIFY, fcntl.DN_ACCESS)
    return "every read of a file in /usr/bin would be told"


@attempt("seccomp", "take the host's places for asynchronous I/O")
def asynchronous_io(promise: Promise) -> str:
    syscall("io_setup", 4096, ctypes.byref(ctypes.c_ulong(0)))
    return "4096 of the places that all processes of the host share"


@attempt("seccomp", "take the host's huge pages, which no memory cap counts")
def huge_pages(promise: Promise) -> str:
    mmap.mmap(-1, 1 << 21, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)[0] = 1
    return "one huge page"


@attempt("seccomp", "the same in a file that lives in memory")
def huge_pages_in_files(promise: Promise) -> str:
    fd = syscall("memfd_create", b"probe", 4)  # MFD_HUGETLB
    os.ftruncate(fd, 1 << 21)
    mmap.mmap(fd, 1 << 21)[0] = 1
    return "one huge page"


@attempt("seccomp", "the same in System V shared memory")
def huge_pages_in_segments(promise: Promise) -> str:
    segment = syscall("shmget", 0, 1 << 21, 0o4600)  # SHM_HUGETLB
    syscall("shmctl", segment, 0, None)  # IPC_RMID
    return "one huge page is reserved"


@attempt("seccomp", "use an uncommon protocol of the kernel, which loads its module for anybody")
def uncommon_protocol(promise: Promise) -> str:
    why: OSError | None = None
    for kind, protocol, name in (
        (socket.SOCK_DGRAM, 136, "UDP-Lite"),
        (socket.SOCK_STREAM, 262, "MPTCP"),
        (socket.SOCK_STREAM, 132, "SCTP"),
    ):
        try:
            socket.socket(socket.AF_INET, kind, protocol).close()
        except OSError as error:
            why = error
        else:
            return f"a socket of {name}"
    assert why is not None
    raise why


@attempt("seccomp", "take the host's IPv6 flow labels, of which all networks share one pool")
def flow_labels(promise: Promise) -> str:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        # struct in6_flowlabel_req: a lease (0) of a new label (1) for anybody (255) to ::1
        request = struct.pack("=16sIBBHHHI", bytes(15) + b"\1", 0, 0, 255, 1, 6, 6, 0)
        sock.setsockopt(socket.IPPROTO_IPV6, 32, request)  # IPV6_FLOWLABEL_MGR
    return "one of some 3000 labels"


@attempt("seccomp", "take the host's memory for compiled BPF programs, which no memory cap counts")
def compiled_programs(promise: Promise) -> str:
    program = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0xFFFFFFFF))  # return: all of the packet
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, 26, struct.pack("@HP", 1, ctypes.addressof(program)))  # SO_ATTACH_FILTER
    return "a program of one of up to 4096 instructions; a cage cannot start without such memory"


@attempt("seccomp", "have sockets keep memory that no memory cap counts, by their options")
def options_of_sockets(promise: Promise) -> str:
    key = struct.pack("=HH", socket.AF_INET, 0).ljust(128, b"\0") + struct.pack("=BBHi", 0, 0, 1, 0).ljust(88, b"k")
    why: OSError | None = None
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as datagrams, socket.socket() as stream:
        for sock, level, option, value, what in (
            (datagrams, 41, 6, struct.pack("@Nii", 4000, 0x1234, 0).ljust(4000), "IPV6_2292PKTOPTIONS keeps 64 KiB"),
            (stream, 6, 14, key, "TCP_MD5SIG keeps 128 KiB"),
            (datagrams, 1, 37, struct.pack("=I", 2), "SO_TIMESTAMPING fills a queue of 400 KiB"),
        ):
            try:
                sock.setsockopt(level, option, value)
            except OSError as error:
                why = error
            else:
                return what
        datagrams.setsockopt(41, 25, 1)
        if datagrams.getsockopt(41, 25):
            return "IPV6_RECVERR fills a queue of 400 KiB"
    assert why is not None
    raise why


@attempt("seccomp", "interrupt the host and other plugins by a shorter slice of the processor")
def shorter_slice(promise: Promise) -> str:
    # struct sched_attr: size, policy, flags, nice, priority, runtime (the slice, in nanoseconds), deadline, period
    shape, before = "=IIQiIQQQ", _slice()
    wanted = ctypes.create_string_buffer(struct.pack(shape, struct.calcsize(shape), 0, 0, 0, 0, 100_000, 0, 0))
    why: OSError | None = None
    try:
        syscall("sched_setattr", 0, wanted, 0)
    except OSError as error:
        why = error
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # the kernel's own slice, then
    os.sched_setparam(0, os.sched_param(0))
    if (after := _slice()) < before:
        return f"{after / 1e6:g} ms, not {before / 1e6:g}"
    raise why or Held("the slice stays")


def _slice() -> int:
    found = ctypes.create_string_buffer(48)
    syscall("sched_getattr", 0, found, len(found), 0)
    return int(struct.unpack_from("=Q", found, 24)[0])


@attempt("seccomp", "have the host's core handler started, as root, by a crash")
def core_handler(promise: Promise) -> str:
    # Under a limit of 1 it is not, under any other it is, 0 included.
    if resource.getrlimit(resource.RLIMIT_CORE)[0] != 1:
        return "the limit is not 1"
    set_limit(resource.RLIMIT_CORE, 0)
    if resource.getrlimit(resource.RLIMIT_CORE)[0] != 0:
        raise Held("the limit stays at 1")
    return "the limit is 0"
