"""Secrets of an operator's, in files that only root can read; each goes to the one process that needs it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from isolator.errors import IsolatorError

_LONGEST = 1 << 16


def secrets_of(path: Path, missing: str, form: str) -> tuple[str, ...]:
    """The lines of a file that only root can read; raises IsolatorError, with what to do if there are none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != 0 or status.st_mode & 0o077:
                why = "is not a file that only root can read"
                raise IsolatorError(str(path), why, f"chown root, chmod 0600 {path}")
            text = file.read(_LONGEST).decode()
    except OSError as error:
        raise IsolatorError(str(path), error.strerror or "cannot be read", missing) from None
    except UnicodeDecodeError:
        raise IsolatorError(str(path), "is not text", form) from None
    return tuple(line.strip() for line in text.splitlines() if line.strip())
