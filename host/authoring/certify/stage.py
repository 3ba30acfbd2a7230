"""Stage of a certification: the fault that is being played, in a file between the command and its private daemon.

The command (``certifier.py``), which is root, writes it; the daemon's host (``host/certifying/``), which owns nothing,
reads it before each request, and writes what it finds into the trail.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Play = Literal[
    "plain", "id", "bytes", "late", "empty", "half", "gone", "garbage", "twice", "joined", "note", "hold", "down"
]  # fmt: skip
FILE = "certify.json"
"""Name of the file, in the daemon's root."""
FOUND = "certify: "
"""How the records of findings begin (``plugin.health``)."""
GOOD = frozenset({"ok", "skipped", "retry", "rejected", "busy"})
"""Outcomes of an answer in good order; what it says is the plugin's affair."""
_LATE_SECONDS = 3.0
DOWN_SECONDS = 20.0
"""Time for which the other sides of a plugin do not answer."""


@dataclass(frozen=True)
class Scene:
    """One fault on the stage; each has another ``number``."""

    play: Play
    number: int
    mode: str
    late: float = 0.0
    """Seconds between a connection and a request that comes late."""
    patience: float = 30.0
    """Seconds in which the answer to a message that is ours alone has to come: as many as an event has."""


class Stage:
    """The stage below a daemon's root."""

    def __init__(self, root: Path) -> None:
        self._path = root / FILE
        self._number = 0

    def set(self, play: Play, mode: str, timeout: float = 0.0) -> None:
        """Play this from now on, for a plugin of this mode that has ``timeout`` seconds for an event."""
        self._number += 1
        beside = self._path.with_suffix(".new")
        scene = {"play": play, "number": self._number, "mode": mode, "late": min(_LATE_SECONDS, timeout / 3)}
        beside.write_text(json.dumps(scene | ({"patience": timeout} if timeout else {})))
        beside.chmod(0o644)
        beside.replace(self._path)

    def scene(self) -> Scene:
        """The fault that is being played now."""
        try:
            return Scene(**json.loads(self._path.read_bytes()))
        except FileNotFoundError:
            return Scene("plain", 0, "")
