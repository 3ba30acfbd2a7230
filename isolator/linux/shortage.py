"""Errors that tell of a shortage in this process or on this host, and nothing of what a call was about."""

from __future__ import annotations

import errno

SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})


def is_shortage(error: BaseException | None) -> bool:
    """Whether an error, or the one that it was raised from, is of that kind: the same call may succeed later."""
    if isinstance(error, OSError) and error.errno in SHORTAGES:
        return True
    return error is not None and is_shortage(error.__cause__)
