"""Data of earlier runs, known by markers that root keeps away from them: what is missing is refused, not begun anew.

A folder that is gone (removed, or its disk not mounted) looks like a first start; the marker tells the difference.
"""

from __future__ import annotations

import os
from pathlib import Path

from isolator.errors import IsolatorError
from isolator.linux.descriptors import owning
from isolator.paths import Paths
from isolator.registration.durable import sync_folder


def check_trail(paths: Paths) -> None:
    """Raise IsolatorError when there was a trail and its files or its keys are gone.

    In a new one nobody would notice. Of a single key that is missing the writer makes a record.
    """
    files, keys = any(paths.audit_log.glob("audit*.jsonl")), any(paths.audit_lib.glob("*"))
    marker = paths.trail_begun
    if not files and marker.exists():
        raise _gone(
            "audit trail",
            f"{paths.audit_log} is empty" if keys else f"{paths.audit_log} and {paths.audit_lib} are empty",
            f"to go on without it, which stays visible in the trail, remove {marker}"
            if keys
            else f"to begin a new trail instead, remove {marker}",
        )
    if files and not keys:
        remedy = f"to begin a new trail instead, move the files in {paths.audit_log} away and remove {marker}"
        raise _gone("audit trail", f"{paths.audit_lib}, where its keys were, is empty", remedy)


def check_host(paths: Paths) -> None:
    """Raise IsolatorError when there was a database of the host's and it is gone."""
    if paths.database_begun.exists() and not os.path.lexists(paths.host_database):
        raise _gone(
            str(paths.host_database),
            "queued events, config and stored values were in it, and it is not there",
            "to begin with an empty queue and without config instead, "
            f"remove {paths.database_begun} and what is left in {paths.host_lib}",
        )


def tables(database: Path) -> int:
    """Version of the tables in the host's database; 0 where that cannot be read.

    By the file's header, without SQLite: it is another user's. The host checkpoints it when it has changed them.
    """
    try:
        with owning(os.open(database, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)) as fd:
            header = os.read(fd, 64)
    except OSError:
        return 0
    # "The Database File Format", 1.3: the magic text, and at offset 60 the user version.
    return int.from_bytes(header[60:], "big") if header.startswith(b"SQLite format 3\0") else 0


def note(marker: Path) -> None:
    """Make a marker, durably; harmless if it is there."""
    if not marker.exists():
        marker.touch()
        sync_folder(marker.parent)


def _gone(subject: str, why: str, otherwise: str) -> IsolatorError:
    return IsolatorError(
        subject, f"{why}: it was removed, or its disk is not mounted", f"mount it, or restore a backup; {otherwise}"
    )
