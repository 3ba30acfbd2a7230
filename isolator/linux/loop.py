"""Loop devices by ioctl (loop(4)): a file becomes a block device that frees itself after its last unmount."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from pathlib import Path

_CTL_GET_FREE = 0x4C82
_CONFIGURE = 0x4C0A
_GET_STATUS64 = 0x4C05
_AUTOCLEAR = 4
_BLOCK = 4096


def attach(backing: int) -> tuple[int, str]:
    """Attach an open file to a free loop device; returns (descriptor, path) of the device.

    The device clears itself when the last user (the mount, the descriptor) is gone. Another process may take the
    free device in between (EBUSY): the next one is tried. Needs kernel 5.8.
    """
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(64):
            path = f"/dev/loop{fcntl.ioctl(control, _CTL_GET_FREE)}"
            device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            # struct loop_config: fd, block_size, loop_info64 (232 bytes, lo_flags at 52), 8 reserved words
            info = bytearray(232)
            struct.pack_into("=I", info, 52, _AUTOCLEAR)
            config = struct.pack("=II", backing, _BLOCK) + bytes(info) + bytes(64)
            try:
                fcntl.ioctl(device, _CONFIGURE, config)
            except OSError as error:
                os.close(device)
                if error.errno == 16:  # EBUSY
                    continue
                raise
            return device, path
    finally:
        os.close(control)
    raise OSError(16, "no free loop device", "/dev/loop-control")


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
