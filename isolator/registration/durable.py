"""Folders on disk before anything relies on them; a disk that fails is an error a person can act on."""

from __future__ import annotations

import os
from pathlib import Path

from isolator.errors import IsolatorError, translated
from isolator.linux import durable
from isolator.linux.descriptors import owning
from isolator.linux.files import sync_filesystem


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk; raises IsolatorError when the disk fails."""
    with translated(OSError, IsolatorError, str(folder), "", "check the disk"):
        durable.sync_folder(folder)


def sync_tree(folder: Path) -> None:
    """Put everything below a folder on disk, with the rest of its file system; raises as ``sync_folder``."""
    with (
        owning(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd,
        translated(OSError, IsolatorError, str(folder), "", "check the disk"),
    ):
        sync_filesystem(fd)
