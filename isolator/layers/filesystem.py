"""The cage's view of files: an empty tmpfs filled with exactly what it needs.

The parts that are the same for every cage are built once: the launcher makes itself a mount namespace whose root is the
*template* (``build_template``) and nothing else; the host's root is detached. A cage is cloned with a copy of that
namespace, so it never sees the host's mounts at all, and has only its own few mounts left to make. (Copying the
template's dozen mounts is also much cheaper than copying and detaching the host's.)

    /usr (and /bin, /lib, ... as the host has them)  read-only                                    template
    /etc        public folders and files of the host (certificates, alternatives, fonts, ...);    template
                nsswitch.conf, resolv.conf; links to /run/isolator/etc for passwd, group,
                hosts, hostname, machine-id
    /dev        null zero full random urandom, the standard links                                 template
    /dev/pts    terminals of its own; with ``isolator run --tty`` those of the caller's making        cage
    /etc/ld.so.cache, localtime   of the host, read-only, as they are at this start               cage
    /proc /sys  the cage's processes and figures (isolator.layers.proc)            template and layer proc
    /tmp /dev/shm          tmpfs with size and inode caps                                         cage
    /state                 persistent and capped (when the policy grants any)                     cage
    /plugin                the plugin's files, read-only                                          cage
    /run/isolator          plugin/ (its socket), host/ (the host API), config/ (secret files),    cage
                           etc/, bin/ (a binary registered by path); one small tmpfs, read-only

A policy that names more paths to read needs mount points that the template does not have: then the child makes a root
of its own, takes over what the template has, and pivots into it. There /etc is made anew, piece by piece: mount points
may be missing below it too.

There is no terminal of the host, nothing else of /sys, /run, /var, /home or /root.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import stat
from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

from isolator.layers.base import CageSpec, Control, Kept, Layer, Process, Tree, mismatch
from isolator.layers.phrases import listing
from isolator.layers.plan import ParkOrder, Part, Plan, Section
from isolator.layers.proc import template as proc
from isolator.linux import mount
from isolator.linux.descriptors import owning

if TYPE_CHECKING:
    from isolator.policy.model import EffectivePolicy

_MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_ETC_OF_HOST = (
    "ssl/certs", "alternatives", "ca-certificates", "pki", "fonts", "java-*", "python3*", "perl", "groff", "terminfo",
    "dictionaries-common", "libreoffice/registry",
)  # fmt: skip
"""Folders of the host that everybody may read and that files of /usr lead into; patterns."""
_ETC_COPIES = (
    "ssl/openssl.cnf", "services", "protocols", "rpc", "ethertypes", "host.conf", "gai.conf", "magic", "magic.mime",
    "locale.alias", "inputrc", "debian_version", "os-release", "matplotlibrc", "maven/m2.conf",
    "maven/logging/simplelogger.properties", "R/Makeconf", "R/Renviron", "R/ldpaths", "R/repositories", "octaverc",
)  # fmt: skip
"""Small public files of the host, as they are when a template is made. Not Maven's settings, nor R's of the site: they
may hold secrets."""
_LARGEST_COPY = 64 * 1024
_ETC_FILES = ("ld.so.cache", "localtime", "mime.types")
"""Files of the host that packages replace by rename, so that a bind made earlier would show the old one."""
_ETC_OF_CAGE = ("passwd", "group", "hosts", "hostname", "machine-id")
_DEVICES = ("null", "zero", "full", "random", "urandom")
_LINKS = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
          "ptmx": "pts/ptmx"}  # fmt: skip
_PLACES = ("plugin", "state", "tmp", "proc", "dev/shm", "dev/pts", "run/isolator", "etc")
_SCRATCH_PLACES = ("tmp", "dev/shm")
_WRITABLE = ("/tmp", "/dev/shm", "/state", "/run/isolator/plugin")
_OWN = ("plugin", "host", "config", "bin", "etc")
"""The folders in /run/isolator."""
_STATIC = {
    "etc/resolv.conf": "nameserver 127.0.0.53\noptions timeout:5 attempts:1\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}

TERMINALS = 16
"""Terminals that a cage may have open at once: their buffers are the kernel's, and no memory cap counts them."""
_TERMINAL_OPTIONS = f"newinstance,ptmxmode=0666,mode=0600,max={TERMINALS}"

_READ_ONLY = mount.RDONLY | mount.NOSUID | mount.NODEV
_SCRATCH = mount.NOSUID | mount.NODEV | mount.NOEXEC
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_MS_SCRATCH = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
_PARKING = "/proc"  # exists on every host, and nothing below it is a source; only in a namespace of the caller's own


def host_folders() -> tuple[str, ...]:
    """Folders of the host that every cage has at the same place."""
    return ("/usr", *(f"/{name}" for name in _MERGED), *(f"/etc/{name}" for name in _ETC_OF_HOST))


def build_template() -> None:
    """Give the calling process (the launcher) a mount namespace that holds the template and nothing else."""
    from isolator.linux.namespaces import CLONE_NEWNS, unshare

    unshare(CLONE_NEWNS)
    mount.set_propagation("/", mount.MS_PRIVATE)
    sources = {"usr": "/usr"}
    links: dict[str, str] = {}
    for name in _MERGED:
        path = f"/{name}"
        if os.path.islink(path):  # the launcher avoids importing pathlib
            links[name] = os.readlink(path)
        elif os.path.isdir(path):
            sources[name] = path
    found = [path for pattern in _ETC_OF_HOST for path in glob.glob(f"/etc/{pattern}") if os.path.isdir(path)]
    sources |= {path[1:]: path for path in found}
    copies = {f"etc/{name}": text for name in _ETC_COPIES if (text := _public_text(f"/etc/{name}"))}
    texts = _STATIC | copies | proc.texts()
    trees = [(target, *_take(source)) for target, source in (sources | proc.binds()).items()]
    trees += [(f"dev/{name}", *_take_device(name)) for name in _DEVICES]
    root = _new_root()
    for place in (*_PLACES, *proc.folders()):
        _place(place, is_folder=True)
    for name in _ETC_FILES:
        _place(f"etc/{name}", is_folder=False)
    for name, text in texts.items():
        _place(name, is_folder=False)
        _write(name, text, 0o444)
    for name in _ETC_OF_CAGE:
        os.symlink(f"/run/isolator/etc/{name}", f"etc/{name}")
    for name, target in links.items():
        os.symlink(target, name)
    for name, target in _LINKS.items():
        os.symlink(target, f"dev/{name}")
    for target, is_folder, fd in trees:
        _place(target, is_folder=is_folder)
        mount.attach(fd, target)
        os.close(fd)
    _enter_root(root)


class MountOperation(Part):
    """One step of the cage's own view, in the current directory, which is or becomes its root."""

    @abstractmethod
    def execute(self, fds: dict[str, int]) -> None:
        """Carry out the operation; raises OSError."""

    @abstractmethod
    def describe(self) -> str:
        """The operation's result in a few words, with the path as the cage sees it."""


class ResizeTmpfs(MountOperation, kind="resize"):
    """Set the capacity, as mount options, of a file system in memory made ahead, and whether programs run there."""

    target: str
    options: str
    executable: bool

    def execute(self, fds: dict[str, int]) -> None:
        mount.remount(self.target, _MS_SCRATCH & ~(_MS_NOEXEC if self.executable else 0), self.options)

    def describe(self) -> str:
        return f"/{self.target}: tmpfs, {self.options}"


class FillFolder(MountOperation, kind="fill"):
    """Write small files into a folder that was made ahead; their owner, and the folder's, is one user."""

    target: str
    files: dict[str, str]
    owner: int
    group: int
    folder_mode: int
    file_mode: int

    def execute(self, fds: dict[str, int]) -> None:
        for name, text in self.files.items():
            _write(f"{self.target}/{name}", text, self.file_mode, owner=(self.owner, self.group))
        os.chown(self.target, self.owner, self.group)
        os.chmod(self.target, self.folder_mode)

    def describe(self) -> str:
        return f"/{self.target}: a folder of uid {self.owner}, mode {self.folder_mode:04o}"


class AttachMount(MountOperation, kind="attach"):
    """Attach the detached mount behind the plan's descriptor ``fd``; its mount point is made where there is none."""

    target: str
    fd: str
    is_folder: bool

    def execute(self, fds: dict[str, int]) -> None:
        _place(self.target, is_folder=self.is_folder)
        mount.attach(fds[self.fd], self.target)
        os.close(fds[self.fd])  # there may be more of them than the cage may have open files

    def describe(self) -> str:
        return f"/{self.target}: a mounted {'folder' if self.is_folder else 'file'}"


class SealMount(MountOperation, kind="seal"):
    """Make a file system in memory read-only, after it was filled."""

    target: str

    def execute(self, fds: dict[str, int]) -> None:
        with owning(mount.open_mount(self.target)) as fd:
            mount.set_attributes(fd, _SCRATCH | mount.RDONLY, recursive=False)

    def describe(self) -> str:
        return f"/{self.target}: read-only"


class FilesystemSection(Section, kind="filesystem"):
    """The cage's own part of its view, in order. ``own_root``: the template lacks a mount point for some of it."""

    own_root: bool
    operations: tuple[MountOperation, ...]

    @staticmethod
    def enter_ahead(order: ParkOrder) -> None:
        os.chdir("/")
        _make_own_places()

    def enter(self, fds: dict[str, int]) -> None:
        os.chdir("/")
        root = -1
        if self.own_root:
            places = [one.target for one in self.operations if isinstance(one, AttachMount)]
            for place in ("/dev/shm", "/dev/pts"):
                mount.unmount(place)  # else it would come along with /dev
            root = _take_over_template(sum(place.count("/") + 1 for place in places))
            _make_own_places()
        for operation in self.operations:
            try:
                operation.execute(fds)
            except OSError as error:
                if error.filename is not None:
                    raise
                raise OSError(error.errno, error.strerror, operation.describe()) from None
        if root >= 0:
            _enter_root(root)


class Filesystem(Layer):
    """Nothing of the host but /usr and what the policy names, read-only; a few capped places to write."""

    name = "filesystem"
    in_force_from = "view"

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
        from isolator.policy.units import format_size

        fs = policy.filesystem
        state = f"/state up to {format_size(fs.state)}" if fs.state else "no persistent folder"
        # Who may write to a socket connects to it, on a read-only mount too; nobody records it.
        more = f", and read-only {listing(fs.read)}, whose sockets it may connect to" if fs.read else ""
        noexec = ", and execute none of it" if policy.syscalls == "strict" else ""
        return (
            f"Sees its own files, /usr and public files of /etc (certificates, fonts and the like) read-only"
            f"{more}; can lock (flock) what is the host's of them; may write {state}, /tmp up to"
            f" {format_size(fs.tmp)}, /dev/shm up to {format_size(fs.shm)} and its socket's folder{noexec}; nothing"
            f" else of this host is there but the devices null, zero, full, random and urandom; has up to {TERMINALS}"
            f" terminals of its own."
        )

    def prepare(self, spec: CageSpec, plan: Plan) -> None:
        fs = spec.policy.filesystem
        self.adopt(spec, Kept())
        runs = self._runs
        mounts: list[AttachMount] = []

        def bind(target: str, source: int, attributes: int, ids: int = -1, made: Tree | None = None) -> None:
            # Copied here: the child, in a mount namespace of its own, may not copy a mount of ours (EINVAL).
            tree = mount.clone_tree("", directory=source) if made is None else os.dup(source)
            name = f"mount{len(mounts)}"
            plan.own(name, tree)
            if ids >= 0:
                map_ids(tree, ids, target)
            mount.set_attributes(tree, attributes)
            is_folder = stat.S_ISDIR(os.fstat(tree).st_mode) if made is None else made.is_folder
            mounts.append(AttachMount(target.lstrip("/"), name, is_folder))

        for name in _ETC_FILES:
            with (
                contextlib.suppress(FileNotFoundError),
                owning(os.open(f"/etc/{name}", os.O_PATH | os.O_CLOEXEC)) as fd,
            ):
                bind(f"etc/{name}", fd, _READ_ONLY)
        for entry in spec.binds:
            attributes = mount.NOSUID | mount.NODEV
            attributes |= (0 if runs else mount.NOEXEC) if entry.writable else mount.RDONLY
            bind(entry.target, entry.fd, attributes, entry.ids, entry.tree)
        for target, fd in spec.mounts.items():
            name = f"mount{len(mounts)}"
            plan.fds[name] = fd
            mounts.append(AttachMount(target.lstrip("/"), name, is_folder=True))
        operations: tuple[MountOperation, ...] = (
            ResizeTmpfs("tmp", f"size={fs.tmp},nr_inodes={fs.tmp_inodes}", runs),
            ResizeTmpfs("dev/shm", f"size={fs.shm},nr_inodes=1024", runs),
            FillFolder("run/isolator/etc", _etc(spec), 0, 0, 0o755, 0o444),
            FillFolder("run/isolator/config", spec.files, spec.uid, spec.gid, 0o500, 0o400),
            *mounts,
            SealMount("run/isolator"),
        )
        plan.add(FilesystemSection(any(not _known(one.target) for one in mounts), operations))

    def adopt(self, spec: CageSpec, kept: Kept) -> None:
        self._runs = spec.policy.syscalls != "strict"  # what the plugin wrote

    def confirm(self, process: Process) -> None:
        mounts = process.mounts
        if "ro" not in _options(root := mounts.get("/", "")) or " - tmpfs " not in root:
            raise mismatch(self.name, "/", "a read-only tmpfs", root)
        for place, line in mounts.items():
            # The covers of /proc are another layer's.
            if place.startswith(("/proc/", "/dev/")) and place != "/dev/shm":
                continue
            options = _options(line)
            if place in _WRITABLE and not self._runs and "noexec" not in options:
                raise mismatch(self.name, place, "noexec", ",".join(options))
            if "nosuid" not in options or "nodev" not in options:
                raise mismatch(self.name, place, "nosuid,nodev", ",".join(options))
        if "ro" not in _options(mounts["/usr"]):
            raise mismatch(self.name, "/usr", "read-only", "writable")


def map_ids(tree: int, ids: int, target: str) -> None:
    """Show a detached tree with the owners of a user namespace's maps; raises ConfinementError with a remedy."""
    from isolator.errors import ConfinementError

    try:
        mount.map_ids(tree, ids)
    except OSError as error:
        why = {
            errno.EINVAL: "its file system, or one mounted below it, cannot show owners as others (idmapped mounts)",
            errno.EPERM: "its owners are shown as others already (an idmapped mount, or a container's)",
        }.get(error.errno or 0, error.strerror or "")
        remedy = "use a folder on ext4, xfs, btrfs, or tmpfs from Linux 6.3; --read shows any"
        raise ConfinementError(f"writable folder {target}", why, remedy) from None


def _options(line: str) -> list[str]:
    """The options of a mount, of its line in mountinfo; none of no line."""
    return line.split(" ", 6)[5].split(",") if line else []


def _known(target: str) -> bool:
    """Whether the template (or /run/isolator) has a mount point for ``target``."""
    return target in _PLACES or target.startswith("run/isolator/") or target.removeprefix("etc/") in _ETC_FILES


def _new_root(places: int = 0) -> int:
    """A new empty root with room for ``places`` more files, parked where it hides nothing needed, as the working
    directory."""
    root = mount.new_filesystem("tmpfs", {"size": "2m", "nr_inodes": f"{1024 + places}", "mode": "0755"})
    mount.attach(root, _PARKING)
    os.chdir(root)
    return root


def _enter_root(root: int) -> None:
    """Make the new root read-only and the root; the old one is detached, so there is nothing to climb back to."""
    os.chdir(root)
    mount.set_attributes(root, mount.RDONLY | mount.NOSUID | mount.NODEV, recursive=False)
    os.close(root)
    mount.pivot_root()


def _take_over_template(places: int) -> int:
    """A root of this cage's own, with the template's folders in it and room for more mount points."""
    folders = [name for name in os.listdir("/") if not os.path.islink(f"/{name}")]
    links = {name: os.readlink(f"/{name}") for name in os.listdir("/") if name not in folders}
    shared = ["usr", "dev", "proc", "sys", *(name for name in _MERGED if name in folders)]
    texts: dict[str, str] = {}
    device = os.stat("/etc").st_dev
    for name, info in _pieces("/etc", device):
        if stat.S_ISLNK(info.st_mode):
            links[name] = os.readlink(f"/{name}")
        elif info.st_dev != device:
            shared.append(name)
        elif stat.S_ISREG(info.st_mode):
            with open(f"/{name}") as file:  # noqa: PTH123  # the child avoids importing pathlib
                texts[name] = file.read()
    trees = [(name, os.path.isdir(f"/{name}"), mount.clone_tree(f"/{name}")) for name in shared]
    root = _new_root(places)
    for name in (*folders, "run/isolator"):
        _place(name, is_folder=True)
    for name, text in texts.items():
        _place(name, is_folder=False)
        _write(name, text, 0o444)
    for name, target in links.items():
        os.makedirs(os.path.dirname(name) or ".", 0o755, exist_ok=True)
        os.symlink(target, name)
    for name, is_folder, fd in trees:
        if name != "proc":  # the cage's own, with its covers
            mount.set_attributes(fd, mount.RDONLY | mount.NOSUID, recursive=False)
        _place(name, is_folder=is_folder)
        mount.attach(fd, name)
        os.close(fd)
    return root


def _pieces(folder: str, device: int) -> Iterator[tuple[str, os.stat_result]]:
    """Everything in a folder of the template by its path in the root, down to where something is mounted."""
    with os.scandir(folder) as entries:
        for entry in entries:
            info = entry.stat(follow_symlinks=False)
            yield entry.path[1:], info
            if stat.S_ISDIR(info.st_mode) and info.st_dev == device:
                yield from _pieces(entry.path, device)


def _make_own_places() -> None:
    """Make the folders that a cage has to itself, in memory, below the current directory; the plan sets their sizes."""
    for target in _SCRATCH_PLACES:
        mount.mount("tmpfs", target, _MS_SCRATCH, "size=4k,nr_inodes=2,mode=1777")
    mount.mount("devpts", "dev/pts", _MS_SCRATCH & ~_MS_NODEV, _TERMINAL_OPTIONS)
    mount.mount("tmpfs", "run/isolator", _MS_SCRATCH, "size=2m,nr_inodes=128,mode=0755")
    for name in _OWN:
        os.mkdir(f"run/isolator/{name}", 0o755)


def _take(source: str) -> tuple[bool, int]:
    """The detached, read-only tree of a host path, and whether it is a folder."""
    fd = mount.clone_tree(source)
    mount.set_attributes(fd, _READ_ONLY)
    return stat.S_ISDIR(os.fstat(fd).st_mode), fd


def _take_device(name: str) -> tuple[bool, int]:
    fd = mount.clone_tree(f"/dev/{name}", recursive=False)
    mount.set_attributes(fd, mount.NOSUID | mount.NOEXEC, clear=mount.NODEV | mount.RDONLY)
    return False, fd


def _public_text(path: str) -> str:
    """The text of a small file that everybody may read, or nothing."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd) as file:  # noqa: PTH123  # the launcher avoids importing pathlib
            info = os.fstat(fd)
            if stat.S_ISREG(info.st_mode) and info.st_mode & stat.S_IROTH and info.st_size <= _LARGEST_COPY:
                return file.read()
    return ""


def _place(target: str, *, is_folder: bool) -> None:
    """Make the mount point ``target`` below the current directory, with the folders above it, unless it is there.

    A link of the template gives way: what is mounted on a link is seen at its other end.
    """
    try:
        if not stat.S_ISLNK(os.lstat(target).st_mode):
            return
        os.unlink(target)
    except (FileNotFoundError, NotADirectoryError):
        pass
    parent = target if is_folder else os.path.dirname(target)
    if parent:
        os.makedirs(parent, 0o755, exist_ok=True)
    if not is_folder:
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o444))


def _write(name: str, text: str, mode: int, *, owner: tuple[int, int] = (0, 0)) -> None:
    with owning(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, mode)) as fd:
        os.write(fd, text.encode())
        if any(owner):
            os.fchown(fd, *owner)


def _etc(spec: CageSpec) -> dict[str, str]:
    user = spec.user
    home = "/state" if spec.policy.filesystem.state else "/tmp"
    root = "root:x:0:0:root:/nonexistent:/usr/sbin/nologin"
    return {
        "passwd": f"{root}\n{user}:x:{spec.uid}:{spec.gid}::{home}:/bin/sh\n",
        "group": f"root:x:0:\n{user}:x:{spec.gid}:\n",
        "hosts": f"127.0.0.1 localhost {spec.hostname}\n::1 localhost\n",
        "hostname": f"{spec.hostname}\n",
        "machine-id": f"{os.urandom(16).hex()}\n",
    }
