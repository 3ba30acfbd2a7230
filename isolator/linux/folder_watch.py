"""Watch folders and report changes, debounced.

Editors and copies change a file in several steps; what is told after ``SETTLE`` seconds without a change (but at most
``LONGEST`` after the first) is what was meant. Names are only a hint where to look: between an event and the look at
it everything may have changed again, which gives another event.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable

from isolator.linux import inotify

SETTLE, LONGEST = 0.1, 1.0
_MASK = (
    inotify.IN_CREATE | inotify.IN_CLOSE_WRITE | inotify.IN_MOVED_TO | inotify.IN_MOVED_FROM | inotify.IN_DELETE
    | inotify.IN_DELETE_SELF | inotify.IN_MOVE_SELF | inotify.IN_ATTRIB
)  # fmt: skip


class FolderWatch:
    """Watches folders (not what is below their folders) and calls ``changed`` with the paths, as FOLDER/NAME.

    ``settle``: seconds without a change.
    """

    def __init__(self, changed: Callable[[set[str]], None], *, settle: float = SETTLE) -> None:
        self._changed, self._settle = changed, settle
        self._inotify = inotify.Inotify()  # fmt: skip
        self._folders: dict[int, str] = {}
        self._seen: set[str] = set()
        self._first = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._inotify.fileno(), self._readable)

    def set(self, folders: Iterable[str]) -> None:
        """Watch exactly these from now on; those that are not there (or are links) are passed over."""
        found: dict[int, str] = {}
        for folder in folders:
            with contextlib.suppress(OSError):
                # The same folder gives the same number again, so nothing is missed in between.
                found[self._inotify.watch(folder, _MASK | inotify.IN_ONLYDIR | inotify.IN_DONT_FOLLOW)] = folder
        for number in self._folders.keys() - found.keys():
            self._inotify.unwatch(number)
        self._folders = found

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._inotify.fileno())
        self._inotify.close()

    def _readable(self) -> None:
        for event in self._inotify.read():
            folder = self._folders.get(event.watch)
            if folder is not None:
                self._seen.add(f"{folder}/{event.name}")
            elif event.watch == -1:
                # The kernel's queue overflowed: anything may have changed.
                self._seen.update(f"{folder}/" for folder in self._folders.values())
        now = self._loop.time()
        if self._timer is None:
            self._first = now
        else:
            self._timer.cancel()
        self._timer = self._loop.call_at(min(now + self._settle, self._first + LONGEST), self._tell)

    def _tell(self) -> None:
        self._timer = None
        seen, self._seen = self._seen, set()
        if seen:
            self._changed(seen)
