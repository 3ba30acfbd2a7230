"""Loop devices by ioctl (loop(4)): a file becomes a block device that frees itself after its last unmount.

All of them share the disk that their files are on with whatever else is synced to it. So their input and output goes
past the cache of that disk, which would be written back in nobody's name, and a device of a stranger's is *narrow*: the
kernel hands on little of it at a time, and somebody else's sync waits for that much and no more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from pathlib import Path

from isolator.linux.descriptors import owning

_CTL_GET_FREE = 0x4C82
_CONFIGURE = 0x4C0A
_GET_STATUS64 = 0x4C05
_AUTOCLEAR, _DIRECT_IO = 4, 16
_BLOCK = 4096
_NARROW = {"nr_requests": 4, "max_sectors_kb": 128, "read_ahead_kb": 512}
"""Queue of a narrow device: requests at a time (the least that the kernel takes), KiB in each, and KiB that are read
ahead: no more than goes into it, or the reader waits for room. In this order: the second may set the third anew."""
_WIDE = {"nr_requests": 128, "read_ahead_kb": 128}
"""The kernel's own, for any other device; it knows how many KiB each request may have."""


def attach(backing: int) -> tuple[int, str]:
    """Attach an open file to a free loop device; returns (descriptor, path) of the device.

    The device clears itself when the last user (the mount, the descriptor) is gone. Another process may take the
    free device in between (EBUSY): the next one is tried. Where the file system of the file has no direct input and
    output the kernel does without. Needs kernel 5.8.
    """
    with owning(os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)) as control:
        for _ in range(64):
            path = f"/dev/loop{fcntl.ioctl(control, _CTL_GET_FREE)}"
            device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            # struct loop_config: fd, block_size, loop_info64 (232 bytes, lo_flags at 52), 8 reserved words
            info = bytearray(232)
            struct.pack_into("=I", info, 52, _AUTOCLEAR | _DIRECT_IO)
            config = struct.pack("=II", backing, _BLOCK) + bytes(info) + bytes(64)
            try:
                fcntl.ioctl(device, _CONFIGURE, config)
            except OSError as error:
                os.close(device)
                if error.errno == 16:  # EBUSY
                    continue
                raise
            return device, path
    raise OSError(16, "no free loop device", "/dev/loop-control")


def narrow(path: str) -> None:
    """Have little of a device's requests under way at a time; a host whose sysfs cannot be written does without."""
    _set_queue(Path("/sys/class/block") / Path(path).name, _NARROW)


def widen(place: str) -> None:
    """Give the device that is mounted at ``place`` its queue back, which would outlast the mount; none: no error."""
    with contextlib.suppress(OSError):
        number = os.stat(place).st_dev
        device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
        if (device / "loop").exists():
            widest = int((device / "queue/max_hw_sectors_kb").read_text())
            _set_queue(device, {**_WIDE, "max_sectors_kb": widest})


def _set_queue(device: Path, values: dict[str, int]) -> None:
    for name, value in values.items():
        with contextlib.suppress(OSError):
            (device / "queue" / name).write_text(str(value))


def device_of(path: Path) -> str | None:
    """The loop device that a file is attached to, if there is one; None also when there is no such file."""
    found = open_device_of(path)
    if found is None:
        return None
    os.close(found[0])
    return found[1]


def open_device_of(path: Path) -> tuple[int, str] | None:
    """As ``device_of``, with a descriptor that keeps the device from clearing itself."""
    try:
        wanted = os.stat(path)
    except FileNotFoundError:
        return None
    for entry in Path("/sys/block").glob("loop*/loop"):
        device = f"/dev/{entry.parent.name}"
        try:
            fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        status = bytearray(232)
        with contextlib.suppress(OSError):  # it has cleared itself meanwhile
            fcntl.ioctl(fd, _GET_STATUS64, status)
            number, inode = struct.unpack_from("=QQ", status)
            if (number, inode) == (_kernel_device(wanted.st_dev), wanted.st_ino):
                return fd, device
        os.close(fd)
    return None


def _kernel_device(device: int) -> int:
    """A device number as the kernel's huge_encode_dev() gives it, which is not how libc packs it."""
    major, minor = os.major(device), os.minor(device)
    return (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12
