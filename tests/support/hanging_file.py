"""A file whose file system does not answer when it is closed (FUSE, /dev/fuse)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from isolator.linux import mount
from isolator.linux._libc import failed, libc

_HEADER = struct.Struct("<IIQQIIII")
_GETATTR, _OPEN, _INIT, _FLUSH, _FORGET, _INTERRUPT = 3, 14, 26, 25, 2, 36
_ATTRIBUTES = struct.pack("<QII", 0, 0, 0) + struct.pack(
    "<QQQQQQIIIIIIIIII", 1, 0, 0, 0, 0, 0, 0, 0, 0, stat.S_IFREG | 0o644, 1, 0, 0, 0, 4096, 0
)
_ANSWERS = {
    _INIT: struct.pack("<IIIIHHIIHH32x", 7, 31, 4096, 0, 0, 0, 4096, 1, 0, 0),
    _GETATTR: _ATTRIBUTES,
    _OPEN: struct.pack("<QII", 1, 0, 0),
    _FLUSH: b"",
}
_NO_SUCH_CALL = 38


@contextlib.contextmanager
def file_that_does_not_close(place: Path, process: int) -> Iterator[int]:
    """A descriptor; a process that closes it, or a copy, waits until the context is left."""
    place.touch()
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    options = f"fd={device},rootmode=100644,user_id=0,group_id=0".encode()
    if libc.mount(b"fuse", os.fsencode(place), b"fuse", ctypes.c_ulong(0), options):
        raise failed("mount of a FUSE file system")
    stopped = threading.Event()
    thread = threading.Thread(target=_serve, args=(device, stopped, process))
    thread.start()
    fd = -1
    try:
        fd = os.open(place, os.O_RDWR | os.O_CLOEXEC)
        yield fd
    finally:
        stopped.set()
        thread.join()
        os.close(device)  # every call that waits ends now
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)
        mount.unmount(str(place), lazy=True)


def _serve(device: int, stopped: threading.Event, process: int) -> None:
    while not stopped.is_set():
        if not select.select([device], [], [], 0.05)[0]:
            continue
        try:
            packet = os.read(device, 1 << 17)
        except BlockingIOError:
            continue
        _, call, unique, _, _, _, thread, _ = _HEADER.unpack_from(packet)
        waits = call == _FLUSH and Path(f"/proc/{process}/task/{thread}").exists()
        if not waits and call not in (_FORGET, _INTERRUPT):
            answer, error = _ANSWERS.get(call, b""), 0 if call in _ANSWERS else -_NO_SUCH_CALL
            os.write(device, struct.pack("<IiQ", 16 + len(answer), error, unique) + answer)
