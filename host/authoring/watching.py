"""A thread that tells when an author has saved something."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path

from isolator.linux.folder_watch import FolderWatch

_SETTLE = 0.03
"""Seconds: an editor writes one file, within milliseconds."""
_MOST_FOLDERS = 2000
"""Folders that are watched; changes in those beyond are not noticed."""


class Watching:
    """Watches a folder with all below it, and one more file; calls ``changed``, from a thread, until it is closed."""

    def __init__(self, folder: str, also: Path | None, changed: Callable[[], None]) -> None:
        self._folder, self._also, self._changed = folder, also.absolute() if also is not None else None, changed
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        self._ready.wait()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.call_soon(self._begin)
        self._loop.run_forever()
        self._watch.close()
        self._loop.close()

    def _begin(self) -> None:
        # FolderWatch belongs to the loop that runs.
        self._watch = FolderWatch(self._seen, settle=_SETTLE)
        self._watch.set(self._folders())
        self._ready.set()

    def _seen(self, paths: set[str]) -> None:
        self._watch.set(self._folders())  # there may be new ones
        if any(self._counts(path) for path in paths):
            self._changed()

    def _counts(self, path: str) -> bool:
        """Whether a change is one of the plugin's: editors make files of their own, which come and go."""
        folder, _, name = path.rpartition("/")
        if self._also is not None and path == str(self._also):
            return True
        inside = folder == self._folder or folder.startswith(f"{self._folder}/")
        return inside and not (name.startswith(".") or name.endswith(("~", ".swp", ".tmp")) or name == "4913")

    def _folders(self) -> list[str]:
        """The folders to watch, but for hidden ones."""
        found = [str(self._also.parent)] if self._also is not None else []
        for path, inner, _ in os.walk(self._folder):
            inner[:] = [name for name in inner if not name.startswith(".")]
            found.append(path)
            if len(found) >= _MOST_FOLDERS:
                break
        return found
