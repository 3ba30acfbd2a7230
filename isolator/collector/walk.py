"""Walk through a folder with nothing but the right to read, and write what is in it.

No link is followed and nothing but regular files and folders is opened; ``.git`` is left out.
"""

from __future__ import annotations

import os
import stat

from isolator.errors import UsageError
from isolator.ipc.folder_stream import MAX_BYTES, MAX_DEPTH, MAX_FILES, FolderWriter, chunks
from isolator.linux.descriptors import owning
from isolator.linux.files import openat2


def write_folder(folder: int, writer: FolderWriter) -> None:
    """Write everything below a descriptor; raises UsageError, whose ``what`` is a path below it, or OSError."""
    # Before the first byte: what is too large costs a walk, and no disk.
    _Survey().folder(folder, 0, "")
    _write(folder, writer, 0, "")


class _Survey:
    def __init__(self) -> None:
        self._files = self._size = 0

    def folder(self, folder: int, depth: int, prefix: str) -> None:
        if depth > MAX_DEPTH:
            raise UsageError(prefix, f"deeper than {MAX_DEPTH} folders", "flatten it")
        with os.scandir(folder) as entries:
            for entry in entries:
                self._files += 1
                if self._files > MAX_FILES:
                    raise UsageError("", f"more than {MAX_FILES} files", "leave out what the plugin does not need")
                if entry.is_dir(follow_symlinks=False) and entry.name != ".git":
                    with owning(_open(folder, entry.name, f"{prefix}{entry.name}", os.O_DIRECTORY)) as below:
                        self.folder(below, depth + 1, f"{prefix}{entry.name}/")
                elif entry.is_file(follow_symlinks=False):
                    self._size += entry.stat(follow_symlinks=False).st_size
                    if self._size > MAX_BYTES:
                        raise UsageError("", f"more than {MAX_BYTES >> 20} MiB", "leave out what is not needed")


def _write(folder: int, writer: FolderWriter, depth: int, prefix: str) -> None:
    if depth > MAX_DEPTH:  # grown since
        raise UsageError(prefix, f"deeper than {MAX_DEPTH} folders", "flatten it")
    for name in sorted(os.listdir(folder)):  # by descriptor
        path, encoded = f"{prefix}{name}", os.fsencode(name)
        info = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISDIR(info.st_mode):
            if name == ".git":
                continue
            with owning(_open(folder, name, path, os.O_DIRECTORY)) as below:
                writer.enter(encoded)
                _write(below, writer, depth + 1, f"{path}/")
                writer.leave()
        elif stat.S_ISLNK(info.st_mode):
            writer.link(encoded, os.fsencode(os.readlink(name, dir_fd=folder)))
        elif stat.S_ISREG(info.st_mode):
            # O_NONBLOCK: what was a file a moment ago may be a FIFO now, and opening it would block for ever.
            with owning(_open(folder, name, path, os.O_NONBLOCK)) as fd:
                info = os.fstat(fd)
                if not stat.S_ISREG(info.st_mode):
                    raise UsageError(path, "changed while it was being read", "try again")
                writer.file(encoded, chunks(fd), executable=bool(info.st_mode & 0o111), mtime_ns=info.st_mtime_ns)
        else:
            raise UsageError(path, "not a regular file, a folder or a link", "remove it")


def _open(folder: int, name: str, path: str, flags: int) -> int:
    try:
        return openat2(folder, name, os.O_RDONLY | flags)
    except PermissionError:
        why = f"uid {os.geteuid()} may not read it"
        raise UsageError(path, why, "let that user read it, or remove it from the folder") from None
    except OSError as error:
        raise UsageError(path, error.strerror or "cannot be opened", "try again") from None
