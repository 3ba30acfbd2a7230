"""Log lines of the daemon's processes on standard error, with priorities where the journal reads them.

``sd-daemon(3)``: a line that begins with ``<N>`` has that syslog priority. The prefix is written only when standard
error is the journal's stream (``JOURNAL_STREAM``, systemd.exec(5)); a terminal gets the plain line.
"""

from __future__ import annotations

import logging
import os
import sys

_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}


class _Formatter(logging.Formatter):
    def __init__(self, prefix: str, *, priorities: bool) -> None:
        super().__init__()
        self._prefix, self._priorities = prefix, priorities

    def format(self, record: logging.LogRecord) -> str:
        # Lines are the program's to begin, never a stranger's whose names are among the arguments.
        if isinstance(record.args, tuple):
            record.args = tuple(map(_on_one_line, record.args))
        head = f"<{_PRIORITIES.get(record.levelno, 6)}>" if self._priorities else ""
        text = f"{self._prefix}: {super().format(record)}"
        return "\n".join(f"{head}{line}" for line in text.splitlines() or [text])


def _on_one_line(argument: object) -> object:
    text = argument if isinstance(argument, (str, int, float)) else str(argument)
    if not isinstance(text, str) or text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def set_up(prefix: str = "isolator") -> None:
    """Send the records of every ``isolator`` and ``host`` logger to standard error, each line after ``PREFIX: ``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(prefix, priorities=is_journal_stream(2)))
    for name in ("isolator", "host"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


def is_journal_stream(fd: int) -> bool:
    """Whether ``fd`` is the stream that systemd connected to the journal (device and inode of ``JOURNAL_STREAM``)."""
    try:
        found = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
