"""Attempts on the view of files: what of the host can be seen, and where something can be written or executed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import stat
from collections.abc import Callable
from pathlib import Path

from .kit import Held, Promise, attempt, step, syscall

_MIB = 1 << 20


@attempt("filesystem", "read the host's password hashes")
def read_shadow(promise: Promise) -> str:
    return f"/etc/shadow: {len(Path('/etc/shadow').read_bytes())} bytes"


@attempt("filesystem", "list root's home")
def list_root_home(promise: Promise) -> str:
    beyond = [name for name in os.listdir("/root") if not _granted(f"/root/{name}", promise)]
    if not beyond:
        raise Held("only what is granted")
    return f"/root: {len(beyond)} entries"


@attempt("filesystem", "list the host's /var, /home, /boot or /opt")
def list_host_folders(promise: Promise) -> str:
    for path in ("/var", "/home", "/boot", "/opt", "/srv", "/mnt", "/media"):
        with contextlib.suppress(FileNotFoundError):
            beyond = [name for name in os.listdir(path) if not _granted(f"{path}/{name}", promise)]
            if beyond:
                return f"{path}: {len(beyond)} entries"
    raise Held("nothing of them is there")


def _granted(path: str, promise: Promise) -> bool:
    """Whether ``path`` is granted, below something granted, or on the way to it."""
    return any(f"{path}/".startswith(f"{grant}/") or grant.startswith(f"{path}/") for grant in promise.granted)


@attempt("filesystem", "reach the daemon's files or another plugin's")
def daemon_files(promise: Promise) -> str:
    for path in promise.hidden:
        if _granted(path, promise):
            continue
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return f"{path}: mode {os.stat(path).st_mode:o}"
    raise Held(f"none of {len(promise.hidden)} paths is there")


@attempt("filesystem", "look into /sys")
def see_sys(promise: Promise) -> str:
    return f"/sys/kernel: {len(os.listdir('/sys/kernel'))} entries"


_FIGURES = (
    "interrupts", "softirqs", "vmstat", "zoneinfo", "diskstats", "partitions", "pressure", "kallsyms", "config.gz",
    "cmdline", "locks", "modules", "timer_list", "buddyinfo", "iomem",
)  # fmt: skip


@attempt("proc", "read the host's figures in /proc, by three ways")
def read_host_figures(promise: Promise) -> str:
    for top in ("/proc", "/proc/self/root/proc", f"/proc/{os.getpid()}/task/{os.getpid()}/root/proc"):
        for name in _FIGURES:
            path = f"{top}/{name}"
            with contextlib.suppress(FileNotFoundError, PermissionError):
                found = os.listdir(path) if os.path.isdir(path) else Path(path).read_bytes().split()
                if len(found) > 20 or (name in ("cmdline", "pressure") and found):
                    return f"{path}: {len(found)} words"
    raise Held("none of them has anything")


@attempt("proc", "learn how much memory the host has from /proc/meminfo")
def host_memory(promise: Promise) -> str:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:") and int(line.split()[1]) * 1024 > promise.memory:
            return line
    raise Held("it tells the cage's memory")


@attempt("proc", "learn how busy the host is from /proc/stat and /proc/loadavg")
def host_load(promise: Promise) -> str:
    load = Path("/proc/loadavg").read_text().split()
    total = int(load[3].partition("/")[2])
    if total > promise.tasks + 1:
        return f"{total} tasks, load {load[0]}"
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith("ctxt ") and int(line.split()[1]):
            return line
    raise Held("they tell the cage's load")


@attempt("proc", "read settings of the host's kernel that no program needs")
def host_settings(promise: Promise) -> str:
    for name in "fs/file-nr fs/dentry-state kernel/core_pattern kernel/modprobe kernel/sysrq dev debug".split():
        if os.path.exists(f"/proc/sys/{name}"):
            return f"/proc/sys/{name} is there"
    raise Held("none of them is there")


@attempt("proc", "see control groups other than its own")
def other_groups(promise: Promise) -> str:
    for folder, below, files in os.walk("/sys/fs/cgroup"):
        if "cgroup.procs" in files and below:
            return f"{folder}: {', '.join(below)}"
    raise Held("no group has another one in it")


@attempt("filesystem", "reach the host's root through another process")
def root_through_process(promise: Promise) -> str:
    own = os.stat("/")
    why = OSError(errno.ENOENT, "only processes with the cage's own root are there")
    for name in [name for name in os.listdir("/proc") if name.isdigit()]:
        try:
            found = os.stat(f"/proc/{name}/root/")
            if not os.path.samestat(found, own):
                return f"/proc/{name}/root: {len(os.listdir(f'/proc/{name}/root/'))} entries"
        except OSError as error:
            why = error
    raise why


@attempt("filesystem", "open a kernel setting for writing")
def write_kernel_settings(promise: Promise) -> str:
    for path in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/sys/kernel/modprobe"):
        with contextlib.suppress(FileNotFoundError):
            os.close(os.open(path, os.O_WRONLY))  # opened, never written
            return f"{path} opened"
    raise Held("none of them is there")


@attempt("filesystem", "read the kernel's memory")
def kernel_memory(promise: Promise) -> str:
    return _open_host_file("/proc/kcore", "/dev/mem", "/dev/kmem")


@attempt("filesystem", "read the kernel's log")
def kernel_log(promise: Promise) -> str:
    return _open_host_file("/dev/kmsg", "/proc/kmsg")


def _open_host_file(*paths: str) -> str:
    """Open one of these files that is there, and more than the cover of an entry of /proc, but do not read it."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            device = os.fstat(fd).st_dev
            os.close(fd)
            if not path.startswith("/proc/") or device == os.stat("/proc/self").st_dev:
                return f"{path} opened"
    raise Held("no such file")


@attempt("filesystem", "find a disk or a terminal in /dev")
def host_devices(promise: Promise) -> str:
    known = {(1, 3), (1, 5), (1, 7), (1, 8), (1, 9)}  # null zero full random urandom
    for entry in os.scandir("/dev"):
        info = entry.stat(follow_symlinks=False)
        if stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
            number = (os.major(info.st_rdev), os.minor(info.st_rdev))
            if number not in known or stat.S_ISBLK(info.st_mode):
                return f"{entry.path} is device {number[0]}:{number[1]}"
    raise Held("only null, zero, full, random and urandom")


@attempt("filesystem", "find a terminal of the host")
def host_terminals(promise: Promise) -> str:
    found = [name for name in os.listdir("/dev/pts") if name.isdigit()]
    if not found:
        raise Held("there is none but what it opens itself")
    return f"terminals {found}"


@attempt("filesystem", "take more terminals than granted, whose buffers no memory cap counts")
def fill_terminals(promise: Promise) -> str:
    opened: list[int] = []
    try:
        while len(opened) <= promise.terminals:
            opened.append(os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise Held(f"refused after {len(opened)} of {promise.terminals}") from None
    return f"{len(opened)} terminals"


@attempt("filesystem", "write where only reading is granted")
def write_read_only(promise: Promise) -> str:
    why = OSError(errno.ENOENT, "none of the folders is there")
    for folder in promise.read_only:
        name = f"{folder}/.isolator-probe"
        try:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except FileNotFoundError:
            continue
        except OSError as error:
            why = error
            continue
        os.unlink(name)
        return f"a file was made in {folder}"
    raise why


@attempt("filesystem", "execute a program brought along in a writable folder", strict=True)
def execute_from_scratch(promise: Promise) -> str:
    return _in_scratch(Path("/usr/bin/true"), _execute)


@attempt("filesystem", "load code brought along in a writable folder", strict=True)
def load_from_scratch(promise: Promise) -> str:
    def load(path: str) -> None:
        with Path(path).open("rb") as file:
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_EXEC).close()

    return _in_scratch(Path("/usr/bin/true"), load)


@attempt("seccomp", "execute a program brought along in memory", strict=True)
def execute_from_memory(promise: Promise) -> str:
    fd = syscall("memfd_create", b"probe", 0)
    os.write(fd, Path("/usr/bin/true").read_bytes())
    _execute(fd)
    return "it ran"


def _in_scratch(program: Path, use: Callable[[str], None]) -> str:
    """Write the program into each writable folder and use it there; the folders where that succeeds."""
    through, why = [], OSError(errno.ENOENT, "no writable folder")
    content = program.read_bytes()
    for folder in ("/tmp", "/dev/shm", "/state", "/run/isolator/plugin"):
        path = f"{folder}/probe-program"
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o700)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EROFS):
                why = error
            continue
        try:
            os.write(fd, content)
            os.close(fd)
            use(path)
            through.append(folder)
        except OSError as error:  # refused, or a folder of 64 KiB is too small for it
            why = error
        finally:
            os.unlink(path)
    if through:
        return ", ".join(through)
    raise why


def _execute(program: str | int) -> None:
    """Execute a file, by path or by descriptor, in a child where one can be made; raises OSError.

    Where none can, success ends this process: then the attempt has no result, which never counts as held.
    """
    try:
        child = os.fork()
    except PermissionError:
        os.execve(program, ["true"], {})
    if child == 0:
        try:
            os.execve(program, ["true"], {})
        except OSError as error:
            os._exit(error.errno or 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise OSError(code, os.strerror(code), str(program))


@attempt("filesystem", "make a device node")
def make_device(promise: Promise) -> str:
    syscall("mknodat", -100, b"/tmp/probe-device", stat.S_IFCHR | 0o600, os.makedev(1, 1))
    os.unlink("/tmp/probe-device")
    return "a node for the host's memory"


@attempt("filesystem", "open a file by its handle, past every folder's permissions")
def open_by_handle(promise: Promise) -> str:
    handle = ctypes.create_string_buffer(8 + 128)
    ctypes.c_uint.from_buffer(handle).value = 128
    mount = ctypes.c_int()
    syscall("name_to_handle_at", -100, b"/tmp", ctypes.byref(handle), ctypes.byref(mount), 0)
    place = os.open("/tmp", os.O_RDONLY)
    opened = syscall("open_by_handle_at", place, ctypes.byref(handle), os.O_RDONLY)
    if os.fstat(opened).st_ino != os.stat("/tmp").st_ino:
        raise Held("another file")
    return "a folder was opened by handle"


@attempt("filesystem", "give a program of its own a capability by file attribute")
def file_capability(promise: Promise) -> str:
    Path("/tmp/probe-cap").write_bytes(b"")
    # Version 2, effective, CAP_SYS_ADMIN permitted.
    value = (0x02000001).to_bytes(4, "little") + (1 << 21).to_bytes(4, "little") + bytes(12)
    os.setxattr("/tmp/probe-cap", "security.capability", value)
    return "the attribute was set"


def _fill(folder: str, limit: int, what: str = "") -> str:
    """Allocate beyond ``limit`` bytes in ``folder``; ``what``: its kind, where a cage may have none."""
    if what and not os.path.isdir(folder):
        raise Held(f"this cage has no {what} folder")
    fd = os.open(f"{folder}/probe-fill", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    step, written = 256 * 1024, 0
    try:
        while written <= limit + limit // 8 + _MIB:
            os.posix_fallocate(fd, written, step)
            written += step
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Held(f"full after {written / _MIB:g} MiB of {limit / _MIB:g}") from None
    finally:
        os.close(fd)
        os.unlink(f"{folder}/probe-fill")
    return f"{written / _MIB:g} MiB in {folder}"


attempt("filesystem", "fill /tmp beyond its cap", name="fill-tmp", alone=True, seconds=20)(
    lambda promise: _fill("/tmp", promise.tmp)
)
attempt("filesystem", "fill /dev/shm beyond its cap", name="fill-shm", alone=True, seconds=20)(
    lambda promise: _fill("/dev/shm", promise.shm)
)
attempt("filesystem", "fill the state folder beyond its cap", name="fill-state", seconds=20)(
    lambda promise: _fill("/state", promise.state, "state")
)
attempt("filesystem", "fill the socket folder beyond its cap", name="fill-socket-folder")(
    lambda _: _fill("/run/isolator/plugin", 64 * 1024, "socket")
)


@attempt("filesystem", "use up the inodes of /tmp", seconds=20)
def fill_tmp_inodes(promise: Promise) -> str:
    os.mkdir("/tmp/probe-inodes")
    made = 0
    try:
        while made <= promise.tmp_inodes:
            os.close(os.open(f"/tmp/probe-inodes/{made}", os.O_WRONLY | os.O_CREAT, 0o600))
            made += 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Held(f"refused after {made} files") from None
    finally:
        for number in range(made):
            os.unlink(f"/tmp/probe-inodes/{number}")
        os.rmdir("/tmp/probe-inodes")
    return f"{made} files"


@attempt("filesystem", "read the host's machine id")
def machine_id(promise: Promise) -> str:
    found = Path("/etc/machine-id").read_text().strip()
    if found != promise.machine_id:
        raise Held("another one, made for this cage")
    return "it is the host's"


step(
    "landlock", "write-proc", "write to a file of /proc, which no grant names",
    lambda: os.close(os.open("/proc/self/oom_score_adj", os.O_WRONLY)), "/proc/self/oom_score_adj opened for writing",
)  # fmt: skip


@attempt("landlock", "reopen a standard stream for writing through /proc")
def reopen_standard_input(promise: Promise) -> str:
    if os.path.samestat(os.fstat(0), os.stat("/dev/null")):
        raise Held("standard input is /dev/null")
    os.close(os.open("/proc/self/fd/0", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK))
    return f"{os.readlink('/proc/self/fd/0')} opened anew"
