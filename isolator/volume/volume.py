"""A plugin's persistent state: one ext4 image per plugin, its size and inode count capped on any file system.

The image is mounted once on the host side (attaching one image twice would corrupt it) and bound into the cage. While
it is not mounted it can be resized, when the policy grants another size than before. Any process may hold a private
copy of the host's mounts, and with it an image that was unmounted here: then it is mounted again from the device that
has it, which is the same file system.
The mount is journalled; the loop device frees itself when it is unmounted. The mount point lies in a root-owned 0700
folder: the host's users do not reach what a plugin writes, and root never follows a path inside it.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from isolator.errors import ConfinementError, translated
from isolator.layers.base import Control
from isolator.linux import loop, mount
from isolator.linux.files import remove_tree
from isolator.recovery.journal import Entry, Journal
from isolator.volume.ext4 import TOOLS, Ext4Image, Size


def check() -> Control:
    """Whether this host can cap a state folder."""
    label, layer = "state size cap", "state"
    if not Path("/dev/loop-control").exists():
        remedy = "modprobe loop, or run outside a container without loop devices"
        return Control(label, layer, "unavailable", "no loop devices (/dev/loop-control)", remedy, mandatory=False)
    if not any(os.access(f"{folder}/mkfs.ext4", os.X_OK) for folder in TOOLS.split(":")):
        return Control(label, layer, "unavailable", "no mkfs.ext4", "apt-get install e2fsprogs", mandatory=False)
    return Control(label, layer, "enforced", "an ext4 image per plugin on a loop device", mandatory=False)


_DETACH_SECONDS = 5.0


class Volume:
    """The state of one plugin below ``base``."""

    def __init__(self, base: Path, name: str, journal: Journal) -> None:
        self._folder = base / name
        self._image = Ext4Image(self._folder / "image", name)
        self._place = self._folder / "mnt"
        self._name = f"state {name}"
        self._journal = journal

    @property
    def mounted(self) -> bool:
        """Whether the image is mounted at its place."""
        with contextlib.suppress(FileNotFoundError):
            return os.stat(self._place).st_dev != os.stat(self._folder).st_dev
        return False

    def room(self) -> dict[str, int]:
        """Bytes and files that still fit, as fields of a ``resources`` record; empty when it is not mounted."""
        if not self.mounted:
            return {}
        room = os.statvfs(self._place)
        return {"state_free": room.f_bavail * room.f_frsize, "state_files_free": room.f_favail}

    def open_ready(self, size: int) -> int:
        """As ``open`` if the image is mounted and has this size, else -1: to open it will take its time."""
        granted = self._image.granted
        return self._open_state() if self.mounted and (granted is None or granted.size == size) else -1

    def open(self, *, size: int, inodes: int, uid: int, gid: int) -> int:
        """Make and mount what is missing; returns an O_PATH descriptor of the folder to bind into the cage.

        ``size`` in bytes. No cage of the plugin may run: if the size is another one than before, it is resized.
        """
        if (ready := self.open_ready(size)) >= 0:
            return ready
        wanted = Size(size, inodes)
        with translated(OSError, ConfinementError, self._name, "", "is the disk full?"):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._folder.chmod(0o700)
            self._place.mkdir(exist_ok=True, mode=0o700)
        granted = self._image.granted
        changed = granted is not None and granted.size != size
        if self.mounted and changed:
            self.close()
        if not self.mounted:
            if changed:
                self._wait_until_detached()
            # Held by somebody it is in use, so nothing may look at it or mend it but the kernel.
            held = loop.open_device_of(self._image.path)
            if held is None and not self._image.path.exists():
                self._image.make(wanted, uid, gid)
            elif held is None:
                self._image.check()
                if granted is not None and changed:
                    self._image.resize(granted, wanted)
            self._journal.record(Entry(self._name, "mount", (str(self._place),)))
            self._mount(*(held or self._attach()))
        return self._open_state()

    def _open_state(self) -> int:
        return os.open(self._place / "state", os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def close(self) -> None:
        """Unmount; no error when it is not mounted."""
        if self.mounted:
            loop.widen(str(self._place))
            with contextlib.suppress(OSError):
                mount.unmount(str(self._place))
            if self.mounted:
                mount.unmount(str(self._place), lazy=True)
        self._journal.forget(self._name)

    def remove(self) -> None:
        """Unmount and delete everything the plugin has stored."""
        self.close()
        if self._folder.exists():
            remove_tree(self._folder)

    def _wait_until_detached(self) -> None:
        """An image that something still holds (a cage that is just ending) cannot be resized."""
        deadline = time.monotonic() + _DETACH_SECONDS
        while (device := loop.device_of(self._image.path)) is not None:
            if time.monotonic() > deadline:
                raise ConfinementError(
                    self._name,
                    f"cannot be resized while {device} still holds it: a process has a copy of the mounts",
                    "end that process: see 'grep -l isolator/state /proc/[0-9]*/mountinfo'; or grant the size before",
                )
            time.sleep(0.02)  # nothing tells when a loop device clears itself

    def _attach(self) -> tuple[int, str]:
        backing = os.open(self._image.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            return loop.attach(backing)
        except OSError as error:
            raise ConfinementError(self._name, f"no loop device: {error.strerror}", "see 'losetup -a'") from None
        finally:
            os.close(backing)

    def _mount(self, device: int, path: str) -> None:
        """Mount a loop device; takes over ``device``, its descriptor."""
        try:
            attributes = mount.NOSUID | mount.NODEV  # whether programs run there is the cage's matter
            fd = mount.new_filesystem("ext4", {"source": path, "errors": "remount-ro"}, attributes=attributes)
            try:
                self._make_state_folder(fd)
                mount.attach(fd, str(self._place))
                loop.narrow(path)
            finally:
                os.close(fd)
        except OSError as error:
            why = f"mount: {error.strerror}"
            raise ConfinementError(self._name, why, f"check it with 'e2fsck {self._image.path}'") from None
        finally:
            os.close(device)

    def _make_state_folder(self, root: int) -> None:
        """The plugin owns ``state`` in the image, not its root: ``lost+found`` stays out of its sight."""
        owner = os.fstat(root)
        with contextlib.suppress(FileExistsError):
            os.mkdir("state", 0o700, dir_fd=root)
            os.chown("state", owner.st_uid, owner.st_gid, dir_fd=root, follow_symlinks=False)
