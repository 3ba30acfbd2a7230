"""Run inside a cage: read back the kernel's view of it, and try out its edges; the result is one line of JSON.

The one argument is JSON: ``calls`` (numbers of system calls to make with senseless arguments), ``connect``
([address, port]s), ``read`` (host paths that the policy opens), ``serve`` (a port to answer one connection on, or 0),
``fork`` (whether the profile lets it fork).
Standard library only: the system's own Python runs it.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import resource
import socket
import stat
import sys
import threading
from collections.abc import Callable
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
PAGE = mmap.PAGESIZE
SCRATCH_NAME = ".inspection"


def text_of(path: str) -> str:
    with open(path) as file:  # noqa: PTH123  # no pathlib: it may be a cage without any room
        return file.read()


def lines(path: str) -> list[str]:
    return text_of(path).splitlines()


def link_of(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError as error:
        return str(error)


def error_of(call: Callable[..., Any], *arguments: Any) -> str:
    """The error's name, or ``done``."""
    try:
        call(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)
    return "done"


def c_error(result: int) -> str:
    return "done" if result != -1 else errno.errorcode[ctypes.get_errno()]


def identity() -> dict[str, Any]:
    status = dict(line.split(":\t", 1) for line in lines("/proc/self/status") if ":\t" in line)
    others = [(0, 0, 0), (os.getuid() + 1,) * 3]
    return {
        "status": status,
        "become": [error_of(os.setresuid, *ids) for ids in others]
        + [error_of(os.setresgid, *ids) for ids in others]
        + [error_of(os.setgroups, [0])],
        "securebits": libc.prctl(27, 0, 0, 0, 0),
        "raise ambient": c_error(libc.prctl(47, 2, 0, 0, 0)),
        "capset": c_error(_capset()),
        "namespaces": {
            kind: link_of(f"/proc/self/ns/{kind}") for kind in ("mnt", "pid", "ipc", "uts", "cgroup", "net", "time")
        },
        "processes": sorted(int(name) for name in os.listdir("/proc") if name.isdigit()),
        "host name": os.uname().nodename,
        "cgroup": open("/proc/self/cgroup").read(),  # noqa: PTH123
        "interfaces": [line.split(":")[0].strip() for line in text_of("/proc/self/net/dev").splitlines()[2:]],
    }


def _capset() -> int:
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(1, 1, 1, 0, 0, 0)
    return int(libc.syscall(126 if os.uname().machine == "x86_64" else 91, header, data))


def files(read: list[str]) -> dict[str, Any]:
    mounts = {}
    for line in text_of("/proc/self/mountinfo").splitlines():
        fields = line.split()
        mounts[fields[4]] = fields[5].split(",")
    modes = {name: os.lstat(f"/dev/{name}").st_mode for name in os.listdir("/dev")}
    devices = [name for name, mode in modes.items() if stat.S_ISCHR(mode) or stat.S_ISBLK(mode)]
    writable = []
    for top in (name for name in os.listdir("/") if name not in ("proc", "usr") and not os.path.islink(f"/{name}")):
        for folder, _, _ in os.walk(f"/{top}"):
            if _writable(folder) == "done":
                writable.append(folder)
    sizes = {place: os.statvfs(place) for place in ("/tmp", "/dev/shm", "/state") if os.path.isdir(place)}
    return {
        "mounts": mounts,
        "devices": sorted(devices),
        "terminal": _terminal(),
        "writable": sorted(writable),
        "write": {
            place: _writable(place) for place in ("/", "/usr/bin", "/etc", "/plugin", *read) if os.path.exists(place)
        },
        "readable": [place for place in ("/usr/bin", "/plugin", *read) if os.path.exists(place) and os.listdir(place)],
        "sizes": {place: found.f_blocks * found.f_frsize for place, found in sizes.items()},
    }


def figures() -> dict[str, Any]:
    """Limits and load in every place where programs look for them, and the rest of /proc and /sys."""
    entries = {}
    for entry in os.scandir("/proc"):
        if entry.is_symlink():
            entries[entry.name] = "link"
        elif not entry.name.isdigit():
            own = os.stat(entry.path).st_dev == os.stat("/proc").st_dev
            entries[entry.name] = "the kernel's" if own else "covered" if _has_content(entry.path) else "empty"
    meminfo = dict(line.split(":") for line in lines("/proc/meminfo"))
    groups = {
        folder: [os.path.exists(f"{folder}/cgroup.procs"), *below] for folder, below, _ in os.walk("/sys/fs/cgroup")
    }
    return {
        "entries": entries,
        "sys": sorted(os.listdir("/sys")),
        "settings": [os.path.join(folder, name) for folder, _, names in os.walk("/proc/sys") for name in names],
        "groups": groups,
        "processors": {
            "online": _numbers(text_of("/sys/devices/system/cpu/online")),
            "possible": _numbers(text_of("/sys/devices/system/cpu/possible")),
            "cpuinfo": [int(line.split(":")[1]) for line in lines("/proc/cpuinfo") if line.startswith("processor")],
            "stat": [int(line.split()[0][3:]) for line in lines("/proc/stat") if line[3:4].isdigit()],
            "affinity": sorted(os.sched_getaffinity(0)),
        },
        "counted": [os.cpu_count(), os.sysconf("SC_NPROCESSORS_CONF"), os.sysconf("SC_NPROCESSORS_ONLN")],
        "meminfo": {name: int(value.split()[0]) * 1024 for name, value in meminfo.items()},
        "load": text_of("/proc/loadavg"),
    }


def _has_content(path: str) -> bool:
    return bool(os.listdir(path) if os.path.isdir(path) else text_of(path))


def _numbers(listed: str) -> list[int]:
    runs = [run.partition("-")[::2] for run in listed.strip().split(",")]
    return [number for low, high in runs for number in range(int(low), int(high or low) + 1)]


def _terminal() -> str:
    """The name of a new terminal, through which a word has gone."""
    master, terminal = os.openpty()
    os.write(terminal, b"word\n")
    with open(master, "rb", buffering=0, closefd=False) as reader:
        said = b"".join(iter(lambda: reader.read(1), b"\n"))  # it may come in pieces
    name = os.ttyname(terminal) if said == b"word\r" else "silent"
    os.close(master)
    os.close(terminal)
    return name


def _writable(folder: str) -> str:
    path = f"{folder}/{SCRATCH_NAME}"
    answer = error_of(lambda: os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)))
    if answer == "done":
        os.unlink(path)
    return answer


def connections(targets: list[list[Any]]) -> dict[str, str]:
    def connect(host: str, port: int) -> None:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
            sock.settimeout(3)
            sock.connect((host, port))

    found = {f"{host} {port}": error_of(connect, host, port) for host, port in targets}
    with socket.create_server(("127.0.0.1", 0)) as server:
        found["own loopback"] = error_of(connect, "127.0.0.1", server.getsockname()[1])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        found["datagram"] = error_of(sock.sendto, b"x", ("192.88.99.1", 9))
    return found


def limits(*, fork: bool) -> dict[str, Any]:
    opened = []
    while len(opened) < 5000:
        try:
            opened.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            break
    for fd in opened:
        os.close(fd)
    room = mmap.mmap(-1, 64 * 1024 + PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(room))
    found: dict[str, Any] = {
        "open files": len(opened) + 3,
        "lock 64K": c_error(libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(64 * 1024))),
        "lock more": c_error(libc.mlock(ctypes.c_void_p(address + 64 * 1024), ctypes.c_size_t(PAGE))),
        "core limit": resource.getrlimit(resource.RLIMIT_CORE),
        "core filter": text_of("/proc/self/coredump_filter").strip(),
    }
    libc.munlock(ctypes.c_void_p(address), ctypes.c_size_t(64 * 1024))
    if fork:
        before = set(os.listdir("/tmp"))
        if (child := os.fork()) == 0:
            os.chdir("/tmp")
            os.abort()
        found["dumped"] = os.WCOREDUMP(os.waitpid(child, 0)[1])
        found["core files"] = sorted(set(os.listdir("/tmp")) - before)
    else:
        found["fork"] = error_of(_fork_and_wait)
    found["spawn"] = error_of(os.posix_spawn, "/usr/bin/true", ["true"], {})
    if found["spawn"] == "done":
        os.wait()
    found["tasks"] = _tasks()
    return found


def _fork_and_wait() -> None:
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)


def _tasks() -> int:
    """How many tasks there can be at once: threads are started until the kernel refuses one."""
    end, started = threading.Event(), []
    try:
        while len(started) < 500:
            thread = threading.Thread(target=end.wait)
            thread.start()
            started.append(thread)
    except RuntimeError:
        pass
    end.set()
    for thread in started:
        thread.join()
    return len(started) + 1


def memory() -> dict[str, str]:
    def get(protection: int) -> int:
        address = libc.mmap(None, ctypes.c_size_t(PAGE), protection, 0x22, -1, ctypes.c_long(0))
        return -1 if address in (None, ctypes.c_void_p(-1).value) else int(address)

    def change(address: int, protection: int) -> str:
        return c_error(libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), protection))

    both = c_error(get(mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC))
    plain, code = get(mmap.PROT_READ | mmap.PROT_WRITE), get(mmap.PROT_READ | mmap.PROT_EXEC)
    return {
        "writable and executable": both,
        "writable made executable": change(plain, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC),
        "executable made writable too": change(code, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC),
        "ordinary": change(plain, mmap.PROT_READ),
    }


def calls(numbers: list[int]) -> dict[int, str]:
    found = {}
    for number in numbers:
        ctypes.set_errno(0)
        found[number] = c_error(libc.syscall(ctypes.c_long(number), *(ctypes.c_long(-1) for _ in range(6))))
    return found


def main() -> None:
    task = json.loads(sys.argv[1])
    seen: dict[str, Any] = {"uid": os.getuid()}
    seen |= identity()
    seen |= files(task["read"])
    seen["figures"] = figures()
    seen["connections"] = connections(task["connect"])
    seen["memory"] = memory()
    seen |= limits(fork=task["fork"])
    seen["calls"] = calls(task["calls"])
    print(json.dumps(seen), flush=True)
    if task["serve"]:
        with socket.create_server(("127.0.0.1", task["serve"])) as server:
            print("serving", flush=True)
            server.settimeout(30)
            peer, _ = server.accept()
            peer.sendall(b"from the cage")
            peer.shutdown(socket.SHUT_WR)
            peer.recv(1)  # until the other side has read it and closed


if __name__ == "__main__":
    main()
