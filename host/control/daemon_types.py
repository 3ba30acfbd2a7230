"""Verbs and answers about the daemon itself."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from host.control.parameters import Request
from host.control.terms import Name, OptionalText


class ServiceEntry(TypedDict):
    """One of the daemon's processes; ``ended``: how the one before it ended, empty if none has.

    ``since``, of the supervisor: Unix time of its start, which a reload leaves as it is.
    """

    name: str
    pid: int | None
    up: bool
    starts: int
    ended: str
    since: NotRequired[float]


class Trail(TypedDict):
    """The audit trail; ``last`` is null while it cannot be read."""

    last: int | None
    pending: int
    blocked: str | None


class DaemonStatus(TypedDict):
    """The daemon at a glance; ``failing``, ``waiting`` and ``paused`` name plugins.

    ``failing`` are those that have an error (a policy file that is wrong or gone, too), whose attempts fail, or whose
    events are held back. ``started_at``: the supervisor's, if S answers. ``services`` is empty while S is away.
    """

    version: str
    pid: int
    started_at: float
    plugins: int
    states: dict[str, int]
    failing: list[str]
    waiting: list[str]
    paused: list[str]
    services: list[ServiceEntry]
    trail: Trail
    queue: dict[str, int]
    alarms: list[str]
    audit_blocked: str | None
    database_blocked: str | None
    records_pending: int


class Reloaded(TypedDict):
    """The daemon's generation: 1 at its start, one more with each reload; why the last one was refused, if it was.

    ``outdated``: its services that serve as before the reload until they are exchanged, each with the reason why it
    could not be, or an empty text while that is still to come.
    """

    generation: int
    version: str
    refused: str
    outdated: dict[str, str]


class ReloadBegun(TypedDict):
    generation: int


class Reload(Request, verb="daemon.reload", role="operator", recorded=True, result=ReloadBegun):
    """Have the daemon execute the program that is installed, in place; returns the generation that comes of it."""


class DaemonGeneration(Request, verb="daemon.generation", role="viewer", result=Reloaded):
    """Return the daemon's generation, why the last reload was refused, and the services that it has not exchanged."""


class SnapshotTaken(TypedDict):
    file: str


class DaemonSnapshot(Request, verb="daemon.snapshot", role="operator", result=SnapshotTaken):
    """Copy the database for a backup by root: ``file``, beside it, is of the moment of the record ``backup.taken``."""

    id: Name


class Controls(TypedDict):
    ledger: list[dict[str, Any]]


class Version(TypedDict):
    """``isolator``: the daemon's version; ``protocols``: majors of the plugin protocol that it speaks."""

    isolator: str
    protocols: list[int]


class Help(TypedDict):
    """Summary, role, parameters (JSON Schema) and answer's keys of each verb, and the keys of each notification."""

    verbs: dict[str, dict[str, Any]]
    notifications: dict[str, dict[str, bool]]


class ShowVersion(Request, verb="version", role="viewer", result=Version):
    """Return the daemon's version, and the versions of the plugin protocol that it speaks."""


class ShowHelp(Request, verb="help", role="viewer", result=Help):
    """Describe every verb and notification, or one verb."""

    verb: OptionalText = None


class Status(Request, verb="status", role="viewer", result=DaemonStatus):
    """Return the daemon's figures and alarms."""


class Ledger(Request, verb="ledger", role="viewer", result=Controls):
    """List this host's controls, as the supervisor sees them."""
