"""Files and folders that survive a power cut: replaced whole, and on disk before anything relies on them."""

from __future__ import annotations

import os
from pathlib import Path

from isolator.linux.descriptors import owning
from isolator.linux.files import write_all


def replace_file(path: Path, content: bytes, *, temporary: Path | None = None, mode: int = 0o644) -> None:
    """Replace ``path`` atomically and durably; ``temporary``, beside it (NAME.new), is what a kill leaves.

    A crash leaves the old or the new content, and the new one is on disk when this returns. Raises OSError.
    """
    temporary = temporary or path.with_name(f"{path.name}.new")
    temporary.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    with owning(os.open(temporary, flags, mode)) as fd:
        write_all(fd, content)
        os.fchmod(fd, mode)
        os.fsync(fd)
    temporary.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk. Raises OSError."""
    with owning(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
        os.fsync(fd)
