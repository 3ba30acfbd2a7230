"""Watch the socket folders of all starting plugins together.

One inotify instance: a user may have 128 of them (``fs.inotify.max_user_instances``), root's other programs included,
and 200 plugins may start at once. A folder is watched only until its socket is there: from then on the plugin could
make and remove files in it as fast as it likes, at the supervisor's cost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from isolator.linux.inotify import IN_CREATE, IN_MOVED_TO, Inotify


class SocketWatch:
    """The socket folders of the plugins that are starting; ``close`` ends it."""

    def __init__(self) -> None:
        self._inotify = Inotify()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._inotify.fileno(), self._readable)

    def add(self, directory: int, changed: Callable[[], None]) -> int:
        """Call ``changed`` when something appears in the folder behind a descriptor; not for what is there already.

        Returns the number for ``remove``.
        """
        number = self._inotify.watch(f"/proc/self/fd/{directory}", IN_CREATE | IN_MOVED_TO)
        self._callbacks[number] = changed
        return number

    def remove(self, number: int) -> None:
        """End one watch; harmless when repeated."""
        if self._callbacks.pop(number, None) is not None:
            self._inotify.unwatch(number)

    def close(self) -> None:
        """End every watch."""
        self._loop.remove_reader(self._inotify.fileno())
        self._inotify.close()

    def _readable(self) -> None:
        numbers = {event.watch for event in self._inotify.read()}
        if -1 in numbers:  # the queue overflowed: somebody floods his folder, and others' events are lost
            numbers = set(self._callbacks)
        for number in numbers:
            changed = self._callbacks.get(number)
            if changed is not None:
                changed()
