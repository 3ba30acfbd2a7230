"""Present use of one run of a plugin: what its ``resources`` records say, with as little looked at as has changed."""

from __future__ import annotations

import os
from typing import Any

from isolator.audit.snapshots import OF_PROCESSES, refreshed, snapshot
from isolator.cage.cage import Cage
from isolator.volume.volume import Volume

_TMP = ("tmp_free", "tmp_files_free")
_OF_THE_RUN = (*OF_PROCESSES, *_TMP)
"""Fields that end with the run."""


class Use:
    """The use of a cage and of the plugin's state, if it has one."""

    def __init__(self, cage: Cage, state: Volume | None) -> None:
        self.latest: dict[str, Any] = {}
        """As of the last look."""
        self._cage, self._state = cage, state
        self._settled = False
        """Whether no process had run between the last two looks."""

    def look(self, *, exited: bool) -> dict[str, Any]:
        """Return the resources used so far; those of processes that have ended as of the look before."""
        leaf, latest = self._cage.leaf, self.latest
        rested = None if exited else refreshed(latest, leaf.folders(), self._cage.pid, settled=self._settled)
        self._settled = rested is not None
        now = rested or snapshot(leaf.folders(), [] if exited else leaf.processes())
        before = {} if now["processes"] else {key: latest[key] for key in _OF_THE_RUN if key in latest}
        state = self._state.room() if self._state is not None else {}
        self.latest = {**before, **now, **state, **({} if rested or exited else self._room_in_tmp())}
        return self.latest

    def _room_in_tmp(self) -> dict[str, int]:
        """The room in the cage's own ``/tmp``, a mount that it can neither replace nor have hang."""
        try:
            room = os.statvfs(f"/proc/{self._cage.pid}/root/tmp")
        except OSError:
            return {}  # its first process has just ended
        return dict(zip(_TMP, (room.f_bavail * room.f_frsize, room.f_favail), strict=True))
