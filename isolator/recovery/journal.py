"""Journal of everything that is made outside a process, written before it is made.

One JSON line an entry, in the run directory: after a reboot it is gone, and so are the groups and mounts it names.
``record`` comes before the thing exists, ``forget`` after its removal; an entry with the first and without the second
is left over from a daemon that was killed. Entries are recognised by boot id and full path, never by a pid.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import threading
from pathlib import Path
from typing import Any

from isolator.base.structs import field, struct_class
from isolator.errors import IsolatorError, translated
from isolator.linux.lock import lock_file

KINDS = frozenset({"leaf", "service", "spare", "mount", "subtree"})
_COMPACT_LINES = 4000
_encode = json.JSONEncoder(separators=(",", ":")).encode
_MOST = 64 << 20


@functools.cache
def boot_id() -> str:
    """The kernel's id of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@struct_class(frozen=True)
class Entry:
    """A thing outside the daemon: the groups of one leaf (a cage or a service), or a mount with its loop device."""

    name: str
    kind: str
    """``leaf``, ``service``, ``spare`` (groups of a cage, a service, the warm pool), ``mount`` or ``subtree``."""
    folders: tuple[str, ...] = ()
    """The cgroup folders, v2 first; for a mount its mount point."""
    boot: str = field(default_factory=boot_id)


def read_entries(content: bytes) -> dict[str, Entry]:
    """The entries of this boot that a journal's content leaves open, by name.

    A line that is no entry is passed over: the torn last one of a killed daemon announced what was not made yet, and of
    a damaged journal the groups and mounts are found without it.
    """
    here = boot_id()
    found: dict[str, Entry] = {}
    for line in content.split(b"\n"):
        try:
            record = json.loads(line)
            if "gone" in record:
                found.pop(record["gone"], None)
            elif record["boot"] == here:
                entry = _entry(record)
                found[entry.name] = entry
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return found


def _entry(record: dict[str, Any]) -> Entry:
    entry = Entry(**{**record, "folders": tuple(record["folders"])})
    paths = all(isinstance(folder, str) and folder.startswith("/") for folder in entry.folders)
    if not isinstance(entry.name, str) or entry.kind not in KINDS or not entry.folders or not paths:
        raise ValueError("no entry")
    return entry


def _content(fd: int, path: Path) -> bytes:
    size = os.fstat(fd).st_size
    if size > _MOST:
        raise IsolatorError(str(path), f"is damaged: it has {size} bytes", "delete it, and start again")
    return os.pread(fd, size, 0)


def read_unlocked(path: Path) -> dict[str, Entry] | None:
    """The open entries of a daemon that is dead, changing nothing; None while a daemon has the journal locked."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return {}
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return read_entries(_content(fd, path))
    except BlockingIOError:
        return None
    finally:
        os.close(fd)


def _open_locked(path: Path, *, wait: bool) -> int:
    """Open (or make) the file and take its lock; raises IsolatorError when another daemon has it."""
    with translated(OSError, IsolatorError, str(path), "", "remove it, and start again"):
        fd = lock_file(path, wait=wait)
    if fd is None:
        why = "another one is running there"
        raise IsolatorError(f"daemon on {path.parent}", why, "stop it first, or use another --root")
    return fd


class Journal:
    """The open entries of one daemon. Holds the lock that keeps a second daemon off the same root."""

    def __init__(self, path: Path, *, wait: bool = False, locked: int = -1) -> None:
        """Open and lock it. ``wait``: its name is nobody else's, so who has it locked is only looking at it.

        ``locked``: its descriptor, open and locked since before this process's exec.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._fd = locked if locked >= 0 else _open_locked(path, wait=wait)
        try:
            content = _content(self._fd, path)
        except BaseException:
            os.close(self._fd)
            raise
        self.open = read_entries(content)
        self._lock = threading.Lock()
        """State folders are made ready in threads."""
        self._lines = content.count(b"\n")
        if content and not content.endswith(b"\n"):
            os.write(self._fd, b"\n")  # or the next entry would continue the torn last line

    @property
    def descriptor(self) -> int:
        """The descriptor that holds the lock."""
        return self._fd

    def leaves(self) -> list[str]:
        """The names of the cages' leaves, which there are, or are about to be."""
        return [entry.name for entry in list(self.open.values()) if entry.kind == "leaf"]

    def record(self, entry: Entry) -> None:
        """Write down an entry before its thing is made."""
        with self._lock:
            self.open[entry.name] = entry
            self._append(entry.__dict__)

    def forget(self, name: str) -> None:
        """Write down that the thing of an entry was removed."""
        with self._lock:
            if self.open.pop(name, None) is not None:
                self._append({"gone": name})
                if self._lines > _COMPACT_LINES and len(self.open) * 4 < self._lines:
                    self._compact()

    def close(self) -> None:
        """Release the lock; the file goes too when nothing is open."""
        if not self.open:
            self._path.unlink(missing_ok=True)
        os.close(self._fd)

    def _append(self, record: dict[str, object]) -> None:
        # Written in one call and not synced: it must survive the daemon's death, not the machine's.
        os.write(self._fd, _encode(record).encode() + b"\n")
        self._lines += 1

    def _compact(self) -> None:
        lines = [_encode(entry.__dict__).encode() + b"\n" for entry in self.open.values()]
        os.ftruncate(self._fd, 0)
        os.write(self._fd, b"".join(lines))
        self._lines = len(lines)
