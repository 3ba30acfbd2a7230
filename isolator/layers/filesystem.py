"""The cage's view of files: an empty tmpfs filled with exactly what it needs, then pivot_root.

Built by the child in its own mount namespace with the descriptor-based mount API. Sources are taken
first, while the old root is visible, as detached read-only trees; then the new root is attached, filled, made the
root, and the old one is detached, so there is nothing to climb back to.

    /usr (and /bin, /lib, ... as the host has them)  read-only
    /etc        generated: passwd group hosts resolv.conf nsswitch.conf machine-id hostname; certificates,
                alternatives, ld.so.cache and localtime of the host read-only
    /proc       only processes, only its own (hidepid=invisible, subset=pid)
    /dev        null zero full random urandom, the standard links, shm
    /tmp /dev/shm          tmpfs with size and inode caps
    /state                 persistent and capped (when the policy grants any)
    /plugin                the plugin's files, read-only
    /run/isolator          plugin/ (its socket), host/ (the host API), config/ (secret files, in memory)

There is no /sys, no terminal, nothing else of /run, /var, /home or /root.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING, Any

from isolator.layers.base import CageSpec, Control, Layer, mismatch
from isolator.linux import mount

if TYPE_CHECKING:
    from isolator.launch.plan import Plan
    from isolator.policy.model import EffectivePolicy

_MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_ETC_OF_HOST = ("ssl/certs", "alternatives", "ld.so.cache", "localtime", "ca-certificates", "pki", "mime.types")
_DEVICES = ("null", "zero", "full", "random", "urandom")
_LINKS = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"}

_READ_ONLY = mount.RDONLY | mount.NOSUID | mount.NODEV
_SCRATCH = mount.NOSUID | mount.NODEV | mount.NOEXEC
_PARKING = "/proc"  # exists on every host, and nothing below it is a source; only in the child's own namespace


class Filesystem(Layer):
    """Nothing of the host but /usr and what the policy names, read-only; a few capped places to write."""

    name = "filesystem"

    @classmethod
    def check(cls) -> list[Control]:
        try:
            os.close(mount.new_filesystem("tmpfs", {"size": "4096"}))
        except OSError as error:
            remedy = "use kernel 5.12 or newer, and run as root outside a container that forbids mounts"
            return [Control("file system view", cls.name, "unavailable", f"{error.strerror}", remedy)]
        return [Control("file system view", cls.name, "enforced", "new mount API, pivot_root")]

    @classmethod
    def describe(cls, policy: EffectivePolicy) -> str:
        fs = policy.filesystem
        extra = f", and reads {', '.join(fs.read)}" if fs.read else ""
        state = f"/state ({_mib(fs.state)}), " if fs.state else ""
        return (
            f"It sees /usr and its own files read-only{extra}; it can write to {state}/tmp ({_mib(fs.tmp)}) and "
            f"/dev/shm ({_mib(fs.shm)}); nothing else of this host is visible."
        )

    def prepare(self, spec: CageSpec, plan: Plan) -> None:
        fs = spec.policy.filesystem
        owner = {"uid": str(spec.uid), "gid": str(spec.gid)}
        binds = [{"source": "/usr", "target": "usr", "attributes": _READ_ONLY}]
        links: dict[str, str] = {}
        for name in _MERGED:
            path = f"/{name}"
            if os.path.islink(path):
                links[name] = os.readlink(path)
            elif os.path.isdir(path):
                binds.append({"source": path, "target": name, "attributes": _READ_ONLY})
        for name in _ETC_OF_HOST:
            if os.path.exists(f"/etc/{name}"):
                binds.append({"source": f"/etc/{name}", "target": f"etc/{name}", "attributes": _READ_ONLY})
        moves = []
        for number, bind in enumerate(spec.binds):
            # Copied here: the child, in a mount namespace of its own, may not copy a mount of ours (EINVAL).
            tree = mount.clone_tree("", directory=bind.fd)
            plan.give(f"bind{number}", tree)
            attributes = mount.NOSUID | mount.NODEV
            attributes |= 0 if bind.writable else mount.RDONLY
            attributes |= 0 if bind.executable else mount.NOEXEC
            mount.set_attributes(tree, attributes)
            is_folder = stat.S_ISDIR(os.fstat(tree).st_mode)
            moves.append({"fd": f"bind{number}", "target": bind.target.lstrip("/"), "folder": is_folder})
        for number, (target, fd) in enumerate(spec.mounts.items()):
            plan.fds[f"mount{number}"] = fd
            moves.append({"fd": f"mount{number}", "target": target.lstrip("/"), "folder": True})
        tmpfs = [
            {"target": "tmp", "size": fs.tmp, "inodes": fs.tmp_inodes, "mode": "1777"},
            {"target": "dev/shm", "size": fs.shm, "inodes": 1024, "mode": "1777"},
        ]
        if spec.files:
            tmpfs.append({"target": "run/isolator/config", "size": 1 << 20, "inodes": 64, "mode": "0500", **owner})
        self._root = None
        plan.sections[self.name] = {
            "binds": binds,
            "links": links,
            "moves": moves,
            "tmpfs": tmpfs,
            "files": _etc(spec),
            "secret_files": {f"run/isolator/config/{name}": text for name, text in spec.files.items()},
            "uid": spec.uid,
            "gid": spec.gid,
        }

    @staticmethod
    def enter(section: dict[str, Any], fds: dict[str, int]) -> None:
        mount.set_propagation("/", mount.MS_PRIVATE)
        pending = [(bind["target"], *_take(bind)) for bind in section["binds"]]
        pending += [(f"dev/{name}", *_take_device(name)) for name in _DEVICES]
        root = mount.new_filesystem("tmpfs", {"size": "1m", "nr_inodes": "1024", "mode": "0755"})
        mount.attach(root, _PARKING)
        os.chdir(root)
        for name, target in section["links"].items():
            os.symlink(target, name)
        for name, text in section["files"].items():
            _write(name, text, 0o444)
        for target, is_folder, fd in pending:
            _place(target, is_folder=is_folder)
            mount.attach(fd, target)
            os.close(fd)
        for entry in section["tmpfs"]:
            options = {"size": str(entry["size"]), "nr_inodes": str(entry["inodes"]), "mode": entry["mode"]}
            options |= {key: entry[key] for key in ("uid", "gid") if key in entry}
            fd = mount.new_filesystem("tmpfs", options, attributes=_SCRATCH)
            _place(entry["target"], is_folder=True)
            mount.attach(fd, entry["target"])
            os.close(fd)
        for entry in section["moves"]:
            _place(entry["target"], is_folder=entry["folder"])
            mount.attach(fds[entry["fd"]], entry["target"])
        for name, text in section["secret_files"].items():
            _write(name, text, 0o400)
            os.chown(name, section["uid"], section["gid"])
        for name, target in _LINKS.items():
            os.symlink(target, f"dev/{name}")
        _place("proc", is_folder=True)
        proc = mount.new_filesystem("proc", {"hidepid": "invisible", "subset": "pid"}, attributes=_SCRATCH)
        mount.attach(proc, "proc")
        mount.set_attributes(root, mount.RDONLY | mount.NOSUID | mount.NODEV, recursive=False)
        mount.pivot_root()

    def confirm(self, pid: int) -> None:
        mounts = _mounts(pid)
        if "/" not in mounts or mounts["/"].kind != "tmpfs" or "ro" not in mounts["/"].options:
            raise mismatch(self.name, "/", "a read-only tmpfs", mounts.get("/"))
        for place, found in mounts.items():
            if place.startswith("/dev/") and place != "/dev/shm":
                continue
            if "nosuid" not in found.options or "nodev" not in found.options:
                raise mismatch(self.name, place, "nosuid,nodev", ",".join(sorted(found.options)))
        if "ro" not in mounts["/usr"].options:
            raise mismatch(self.name, "/usr", "read-only", "writable")


class _Mounted:
    def __init__(self, kind: str, options: set[str]) -> None:
        self.kind, self.options = kind, options


def _mounts(pid: int) -> dict[str, _Mounted]:
    found = {}
    with open(f"/proc/{pid}/mountinfo") as lines:  # noqa: PTH123
        for line in lines:
            before, _, after = line.partition(" - ")
            fields = before.split()
            found[fields[4]] = _Mounted(after.split()[0], set(fields[5].split(",")))
    return found


def _take(bind: dict[str, Any]) -> tuple[bool, int]:
    """The detached, restricted tree of one bind, and whether it is a folder."""
    fd = mount.clone_tree(bind["source"])
    mount.set_attributes(fd, bind["attributes"])
    return stat.S_ISDIR(os.fstat(fd).st_mode), fd


def _take_device(name: str) -> tuple[bool, int]:
    fd = mount.clone_tree(f"/dev/{name}", recursive=False)
    mount.set_attributes(fd, mount.NOSUID | mount.NOEXEC, clear=mount.NODEV | mount.RDONLY)
    return False, fd


def _place(target: str, *, is_folder: bool) -> None:
    """Make the mount point ``target`` below the current directory, with the folders above it."""
    parent = target if is_folder else os.path.dirname(target)
    if parent:
        with contextlib.suppress(FileExistsError):
            os.makedirs(parent, 0o755, exist_ok=True)
    if not is_folder:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o444))


def _write(name: str, text: str, mode: int) -> None:
    _place(name, is_folder=False)
    os.chmod(name, 0o600)
    fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.write(fd, text.encode())
        os.fchmod(fd, mode)
    finally:
        os.close(fd)


def _etc(spec: CageSpec) -> dict[str, str]:
    user = spec.user
    home = "/state" if spec.policy.filesystem.state else "/tmp"
    root = "root:x:0:0:root:/nonexistent:/usr/sbin/nologin"
    return {
        "etc/passwd": f"{root}\n{user}:x:{spec.uid}:{spec.gid}::{home}:/bin/sh\n",
        "etc/group": f"root:x:0:\n{user}:x:{spec.gid}:\n",
        "etc/hosts": f"127.0.0.1 localhost {spec.hostname}\n::1 localhost\n",
        "etc/resolv.conf": "nameserver 127.0.0.53\noptions timeout:5 attempts:1\n",
        "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
        "etc/hostname": f"{spec.hostname}\n",
        "etc/machine-id": f"{os.urandom(16).hex()}\n",
    }


def _mib(size: int) -> str:
    return f"{size / (1 << 20):g} MiB"
