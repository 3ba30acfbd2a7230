"""The policy files of plugins as this daemon writes them: whole or not at all, and never over an operator's own."""

from __future__ import annotations

import hashlib
from pathlib import Path

from isolator.registration.durable import replace_file

_NEW = ".being-written"


def clear(folder: Path) -> None:
    """Remove the unfinished files of a killed daemon."""
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
    content = text.encode(errors="surrogateescape")
    replace_file(path, content, temporary=path.with_name(f".{path.name}{_NEW}"))


def digest(text: str | None) -> str:
    """SHA-256 of a file's text, which tells an edited file from one that was written here; empty for None."""
    return "" if text is None else hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
