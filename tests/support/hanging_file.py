"""A file whose file system does not answer when it is closed (FUSE, /dev/fuse).

Its file system is a process of its own, which alone has the device and the mount, and which dies with the thread that
has started it: then every call that waits for it ends. (One in the process that waits could not be killed.)
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import prctl

from isolator.linux import mount
from isolator.linux._libc import failed, libc
from isolator.linux.namespaces import CLONE_NEWNS, unshare
from tests.support.timeouts import seconds

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


@dataclass(frozen=True)
class HangingFile:
    """The file. Its descriptor is the caller's to copy, and closed behind it."""

    fd: int
    _link: socket.socket

    def hangs(self) -> None:
        """Return once somebody waits in a close."""
        assert self._link.recv(1) == b"w", "its file system has ended"


@contextlib.contextmanager
def file_that_does_not_close(place: Path, process: int) -> Iterator[HangingFile]:
    """A file; a process that closes it, or a copy, waits until the context is left."""
    place.touch()
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            command = [sys.executable, "-I", __file__, str(theirs.fileno()), str(place), str(process), str(os.getpid())]
            server = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        fds: list[int] = []
        try:
            ours.settimeout(seconds(60))
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
            yield HangingFile(fds[0], ours)
        finally:
            server.kill()  # every call that waits ends now
            server.wait()
            for fd in fds:
                with contextlib.suppress(OSError):
                    os.close(fd)


def main() -> None:
    """Serve the file system: LINK, PLACE, the PROCESS that is to wait, and the PARENT."""
    link, place, process, parent = socket.socket(fileno=int(sys.argv[1])), sys.argv[2], sys.argv[3], int(sys.argv[4])
    prctl.set_pdeathsig(signal.SIGKILL)
    if os.getppid() != parent:
        return
    unshare(CLONE_NEWNS)
    mount.set_propagation("/", mount.MS_PRIVATE)
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=100644,user_id=0,group_id=0".encode()
    if libc.mount(b"fuse", os.fsencode(place), b"fuse", ctypes.c_ulong(0), options):
        raise failed("mount of a FUSE file system")
    threading.Thread(target=_serve, args=(device, process, link), daemon=True).start()
    fd = os.open(place, os.O_RDWR | os.O_CLOEXEC)
    socket.send_fds(link, [b"f"], [fd])
    os.close(fd)
    signal.pause()


def _serve(device: int, process: str, link: socket.socket) -> None:
    while True:
        packet = os.read(device, 1 << 17)
        _, call, unique, _, _, _, thread, _ = _HEADER.unpack_from(packet)
        if call == _FLUSH and Path(f"/proc/{process}/task/{thread}").exists():
            link.send(b"w")
        elif call not in (_FORGET, _INTERRUPT):
            answer, error = _ANSWERS.get(call, b""), 0 if call in _ANSWERS else -_NO_SUCH_CALL
            os.write(device, struct.pack("<IiQ", 16 + len(answer), error, unique) + answer)


if __name__ == "__main__":
    main()
