"""The policy files of plugins as this daemon writes them: whole or not at all, and never over an operator's own."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_NEW = ".being-written"


def clear(folder: Path) -> None:
    """Remove what a killed daemon had not written to its end."""
    for path in folder.glob(f".*{_NEW}"):
        path.unlink()


def read(path: Path) -> str | None:
    """The file as it is; None when there is none."""
    try:
        return path.read_text(errors="surrogateescape")
    except FileNotFoundError:
        return None


def write(path: Path, text: str) -> None:
    """Replace the file atomically and durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{_NEW}")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    with os.fdopen(fd, "w", errors="surrogateescape") as out:
        out.write(text)
        os.fchmod(out.fileno(), 0o644)
        out.flush()
        os.fsync(out.fileno())
    temporary.rename(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def digest(text: str | None) -> str:
    """SHA-256 of a file's text, by which an edited one is told from one that was written here; empty for None."""
    return "" if text is None else hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
