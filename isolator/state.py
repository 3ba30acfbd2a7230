"""A plugin's persistent state: one ext4 image per plugin, its size and inode count capped on any file system.

The image is mounted once on the host side (attaching one image twice would corrupt it) and bound into the cage.
The mount is journalled; the loop device frees itself when it is unmounted. The mount point lies in a root-owned 0700
folder: the host's users do not reach what a plugin writes, and root never follows a path inside it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

from isolator.errors import ConfinementError
from isolator.journal import Entry, Journal
from isolator.layers.base import Control
from isolator.linux import loop, mount


def check() -> Control:
    """Whether this host can cap a state folder."""
    label, layer = "state size cap", "state"
    if not Path("/dev/loop-control").exists():
        remedy = "modprobe loop, or run outside a container without loop devices"
        return Control(label, layer, "unavailable", "no loop devices (/dev/loop-control)", remedy, mandatory=False)
    if shutil.which("mkfs.ext4", path=_PATH) is None:
        return Control(label, layer, "unavailable", "no mkfs.ext4", "apt-get install e2fsprogs", mandatory=False)
    return Control(label, layer, "enforced", "an ext4 image per plugin on a loop device", mandatory=False)


_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


class State:
    """The state of one plugin below ``base``; ``size`` in bytes."""

    def __init__(self, base: Path, name: str, journal: Journal) -> None:
        self._folder = base / name
        self._image = self._folder / "image"
        self._place = self._folder / "mnt"
        self._name = f"state {name}"
        self._journal = journal

    @property
    def mounted(self) -> bool:
        """Whether the image is mounted at its place."""
        with contextlib.suppress(FileNotFoundError):
            return self._place.stat().st_dev != self._folder.stat().st_dev
        return False

    def open(self, *, size: int, inodes: int, uid: int, gid: int) -> int:
        """Make and mount what is missing; returns an O_PATH descriptor of the folder to bind into the cage."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder.chmod(0o700)
        self._place.mkdir(exist_ok=True, mode=0o700)
        if not self.mounted:
            if not self._image.exists():
                self._format(size, inodes, uid, gid)
            self._journal.make(Entry(self._name, "mount", (str(self._place),)))
            self._mount()
        return os.open(self._place / "state", os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def close(self) -> None:
        """Unmount; no error when it is not mounted."""
        if self.mounted:
            with contextlib.suppress(OSError):
                mount.unmount(str(self._place))
            if self.mounted:
                mount.unmount(str(self._place), lazy=True)
        self._journal.gone(self._name)

    def remove(self) -> None:
        """Unmount and delete everything the plugin has stored."""
        self.close()
        if self._folder.exists():
            shutil.rmtree(self._folder)

    def _format(self, size: int, inodes: int, uid: int, gid: int) -> None:
        temporary = self._folder / "image.new"
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        # A small image: room for the file system's own structures comes on top of what was granted.
        total = max(size + size // 16 + (1 << 20), 2 << 20) & ~4095
        try:
            os.ftruncate(fd, total)
        finally:
            os.close(fd)
        options = f"root_owner={uid}:{gid},lazy_itable_init=1,nodiscard"
        command = [
            "mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-N", str(max(inodes, 64)),
            "-O", "^has_journal,^resize_inode", "-E", options, str(temporary),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": _PATH})
        if result.returncode != 0:
            temporary.unlink(missing_ok=True)
            raise ConfinementError(f"state of {self._folder.name}", result.stderr.strip(), "is the disk full?")
        temporary.rename(self._image)
        self._owner = (uid, gid)

    def _mount(self) -> None:
        backing = os.open(self._image, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            device, path = loop.attach(backing)
        except OSError as error:
            raise ConfinementError(
                f"state of {self._folder.name}", f"no loop device: {error.strerror}", "see 'losetup -a'"
            ) from None
        finally:
            os.close(backing)
        try:
            attributes = mount.NOSUID | mount.NODEV | mount.NOEXEC
            fd = mount.new_filesystem("ext4", {"source": path, "errors": "remount-ro"}, attributes=attributes)
            try:
                self._make_state_folder(fd)
                mount.attach(fd, str(self._place))
            finally:
                os.close(fd)
        except OSError as error:
            raise ConfinementError(
                f"state of {self._folder.name}", f"mount: {error.strerror}", f"check it with 'e2fsck {self._image}'"
            ) from None
        finally:
            os.close(device)

    def _make_state_folder(self, root: int) -> None:
        """The plugin owns ``state`` in the image, not its root: ``lost+found`` stays out of its sight."""
        owner = os.fstat(root)
        with contextlib.suppress(FileExistsError):
            os.mkdir("state", 0o700, dir_fd=root)
            os.chown("state", owner.st_uid, owner.st_gid, dir_fd=root, follow_symlinks=False)
