"""The collector process: ``python3 -I -m isolator.collector.service UID GID GROUPS SINGLE``, started as root.

Standard input is a connection over which one or two descriptors come, or have come: a folder, a regular file, or both.
Standard output gets everything below the folder and the file's identity (``isolator/ipc/folder_stream.py``). GROUPS
are numbers between commas. SINGLE is ``package`` where a regular file alone is a package, whose content is wanted.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import stat
import sys

from isolator.collector.hardening import become, read_only_below, rules
from isolator.collector.walk import write_folder
from isolator.errors import UsageError, printable
from isolator.ipc.folder_stream import FolderWriter, chunks
from isolator.layers.seccomp.layer import compile_rules

_SECONDS = 10.0
"""Patience with a caller who has not yet handed anything over."""
_MOST = 2


def main() -> None:
    """Write what is handed over to standard output."""
    uid, gid = int(sys.argv[1]), int(sys.argv[2])
    # First what needs libraries, modules and more calls than stay: the filter, and how names are made printable.
    program = compile_rules(rules())
    printable("\n")
    become(uid, gid, [int(group) for group in sys.argv[3].split(",") if group])
    writer = FolderWriter(1)
    with contextlib.suppress(BrokenPipeError):
        try:
            collect(writer, program, packaged=sys.argv[4] == "package")
        except UsageError as error:
            writer.error(os.fsencode(error.what), error.why, error.remedy)
        except OSError as error:
            writer.error(b"", error.strerror or "cannot be read", "try again")


def collect(writer: FolderWriter, program: bytes, *, packaged: bool) -> None:
    """Receive the descriptors and write what they hold; ``packaged``: a file by itself is a package."""
    folders, files, single = [], [], -1
    for fd in _received():
        info = os.fstat(fd)
        if stat.S_ISDIR(info.st_mode):
            folders.append(fd)
        elif stat.S_ISREG(info.st_mode):
            files.append((info.st_dev, info.st_ino))
            single = fd
        else:
            raise UsageError("", "neither a folder nor a regular file", "name a folder that has a plugin.json")
    if len(folders) > 1 or len(files) > 1:
        raise UsageError("", "several of one kind were handed over", "hand over one folder, one file, or both")
    read_only_below(folders, program)
    for folder in folders:
        write_folder(folder, writer)
    if packaged and files and not folders:
        os.lseek(single, 0, os.SEEK_SET)  # its offset is the caller's to move, too; what comes of that is checked
        writer.package(chunks(single))
        files = []
    for device, inode in files:
        writer.single(device, inode)
    writer.end()


def _received() -> list[int]:
    """The caller's descriptors, each open for reading: that, and not its path, is the proof of the right to read it."""
    with socket.socket(fileno=0) as connection:
        if not select.select([connection], [], [], _SECONDS)[0]:
            raise UsageError("", "nothing was handed over in time", "run the command again")
        _, fds, flags, _ = socket.recv_fds(connection, 1, _MOST, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
        if flags & socket.MSG_CTRUNC or not fds:
            raise UsageError("", "nothing was handed over, or too much", "hand over one folder, one file, or both")
    for fd in fds:
        mode = fcntl.fcntl(fd, fcntl.F_GETFL)
        if mode & os.O_PATH or mode & os.O_ACCMODE == os.O_WRONLY:
            raise UsageError("", "was not handed over open for reading", "open it with O_RDONLY")
    return fds


if __name__ == "__main__":
    main()
