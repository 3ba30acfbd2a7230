"""Problems of a host with its cluster: one line each, for ``cluster status`` and the trail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

from host.cluster.clock import Clock
from host.cluster.log import Facts, LogFullError, LogRefusedError, LogUnavailableError, UnusableSettingsError

LASTS: Final = 3.0
"""Seconds for which the log may be without an answer before that is a problem: elections of a leader take less."""
COPIES_LAST: Final = 15.0
"""Seconds for which a server may be away, or behind, before that is one: to start it anew takes less."""

Kind = Literal[
    "unreachable", "unwritable", "refused", "full", "settings", "another_log", "trimmed", "log_lost", "twin",
    "diverged", "newer_version", "left", "failed", "outbox_full", "unreadable", "unheld",
    "events_lost", "put_back", "copies",
]  # fmt: skip
FINAL: frozenset[Kind] = frozenset({"twin", "diverged", "newer_version", "left", "failed"})
"""Those after which this host takes no part until its daemon is started again."""
OF_THE_LOG: frozenset[Kind] = frozenset({"refused", "settings", "another_log", "trimmed"})
"""Problems that end once the log is another, or a person has changed something: until then nothing is decided."""
HARMLESS: frozenset[Kind] = frozenset({"outbox_full", "unreadable", "unheld", "events_lost", "put_back", "copies"})
"""Problems beside which the log takes events of this host."""


_EACH: frozenset[Kind] = frozenset({"unheld", "events_lost"})


def _refusal(error: LogRefusedError) -> str:
    if isinstance(error, UnusableSettingsError):
        return str(error)
    return (
        f"the log refuses this host: {error}; [cluster] name, credentials and ca in host.toml have to fit users.conf "
        "and the certificates of the servers"
    )


class StoppedError(Exception):
    """The end of this host's part in the cluster, or of one life of it, for a reason that has its line."""

    def __init__(self, kind: Kind, line: str) -> None:
        super().__init__(line)
        self.kind, self.line = kind, line


class Problems:
    """The present problems. ``notice(kind, line)`` is called for each new one, with None when one has ended.

    One of ``_EACH`` is several in one line: it is called again when they are others.
    """

    def __init__(self, notice: Callable[[Kind, str | None], None]) -> None:
        self._notice = notice
        self.lines: dict[Kind, str] = {}

    def begin(self, kind: Kind, line: str) -> None:
        """Have a problem, with its newest line."""
        known = self.lines.get(kind)
        self.lines[kind] = line
        if known is None or (kind in _EACH and known != line):
            self._notice(kind, line)

    def end(self, *kinds: Kind) -> None:
        """Have them no more."""
        for kind in kinds:
            if self.lines.pop(kind, None) is not None:
                self._notice(kind, None)


class LogTroubles:
    """Problems with the log, from how it answers."""

    def __init__(self, problems: Problems, clock: Clock) -> None:
        self._problems, self._clock = problems, clock
        self._since: dict[Kind, float] = {}

    def reads(self, error: LogUnavailableError | None) -> None:
        """Note how it answers those who read; None: it does."""
        if isinstance(error, LogRefusedError):
            self._problems.begin("refused", _refusal(error))
        else:
            self._lasting("unreachable", error, "the log does not answer")

    def copies(self, facts: Facts) -> None:
        """Note which servers do not have all of the log, of those that are to have it."""
        what = "fewer servers than shall have the log, until these are back and have read it"
        self._lasting("copies", ", ".join(facts.behind), what, COPIES_LAST)

    def writes(self, error: LogUnavailableError | None) -> None:
        """Note how it answers those who write; None: it does."""
        if isinstance(error, LogFullError):
            self._problems.begin("full", f"the log takes nothing: {error}")
        elif isinstance(error, LogRefusedError):
            self._problems.begin("refused", _refusal(error))
        else:
            if error is None:
                self._problems.end("full", "refused")
            self._lasting("unwritable", error, "the log takes nothing, perhaps its servers have no quorum")

    def _lasting(self, kind: Kind, why: LogUnavailableError | str | None, what: str, lasts: float = LASTS) -> None:
        now = self._clock.now()
        if not why:
            self._since.pop(kind, None)
            self._problems.end(kind)
        elif now - self._since.setdefault(kind, now) >= lasts:
            self._problems.begin(kind, f"{what}: {why}")


def check_bounds(facts: Facts, known: str, place: int) -> None:
    """Raise StoppedError for a log that a host, which has read one made ``known`` up to a place, cannot follow."""
    if facts.wrong:
        raise StoppedError("settings", f"the log cannot be used: {'; '.join(facts.wrong)}")
    if known and facts.created != known:
        raise StoppedError(
            "another_log",
            f"this is another cluster's log (made {facts.created}, this host follows one made {known}): "
            "see [cluster] servers in host.toml, or have this host leave its cluster first: isolator cluster leave",
        )
    if facts.first > place + 1:
        raise StoppedError(
            "trimmed",
            f"the log begins at {facts.first} and this host has read it up to {place}: "
            "it cannot know what was decided between, so it holds nothing; its events wait in its outbox",
        )
