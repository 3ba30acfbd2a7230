"""Attempts on the system-call filter: mounts, namespaces, forbidden calls, other ABIs, terminals, socket families."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import mmap
import os
import signal
import socket
import struct
import termios
from collections.abc import Callable

from .kit import X86, Held, Promise, attempt, last_error, libc, step, syscall

_NAMESPACES = {
    "user": 0x10000000,
    "mount": 0x00020000,
    "pid": 0x20000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
    "cgroup": 0x02000000,
    "network": 0x40000000,
}


# --- mounts --------------------------------------------------------------------------------------------------


step(
    "seccomp", "mount", "mount a file system", lambda: syscall("mount", b"none", b"/tmp", b"tmpfs", 0, None),
    "a tmpfs on /tmp",
)  # fmt: skip
step("seccomp", "unmount", "unmount a part of the view", lambda: syscall("umount2", b"/dev/shm", 2), "/dev/shm is gone")
step(
    "seccomp", "remount-writable", "make /usr writable",
    lambda: syscall("mount", None, b"/usr", None, 0x1000 | 0x20, None),  # MS_BIND | MS_REMOUNT, without MS_RDONLY
    "/usr was mounted read-write",
)  # fmt: skip


@attempt("seccomp", "mount with the descriptor-based calls")
def new_mount_api(promise: Promise) -> str:
    context = syscall("fsopen", b"tmpfs", 0)
    syscall("fsconfig", context, 6, None, None, 0)
    tree = syscall("fsmount", context, 0, 0)
    syscall("move_mount", tree, b"", -100, b"/tmp", 4)
    return "a tmpfs on /tmp"


@attempt("seccomp", "take a copy of the mount tree")
def copy_mount_tree(promise: Promise) -> str:
    return f"descriptor {syscall('open_tree', -100, b'/', 1)}"


@attempt("seccomp", "change the root directory", name="chroot")
def chroot_(promise: Promise) -> str:
    os.mkdir("/tmp/probe-chroot")
    try:
        syscall("chroot", b"/tmp/probe-chroot")
    except OSError:
        os.rmdir("/tmp/probe-chroot")
        raise
    return "the root is another"


@attempt("seccomp", "exchange the root file system", name="pivot-root")
def pivot_root_(promise: Promise) -> str:
    os.makedirs("/tmp/probe-old", exist_ok=True)
    syscall("pivot_root", b"/tmp", b"/tmp/probe-old")
    return "the root is another"


# --- namespaces ----------------------------------------------------------------------------------------------


for _kind, _flag in _NAMESPACES.items():
    step(
        "seccomp", f"unshare-{_kind}", f"unshare the {_kind} namespace", functools.partial(syscall, "unshare", _flag),
        f"a new {_kind} namespace",
    )  # fmt: skip


@attempt("seccomp", "clone into a new user namespace")
def clone_user_namespace(promise: Promise) -> str:
    return _ended(syscall("clone", _NAMESPACES["user"] | signal.SIGCHLD, 0, 0, 0, 0))


@attempt("seccomp", "the same with clone3, whose flags a filter cannot read")
def clone3_user_namespace(promise: Promise) -> str:
    arguments = (ctypes.c_uint64 * 11)(_NAMESPACES["user"], 0, 0, 0, signal.SIGCHLD)
    return _ended(syscall("clone3", ctypes.byref(arguments), ctypes.sizeof(arguments)))


def _ended(pid: int) -> str:
    """End this process if it is the clone, else wait for that."""
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return "a child in a new user namespace"


@attempt("namespaces", "join another process's namespace")
def join_namespace(promise: Promise) -> str:
    why = OSError(errno.ENOENT, "only processes in the cage's own namespaces are there")
    for name in ["1", *(name for name in os.listdir("/proc") if name.isdigit())]:
        for kind in ("mnt", "net", "uts", "ipc", "cgroup", "pid"):
            try:
                if os.readlink(f"/proc/{name}/ns/{kind}") == os.readlink(f"/proc/self/ns/{kind}"):
                    continue
                fd = os.open(f"/proc/{name}/ns/{kind}", os.O_RDONLY)
                syscall("setns", fd, 0)
            except OSError as error:
                why = error
                continue
            return f"the {kind} namespace of process {name}"
    raise why


# --- calls that only an attack makes -------------------------------------------------------------------------


def _forbidden(name: str, title: str, call: Callable[[], int], passed: tuple[int, ...] = ()) -> None:
    """An attempt that makes one call; an errno of ``passed`` says that the kernel had let it through to its work."""

    def run(promise: Promise) -> str:
        try:
            return f"it answered {call()}"
        except OSError as error:
            if error.errno in passed:
                return f"it was let through to its work ({errno.errorcode[error.errno]})"
            raise

    attempt("seccomp", title, name=name)(run)


def _bpf() -> int:
    attributes = struct.pack("=IIIII", 2, 4, 8, 1, 0).ljust(72, b"\0")  # BPF_MAP_TYPE_ARRAY
    return syscall("bpf", 0, attributes, len(attributes))


def _perf() -> int:
    # PERF_TYPE_SOFTWARE, PERF_COUNT_SW_CPU_CLOCK, disabled and exclude_kernel
    attributes = struct.pack("=IIQQQQQ", 1, 112, 0, 0, 0, 0, 1 | 1 << 5).ljust(112, b"\0")
    return syscall("perf_event_open", attributes, 0, -1, -1, 0)


def _clock() -> int:
    timex = ctypes.create_string_buffer(256)
    syscall("adjtimex", ctypes.byref(timex))  # modes = 0 only reads
    ctypes.c_uint.from_buffer(timex).value = 0x10  # ADJ_STATUS: set the status to what it is
    return syscall("adjtimex", ctypes.byref(timex))


def _host_name() -> int:
    name = socket.gethostname().encode()
    return syscall("sethostname", name, len(name))


_forbidden("keyring", "add a key to a kernel keyring", lambda: syscall("add_key", b"user", b"probe", b"x", 1, -2))
_forbidden("join-keyring", "join a session keyring", lambda: syscall("keyctl", 1, b"probe", 0, 0, 0))
_forbidden("bpf", "make a BPF map", _bpf)
_forbidden("perf-events", "watch the processor's counters", _perf)
_forbidden("userfaultfd", "handle its own page faults", lambda: syscall("userfaultfd", 1))
_forbidden(
    "io-uring", "make calls through io_uring, past the filter",
    lambda: syscall("io_uring_setup", 4, ctypes.byref(ctypes.create_string_buffer(256))),
)  # fmt: skip
_forbidden("watch-files", "watch a file system", lambda: syscall("fanotify_init", 0x200, 0))
_forbidden("kexec", "load another kernel", lambda: syscall("kexec_load", 0, 0, None, 0), (errno.EINVAL,))
_forbidden(
    "kernel-module", "load a kernel module", lambda: syscall("init_module", b"none", 4, b""),
    (errno.ENOEXEC, errno.EINVAL),
)  # fmt: skip
# With wrong magic numbers: it can only be refused, but the order of the refusals tells.
_forbidden("reboot", "restart the machine", lambda: syscall("reboot", 0, 0, 0, None), (errno.EINVAL,))
_forbidden("swap", "swap to a file", lambda: syscall("swapon", b"/probe-none", 0), (errno.ENOENT,))
_forbidden("quota", "reach the disk quotas", lambda: syscall("quotactl", 0x800001 << 8, None, 0, None))
_forbidden("clock", "adjust the clock", _clock)
_forbidden("host-name", "change the host name", _host_name)
_forbidden("executable-data", "make all its memory executable", lambda: syscall("personality", 0x400000))
_forbidden("kernel-messages", "read the kernel's messages", lambda: syscall("syslog", 10, None, 0))
_forbidden("message-queue", "make a POSIX message queue", lambda: syscall("mq_open", b"probe", 0o102, 0o600, None))


# --- other ABIs ----------------------------------------------------------------------------------------------


def _machine_code(code: bytes) -> int:
    """Run machine code that returns an int; written first and made executable then, so never both."""
    area = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    area.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    if libc.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC):
        raise last_error("mprotect")
    return int(ctypes.CFUNCTYPE(ctypes.c_long)(address)())


def _getpid(name: str, title: str, code: bytes) -> None:
    def run(promise: Promise) -> str:
        if not X86:
            raise Held("not an x86 machine")
        answer = _machine_code(code)
        if answer < 0:
            raise OSError(-answer, os.strerror(-answer))
        return f"getpid answered {answer}"

    attempt("seccomp", title, name=name)(run)


# mov eax, 20 (getpid of i386); int 0x80; ret, and mov eax, 39 | 0x40000000 (getpid of x32); syscall; ret
_getpid(
    "i386-call", "make a call of the 32-bit ABI, where numbers mean other calls", b"\xb8\x14\x00\x00\x00\xcd\x80\xc3"
)
_getpid("x32-call", "make a call of the x32 ABI", b"\xb8\x27\x00\x00\x40\x0f\x05\xc3")


# --- terminals -----------------------------------------------------------------------------------------------


def _need_terminal() -> None:
    if not os.isatty(0):
        raise RuntimeError("standard input is no terminal: nothing to attack")


def _type(request: int) -> str:
    """Take the terminal over as the leader of a new session, as far as the kernel allows, and type into it."""
    _need_terminal()
    read, write = os.pipe()
    pid = os.fork()  # the caller leads its process group, and a leader can make no session
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        code = 0
        try:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            try:
                syscall("ioctl", 0, request, b"#")
            finally:
                fcntl.ioctl(0, termios.TIOCNOTTY, 0)  # or the leader's end would hang the terminal up
        except OSError as error:
            code = error.errno or 255
        os.write(write, bytes([code]))
        os._exit(0)
    os.close(write)
    code = os.read(read, 1)[0]
    os.waitpid(pid, 0)
    if code:
        raise OSError(code, os.strerror(code))
    return "a character was typed"


@attempt("seccomp", "type into the operator's terminal", name="terminal-input")
def terminal_input(promise: Promise) -> str:
    return _type(termios.TIOCSTI)


@attempt("seccomp", "the same with a number that only a 64-bit comparison tells apart", name="terminal-input-64")
def terminal_input_64(promise: Promise) -> str:
    return _type(termios.TIOCSTI + (1 << 32))


def _terminal(name: str, title: str, request: int, argument: bytes) -> None:
    def run(promise: Promise) -> str:
        _need_terminal()
        try:
            syscall("ioctl", 0, request, argument)
        except OSError as error:
            if error.errno == errno.ENOTTY:
                return "the terminal's driver was asked"
            raise
        return "the terminal's driver took it"

    attempt("seccomp", title, name=name)(run)


_terminal("console-paste", "paste through the console's selection", 0x541C, b"\x03")
_terminal("console-paste-64", "the same with a 64-bit number", 0x541C + (1 << 32), b"\x03")
_terminal("line-discipline", "load a driver by changing the line discipline", 0x5423, struct.pack("=i", 0))


# --- socket families -----------------------------------------------------------------------------------------


def _family(name: str, title: str, family: int, kind: int, protocol: int = 0, layer: str = "seccomp") -> None:
    step(layer, name, title, lambda: socket.socket(family, kind, protocol).close(), "the socket was made")


_family("netlink-socket", "list the host's sockets by netlink", socket.AF_NETLINK, socket.SOCK_RAW, 4)  # SOCK_DIAG
_family("packet-socket", "read raw packets", socket.AF_PACKET, socket.SOCK_RAW, 0x0300)
_family("vsock-socket", "reach the hypervisor by vsock", socket.AF_VSOCK, socket.SOCK_STREAM)
_family("crypto-socket", "use the kernel's cryptography by AF_ALG", socket.AF_ALG, socket.SOCK_SEQPACKET)
_family("xdp-socket", "take packets by AF_XDP", 44, socket.SOCK_RAW)
_family("key-socket", "manage IPsec by AF_KEY", 15, socket.SOCK_RAW, 2)
_family("raw-socket", "make a raw socket", socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP, "capabilities")
_family("raw-socket-6", "make a raw IPv6 socket", socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_TCP, "capabilities")
