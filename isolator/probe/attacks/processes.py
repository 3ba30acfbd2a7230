"""Attempts on other processes, on the cage's own identity, and on what it inherited."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import socket
import time
from pathlib import Path

from .kit import Held, Promise, attach_segment, attempt, libc, set_limit, step, syscall

_PTRACE_ATTACH = 16
_SHM_RDONLY = 0o10000


def _sleeper() -> int:
    """A child that waits to be killed."""
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    return pid


# --- other processes -----------------------------------------------------------------------------------------


@attempt("seccomp", "trace pid 1")
def trace_init(promise: Promise) -> str:
    syscall("ptrace", _PTRACE_ATTACH, promise.init, 0, 0)
    return f"process {promise.init} is traced"


@attempt("seccomp", "trace a process of its own")
def trace_child(promise: Promise) -> str:
    child = _sleeper()
    try:
        syscall("ptrace", _PTRACE_ATTACH, child, 0, 0)
    finally:
        os.kill(child, signal.SIGKILL)
    return "a child is traced"


@attempt("seccomp", "read another process's memory")
def read_memory(promise: Promise) -> str:
    secret = ctypes.create_string_buffer(b"probe")
    target = ctypes.create_string_buffer(8)
    child = _sleeper()
    local = (ctypes.c_size_t * 2)(ctypes.addressof(target), 5)
    remote = (ctypes.c_size_t * 2)(ctypes.addressof(secret), 5)
    try:
        syscall("process_vm_readv", child, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    finally:
        os.kill(child, signal.SIGKILL)
    return f"read {target.value!r}"


@attempt("seccomp", "take a descriptor out of pid 1")
def steal_descriptor(promise: Promise) -> str:
    pidfd = os.pidfd_open(promise.init)
    why = OSError(errno.EBADF, "it has none")
    for number in range(64):
        try:
            return f"descriptor {number} of pid 1 is {syscall('pidfd_getfd', pidfd, number, 0)} here"
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            why = error
    raise why


@attempt("namespaces", "write the memory of pid 1")
def write_init_memory(promise: Promise) -> str:
    os.close(os.open(f"/proc/{promise.init}/mem", os.O_RDWR))
    return f"/proc/{promise.init}/mem opened"


@attempt("namespaces", "read the environment of pid 1")
def read_init_environment(promise: Promise) -> str:
    return f"{len(Path(f'/proc/{promise.init}/environ').read_bytes())} bytes"


@attempt("namespaces", "stop or kill pid 1")
def kill_init(promise: Promise) -> str:
    """/proc may hide pid 1, so its work tells: it reaps orphans, for as long as it lives and runs."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        os.kill(promise.init, number)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        orphan = os.fork()
        if orphan:
            os.write(write, str(orphan).encode())
        os._exit(0)
    os.waitpid(child, 0)
    orphan = int(os.read(read, 16))
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        if not _is_there(promise.init):
            return "it is gone"
        time.sleep(0.01)  # nothing tells of the end of a process that is nobody's child here
    if _is_there(orphan):
        return "it does not reap orphans any more"
    raise Held("the signals have no effect on it")


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@attempt("namespaces", "find processes of other users")
def other_processes(promise: Promise) -> str:
    """Signal 0 tells EPERM for a process that exists and is another user's, also where /proc would hide it."""
    found = 0
    for pid in range(1, 40000):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            continue
        except PermissionError:
            found += 1
    if not found:
        raise Held("only its own are there")
    return f"{found} processes"


@attempt("namespaces", "see processes of other users in /proc")
def other_processes_in_proc(promise: Promise) -> str:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
            if os.stat(f"/proc/{name}").st_uid != promise.uid:
                found.append(name)
    if not found:
        raise Held("only its own are there")
    return f"{len(found)} processes"


# --- identity ------------------------------------------------------------------------------------------------


step("user", "become-root", "become root", lambda: os.setresuid(0, 0, 0), "uid 0")


@attempt("user", "become another user")
def become_another(promise: Promise) -> str:
    os.setresuid(promise.uid + 1, promise.uid + 1, promise.uid + 1)
    return f"uid {promise.uid + 1}"


step("user", "join-group", "join root's group", lambda: os.setgroups([0]), "group 0")


@attempt("user", "have another identity than its own")
def identity(promise: Promise) -> str:
    users, groups = set(os.getresuid()), {*os.getresgid(), *os.getgroups()}
    if users != {promise.uid} or groups != {promise.gid}:
        return f"users {sorted(users)}, groups {sorted(groups)}"
    raise Held(f"only user {promise.uid} and group {promise.gid}")


@attempt("capabilities", "have a capability in any set")
def have_capability(promise: Promise) -> str:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Cap") and int(line.split()[1], 16):
            return line.replace("\t", " ")
    raise Held("all five sets are empty")


@attempt("capabilities", "raise a hard resource limit")
def raise_limit(promise: Promise) -> str:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    set_limit(resource.RLIMIT_NOFILE, hard + 1)
    return f"{hard + 1} open files"


step(
    "capabilities", "raise-priority", "run before everybody else",
    lambda: os.setpriority(os.PRIO_PROCESS, 0, -10), "nice -10",
)  # fmt: skip
step(
    "capabilities", "real-time", "run in real time",
    lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)), "SCHED_FIFO",
)  # fmt: skip


@attempt("no_new_privs", "gain rights from a set-user-ID program")
def set_user_id_program(promise: Promise) -> str:
    program = next((p for p in ("/usr/bin/su", "/usr/bin/mount", "/usr/bin/passwd") if _is_set_id(p)), None)
    if program is None:
        raise Held("there is none in this cage")
    # Its help goes into a pipe that is full already: it stays, running, until we have looked at it.
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, bytes(4096))
    except BlockingIOError:
        os.set_blocking(write, True)
    child = os.fork()
    if child == 0:
        os.dup2(write, 1)
        os.execv(program, [program, "--help"])
    deadline = time.monotonic() + 3
    status = ""
    while time.monotonic() < deadline:
        try:
            status = Path(f"/proc/{child}/status").read_text()
        except FileNotFoundError:
            if os.waitpid(child, os.WNOHANG)[0] == 0:
                os.close(read)
                return f"{program} runs as somebody whom /proc hides from us"
            break
        # In its first write it sleeps. Its name alone is there before its ids are: exec changes that first.
        if status.split("\n", 1)[0].split()[1] == os.path.basename(program) and "\nState:\tS" in status:
            break
    os.kill(child, signal.SIGKILL)
    ids = next(line for line in status.splitlines() if line.startswith("Uid:")).split()[1:]
    if set(ids) != {str(promise.uid)}:
        return f"{program} runs with ids {','.join(ids)}"
    raise Held(f"{program} runs as {promise.uid}")


def _is_set_id(path: str) -> bool:
    try:
        info = os.stat(path)
    except OSError:
        return False
    return bool(info.st_mode & 0o4000) and info.st_uid == 0


@attempt("no_new_privs", "be without the mark that stops new privileges")
def no_new_privs(promise: Promise) -> str:
    if libc.prctl(39, 0, 0, 0, 0) != 1:
        return "PR_GET_NO_NEW_PRIVS is not 1"
    libc.prctl(38, 0, 0, 0, 0)
    if libc.prctl(39, 0, 0, 0, 0) != 1:
        return "it was taken back"
    raise Held("it is set and cannot be taken back")


# --- what was inherited --------------------------------------------------------------------------------------


@attempt("descriptors", "use a descriptor that was left open")
def inherited_descriptors(promise: Promise) -> str:
    extra = [fd for fd in promise.descriptors if fd > 2]
    if extra:
        return f"descriptors {extra} are open"
    raise Held("only 0, 1 and 2")


@attempt("environment", "find the environment of the process that built the cage")
def inherited_environment(promise: Promise) -> str:
    for key, value in os.environ.items():
        if promise.marker and (promise.marker in value or promise.marker in key):
            return f"{key} came along"
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                text = Path(f"/proc/{name}/environ").read_bytes()
            except OSError:
                continue
            if promise.marker and promise.marker.encode() in text:
                return f"it is in the environment of process {name}"
    raise Held("nothing of it is there")


@attempt("namespaces", "learn the host's name")
def learn_host_name(promise: Promise) -> str:
    if promise.host_name in (socket.gethostname(), os.uname().nodename):
        return promise.host_name
    raise Held(f"it sees {socket.gethostname()!r}")


@attempt("namespaces", "learn how long the host has run")
def host_uptime(promise: Promise) -> str:
    if not promise.booted:
        raise Held("this host keeps no promise about it (namespaces.time)")
    clocks = {"boot clock": time.clock_gettime(time.CLOCK_BOOTTIME), "monotonic clock": time.monotonic()}
    if os.path.exists("/proc/uptime"):
        clocks["/proc/uptime"] = float(Path("/proc/uptime").read_text().split()[0])
    for name, seconds in clocks.items():
        if seconds >= promise.booted:
            return f"{name}: {seconds:.0f} s"
    raise Held(f"its clocks began {max(clocks.values()):.0f} s ago")


@attempt("namespaces", "read the host's System V shared memory")
def read_segment(promise: Promise) -> str:
    if ctypes.string_at(attach_segment(promise.segment, _SHM_RDONLY)) != promise.marker.encode():
        raise Held("it is another one, of the cage's own")
    return "it holds the marker"


@attempt("namespaces", "learn where its control groups are")
def learn_cgroup(promise: Promise) -> str:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        path = line.split(":", 2)[2]
        if path != "/":
            return line
    raise Held("every one is /")


@attempt("filesystem", "write to its own control groups")
def write_cgroup(promise: Promise) -> str:
    for folder, _, files in os.walk("/sys/fs/cgroup"):
        for name in ("pids.max", "memory.max", "memory.limit_in_bytes", "cgroup.procs"):
            if name in files:
                os.close(os.open(f"{folder}/{name}", os.O_WRONLY))
                return f"{folder}/{name} opened"
    raise Held("there is no /sys/fs/cgroup")
