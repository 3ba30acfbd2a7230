"""Loop devices by ioctl (loop(4)): a file becomes a block device that frees itself after its last unmount."""

from __future__ import annotations

import fcntl
import os
import struct

_CTL_GET_FREE = 0x4C82
_CONFIGURE = 0x4C0A
_CLR_FD = 0x4C01
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
