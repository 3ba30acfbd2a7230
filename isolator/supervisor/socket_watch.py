"""Being told that something appeared in a socket folder, for all starting plugins together.

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
        self._looks: dict[int, Callable[[], None]] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._inotify.fileno(), self._readable)

    def add(self, directory: int, look: Callable[[], None]) -> int:
        """Call ``look`` when something appears in the folder behind a descriptor; what is there by now is not told.

        Returns the number for ``remove``.
        """
        number = self._inotify.watch(f"/proc/self/fd/{directory}", IN_CREATE | IN_MOVED_TO)
        self._looks[number] = look
        return number

    def remove(self, number: int) -> None:
        """Tell no more; harmless when repeated."""
        if self._looks.pop(number, None) is not None:
            self._inotify.unwatch(number)

    def close(self) -> None:
        """End every watch."""
        self._loop.remove_reader(self._inotify.fileno())
        self._inotify.close()

    def _readable(self) -> None:
        numbers = {event.watch for event in self._inotify.read()}
        if -1 in numbers:  # the queue overflowed: somebody floods his folder, and others' events are lost
            numbers = set(self._looks)
        for number in numbers:
            look = self._looks.get(number)
            if look is not None:
                look()
