"""Peers: the tools that confine a process today, each set up to give as much of a cage as it can.

All run ``/usr/bin/true`` on a view of ``/usr`` alone, as an unprivileged user where the tool can, without network and
without capabilities; those that take a system call filter get the very BPF program that Isolator loads. The row of a
tool has the parts that it cannot build. Each is tried once before it is timed: a peer that fails here is listed with
its error.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import prctl

from bench.frame import Contender, Skipped
from isolator.layers.cgroup.subtree import find_hierarchies
from tests.support.timeouts import EMULATED

TRUE = "/usr/bin/true"
BUBBLEWRAP = "bubblewrap + seccomp"
_NOBODY = 65534
_MEMORY, _TASKS = 256 << 20, 64  # the caps that Isolator's default policy gives, for those that take caps
# Likewise; but where the processor is emulated a quarter of it is too little for /usr/bin/true within one period, and
# what would be measured is how long the scheduler lets whoever has a cap wait for the next.
CPU_PERCENT = 100 if EMULATED else 25
_SECCOMP_FD = 10


# What the spawned tools complain about, kept to say why one does not work here.
_complaints = os.memfd_create("stderr")


def spawn(argv: list[str], actions: Sequence[tuple[int, int, str, int, int]] = ()) -> None:
    """Start a program as cheaply as the system can (vfork), wait, and raise unless it returned 0."""
    quiet = (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)
    errors = (os.POSIX_SPAWN_DUP2, _complaints, 2)
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    pid = os.posix_spawn(argv[0], argv, environment, file_actions=[quiet, errors, *actions])
    _, status = os.waitpid(pid, 0)
    if status != 0:
        said = os.pread(_complaints, 65536, 0).decode(errors="replace").strip().rpartition("\n")[2]
        raise RuntimeError(f"it returned {os.waitstatus_to_exitcode(status)}: {said or 'without a word'}")


def find(name: str) -> str:
    """Find a program; raises FileNotFoundError with a remedy."""
    path = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    if path is None:
        raise FileNotFoundError(f"{name} is not installed (apt-get install {name})")
    return path


class Orphans:
    """Processes that a tool leaves to their end when it returns: this process adopts them while it measures."""

    def __init__(self) -> None:
        self._known: set[int] = set()

    def __enter__(self) -> Orphans:
        prctl.set_child_subreaper(1)
        return self

    def __exit__(self, *_: object) -> None:
        prctl.set_child_subreaper(0)

    def note(self) -> None:
        """Note the children that are no orphans of the tool to come."""
        self._known = _children()

    def reap(self) -> None:
        """Wait for the end of all others, which comes when the kernel has taken their namespaces down."""
        for pid in _children() - self._known:
            os.waitpid(pid, 0)

    def settled(self, one: Contender) -> Contender:
        """The tool, timed until it returns: what it left is waited for, and on nobody's bill."""
        return replace(one, before=self.note, after=self.reap)

    def until_removed(self, one: Contender) -> Contender:
        """The tool, timed until nothing of it is left."""

        def once() -> None:
            one.once()
            self.reap()

        return Contender(f"{one.name}, until all is removed", one.builds, once, self.note)


def _children() -> set[int]:
    return {int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def plain(_work: Path, _filter: Path) -> Contender:
    return Contender("plain spawn", "nothing", lambda: spawn([TRUE]))


def bubblewrap(_work: Path, program: Path) -> Contender:
    argv = [
        *(find("bwrap"), "--unshare-all", "--new-session", "--die-with-parent", "--cap-drop", "ALL"),
        *("--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin", "--symlink", "usr/lib", "/lib"),
        *("--symlink", "usr/lib64", "/lib64", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"),
        *("--uid", str(_NOBODY), "--gid", str(_NOBODY), "--seccomp", str(_SECCOMP_FD), TRUE),
    ]
    # Opened anew each time: bubblewrap reads to the end, and a shared descriptor would keep its position.
    opened = (os.POSIX_SPAWN_OPEN, _SECCOMP_FD, str(program), os.O_RDONLY, 0)
    return Contender(BUBBLEWRAP, "no network rules, no cgroup, no user", lambda: spawn(argv, [opened]))


def firejail(_work: Path, _filter: Path) -> Contender:
    argv = [
        *(find("firejail"), "--quiet", "--noprofile", "--net=none", "--private", "--private-dev", "--private-tmp"),
        *("--caps.drop=all", "--nonewprivs", "--seccomp", "--rlimit-as=1g", TRUE),
    ]
    return Contender("firejail", "no cgroup, host's file system", lambda: spawn(argv))


def crun(work: Path, _filter: Path) -> Contender:
    return _oci("crun", work)


def runc(work: Path, _filter: Path) -> Contender:
    return _oci("runc", work)


def systemd_run(_work: Path, _filter: Path) -> Contender:
    if not Path("/run/systemd/system").exists():
        raise FileNotFoundError("systemd does not run this host (in the VM it does)")
    properties = (
        *("DynamicUser=yes", "PrivateNetwork=yes", "PrivateTmp=yes", "PrivateDevices=yes", "ProtectSystem=strict"),
        *("ProtectHome=yes", "ProtectProc=invisible", "PrivateIPC=yes", "ProtectKernelTunables=yes"),
        *("ProtectControlGroups=yes", "ProtectKernelModules=yes", "NoNewPrivileges=yes", "CapabilityBoundingSet="),
        *("SystemCallFilter=@system-service", f"MemoryMax={_MEMORY}", f"TasksMax={_TASKS}", f"CPUQuota={CPU_PERCENT}%"),
    )
    argv = [find("systemd-run"), "--wait", "--quiet", "--collect", *(w for p in properties for w in ("-p", p)), TRUE]
    return Contender("systemd-run", "no pid namespace, host's file system read-only", lambda: spawn(argv))


PEERS: tuple[Callable[[Path, Path], Contender], ...] = (plain, bubblewrap, crun, runc, firejail, systemd_run)


@contextmanager
def peers(work: Path, program: Path) -> Iterator[tuple[list[Contender], list[Skipped]]]:
    """Set up every peer that works on this host; yields them, and the others with the reason.

    ``work``: a root-owned empty folder. The cgroups that the container runtimes make are removed at the end.
    """
    usable: list[Contender] = []
    skipped: list[Skipped] = []
    groups = _group_folders()
    before = {folder for folder in groups if folder.exists()}
    try:
        for make in PEERS:
            os.ftruncate(_complaints, 0)
            os.lseek(_complaints, 0, os.SEEK_SET)
            try:
                contender = make(work, program)
                contender.once()
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                skipped.append(Skipped(make.__name__.replace("_", "-"), str(error)))
            else:
                usable.append(contender)
        yield usable, skipped
    finally:
        for folder in groups:  # innermost first
            if folder not in before:
                with suppress(FileNotFoundError):
                    folder.rmdir()


def _groups_path() -> str:
    """Name the runtimes' groups: below our own memory group, which exists nowhere else by chance."""
    found = find_hierarchies()
    own = found.v1.get("memory") or found.unified
    if own is None or not found.v1:
        return "/isolator-bench"
    line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if "memory" in line.split(":")[1])
    return line.split(":", 2)[2].rstrip("/") + "/isolator-bench"


def _group_folders() -> list[Path]:
    """List the folders that an OCI runtime makes on the way to its leaf, in each hierarchy, innermost first."""
    mounts = [
        words[4]
        for words in (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines())
        if words[words.index("-") + 1] in {"cgroup", "cgroup2"}
    ]
    path = Path(_groups_path().lstrip("/"))
    return [Path(mount) / part for mount in mounts for part in (path, *path.parents) if part != Path()]


def _oci(name: str, work: Path) -> Contender:
    """Write a container: the runtime's own default configuration, a root of ``/usr`` alone, caps and a filter."""
    tool = find(name)
    bundle = work / name
    root = bundle / "rootfs"
    for folder in ("usr", "proc", "dev", "sys", "tmp"):
        (root / folder).mkdir(parents=True)
    for link in ("bin", "lib", "lib64"):
        (root / link).symlink_to(f"usr/{link}")
    subprocess.run([tool, "spec"], cwd=bundle, check=True, capture_output=True)
    config = json.loads((bundle / "config.json").read_text())
    config["process"].update(args=[TRUE], terminal=False, user={"uid": _NOBODY, "gid": _NOBODY})
    config["process"]["capabilities"] = {}
    config["root"] = {"path": "rootfs", "readonly": True}
    bind = {"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro", "nosuid", "nodev"]}
    config["mounts"] = [mount for mount in config["mounts"] if mount["destination"] != "/sys/fs/cgroup"] + [bind]
    config["linux"]["cgroupsPath"] = f"{_groups_path()}/{name}"
    config["linux"]["resources"] = {
        "memory": {"limit": _MEMORY},
        "pids": {"limit": _TASKS},
        "cpu": {"quota": CPU_PERCENT * 100, "period": 10000},
        "devices": [{"allow": False, "access": "rwm"}],
    }
    config["linux"]["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": _DENIED, "action": "SCMP_ACT_ERRNO"}],
    }
    (bundle / "config.json").write_text(json.dumps(config))
    argv = [tool, "--root", str(work / f"{name}-state"), "run", "--bundle", str(bundle), f"isolator-bench-{name}"]
    return Contender(name, "empty network, no rules; cgroup caps, seccomp", lambda: spawn(argv))


# The runtimes take names, not BPF: a deny list like those that container engines ship.
_DENIED = [
    *("mount", "umount2", "pivot_root", "setns", "unshare", "ptrace", "process_vm_readv", "process_vm_writev", "bpf"),
    *("perf_event_open", "userfaultfd", "keyctl", "add_key", "request_key", "init_module", "finit_module"),
    *("delete_module", "kexec_load", "open_by_handle_at", "quotactl", "settimeofday", "clock_settime", "reboot"),
    *("swapon", "swapoff", "acct", "iopl", "ioperm", "nfsservctl", "lookup_dcookie", "mbind", "move_pages"),
]
