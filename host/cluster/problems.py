"""Problems of a host with its cluster: one line each, for ``cluster status`` and the trail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

Kind = Literal[
    "unreachable", "unwritable", "refused", "full", "settings", "another_log", "trimmed", "log_lost", "twin",
    "diverged", "newer_version", "outbox_full", "unreadable",
]  # fmt: skip
FINAL: frozenset[Kind] = frozenset({"twin", "diverged", "newer_version"})
"""Those after which this host takes no part until its daemon is started again."""


class StoppedError(Exception):
    """The end of this host's part in the cluster, or of one life of it, for a reason that has its line."""

    def __init__(self, kind: Kind, line: str) -> None:
        super().__init__(line)
        self.kind, self.line = kind, line


class Problems:
    """What is wrong at the moment. ``notice(kind, line)`` is called for each new one, with None when one has ended."""

    def __init__(self, notice: Callable[[Kind, str | None], None]) -> None:
        self._notice = notice
        self.lines: dict[Kind, str] = {}

    def begin(self, kind: Kind, line: str) -> None:
        """Have a problem, with its newest line."""
        known = kind in self.lines
        self.lines[kind] = line
        if not known:
            self._notice(kind, line)

    def end(self, *kinds: Kind) -> None:
        """Have them no more."""
        for kind in kinds:
            if self.lines.pop(kind, None) is not None:
                self._notice(kind, None)
