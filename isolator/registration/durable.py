"""Files and folders that survive a power cut: replaced whole, and on disk before anything relies on them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from isolator.errors import IsolatorError, translated
from isolator.linux.descriptors import owning
from isolator.linux.files import sync_filesystem


def replace_file(path: Path, content: bytes, *, temporary: Path, mode: int = 0o644) -> None:
    """Replace ``path`` atomically and durably; ``temporary`` in the same folder is what a kill leaves."""
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    with os.fdopen(fd, "wb") as out:
        out.write(content)
        os.fchmod(out.fileno(), mode)
        out.flush()
        os.fsync(out.fileno())
    temporary.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk; raises IsolatorError when the disk fails."""
    _sync(folder, os.fsync)


def sync_tree(folder: Path) -> None:
    """Put everything below a folder on disk, with the rest of its file system; raises as ``sync_folder``."""
    _sync(folder, sync_filesystem)


def _sync(folder: Path, sync: Callable[[int], object]) -> None:
    with (
        owning(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd,
        translated(OSError, IsolatorError, str(folder), "", "check the disk"),
    ):
        sync(fd)
