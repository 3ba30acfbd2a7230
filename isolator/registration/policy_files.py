"""The policy files of plugins as this daemon writes them: whole or not at all, and never over an operator's own."""

from __future__ import annotations

import hashlib
from pathlib import Path

from isolator.errors import IsolatorError
from isolator.linux.durable import replace_file
from isolator.linux.files import read_plain

_MOST = 1 << 20
_NEW = ".being-written"


def clear(folder: Path) -> None:
    """Remove the unfinished files of a killed daemon."""
    for path in folder.glob(f".*{_NEW}"):
        if path.is_symlink() or not path.is_dir():
            path.unlink()


def read(path: Path) -> str | None:
    """The file as it is; None when there is none. Raises IsolatorError when something else has its name."""
    try:
        return read_plain(path, most=_MOST).decode(errors="surrogateescape")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise IsolatorError(str(path), error.strerror or "cannot be read", "put a policy file there") from None


def write(path: Path, text: str) -> None:
    """Replace the file atomically and durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = text.encode(errors="surrogateescape")
    replace_file(path, content, temporary=path.with_name(f".{path.name}{_NEW}"))


def mark(text: str, *, edited: bool) -> str:
    """The mark of a file that was written here; ``edited``: with an operator's lines in it, so it is never made anew.

    Of a file that is not edited it is the digest, as every version has it.
    """
    return ("+" if edited else "") + digest(text)


def written_here(text: str | None, marked: str) -> bool:
    return digest(text) == marked.removeprefix("+")


def digest(text: str | None) -> str:
    """SHA-256 of a file's text, which tells an edited file from one that was written here; empty for None."""
    return "" if text is None else hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
