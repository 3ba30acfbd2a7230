"""Folders of the daemon, made or taken over; never what a link in their place leads to."""

from __future__ import annotations

import os
from pathlib import Path

from isolator.errors import IsolatorError


def own_folder(folder: Path, mode: int, owner: int = -1, group: int = -1) -> None:
    """Make a folder, or give the one that is there its mode and owner (-1: as it is). Raises IsolatorError for a link,
    whose target may be anybody's."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder, flags)
    except (FileExistsError, NotADirectoryError):
        why = "is a link or a file, and its owner or mode would have to be changed"
        remedy = "put a folder there; to have it on another disk, mount that there (mount --bind)"
        raise IsolatorError(str(folder), why, remedy) from None
    try:
        os.fchown(fd, owner, group)
        os.fchmod(fd, mode)
    finally:
        os.close(fd)
