"""Verbs and answers about plugins."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, NotRequired, TypedDict

from host.control.cluster_types import ClusterPlugin
from host.control.parameters import Flag, ListOf, Object, Request, Whole
from host.control.terms import Attempted, Config, Name, Nothing, OptionalText, Pause


class Pending(TypedDict):
    """A version that waits for an operator."""

    version: str
    digest: str
    differences: list[str]


class PluginEntry(TypedDict):
    """One plugin as the supervisor describes it (docs/internals.md)."""

    name: str
    version: str
    digest: str
    state: str
    error: str | None
    run: str | None
    pid: int | None
    uid: int | None
    started_at: str | None
    restarts: int
    effective_digest: str | None
    binary: NotRequired[str | None]
    source: NotRequired[str]
    source_files: NotRequired[str]
    source_packaged: NotRequired[bool]
    signer: NotRequired[str]
    previous: NotRequired[list[str]]
    pending: NotRequired[Pending | None]
    ready: NotRequired[bool]
    on_trial: NotRequired[bool]
    lease: NotRequired[str]
    found: NotRequired[str]


class PauseChange(TypedDict):
    """Whether the plugin is paused now, on this host, and whether that is a change.

    ``holders``: the other hosts of a cluster that hold it, and go on as they did.
    """

    paused: bool
    changed: bool
    holders: list[str]


class ListedPlugin(PluginEntry):
    """One plugin with its queue's length and the state of its worker.

    ``last`` and ``failing_since`` (Unix time of the first of the failed attempts in a row) are those of this host
    process; ``next_attempt`` is the Unix time at which the earliest delivery that waits for its retry is due.
    ``attempts_ended`` counts since this host process started; ``latency_p99_us`` is exceeded by one of a hundred of the
    newest attempts (256 at most). ``caps``: bytes of ``memory``, thousandths of a core (``cpu``), ``tasks``.
    ``missing``: keys of its config without which it does not start.
    """

    mode: str
    queue: int
    worker: str | None
    holding: str | None
    last: Attempted | None
    failing_since: float | None
    next_attempt: float | None
    attempts_ended: int
    latency_p99_us: int | None
    caps: dict[str, int] | None
    paused: Pause | None
    missing: list[str]


class ConfigItem(TypedDict):
    """One key of a plugin's config; the value of a secret is always null."""

    key: str
    type: str
    secret: bool
    required: bool
    is_set: bool
    value: str | None
    default: str | None


class ShownPlugin(ListedPlugin):
    """One plugin in full."""

    effective: dict[str, Any] | None
    manifest: dict[str, Any] | None
    hooks: list[str]
    config: list[ConfigItem]
    stderr: list[str]
    held_by: str | None
    """The event whose retry is next; later ones of its key wait for it."""
    log_bytes_dropped: int
    cluster: NotRequired[ClusterPlugin]
    """What the cluster of hosts knows of it, where there is one and it does."""


class ListedPlugins(TypedDict):
    plugins: list[ListedPlugin]
    alarms: list[str]


class StagedPlugin(TypedDict):
    token: str
    name: str
    version: str
    digest: str
    description: str
    mode: str
    synthesised: bool
    registered: bool
    unchanged: bool
    files: int
    size: int
    faults: list[str]
    proposal: dict[str, Any]
    differences: list[str]
    warnings: list[str]
    config: list[dict[str, Any]]
    missing: list[str]
    secrets_given: list[str]
    signer: NotRequired[str]


class ChangedPlugin(TypedDict):
    plugin: PluginEntry


class RegisteredPlugin(ChangedPlugin):
    missing: list[str]


class ApprovedPlugin(ChangedPlugin):
    missing: NotRequired[list[str]]


class UpdatedPlugin(RegisteredPlugin):
    unchanged: NotRequired[bool]
    pending: NotRequired[bool]
    differences: NotRequired[list[str]]


class Explanation(TypedDict):
    proposal: dict[str, Any]


class StartedRun(TypedDict):
    run: str
    pid: int


class LogLines(TypedDict):
    lines: list[dict[str, Any]]
    dropped: int


class PluginStage(Request, verb="plugin.stage", role="operator", recorded=True, result=StagedPlugin):
    """Show the request and the grant of a plugin that is not registered yet; the answer's token registers it.

    ``update`` names the registered plugin of which this is a newer version; the rest may be left out then, as with the
    last one. The files themselves were handed over with the ticket. ``resolved``, of a package: ``package``, and
    ``hashes`` of all that it consists of by ``NAME@VERSION``, for the trail.
    """

    path: OptionalText = None
    name: OptionalText = None
    binary: OptionalText = None
    hooks: Annotated[list[str] | None, ListOf(str)] = None
    files: OptionalText = None
    update: OptionalText = None
    config: Config = field(default_factory=dict, repr=False)
    ticket: OptionalText = None
    resolved: Annotated[dict[str, Any] | None, Object()] = field(default=None, repr=False)


class PluginCommit(Request, verb="plugin.commit", role="operator", recorded=True, result=RegisteredPlugin):
    """Register a staged plugin, with its config; takes a ticket of whoever handed it over."""

    token: Name
    config: Config = field(default_factory=dict, repr=False)
    ticket: OptionalText = None


class PluginUpdate(Request, verb="plugin.update", role="operator", recorded=True, result=UpdatedPlugin):
    """Exchange the version in use for a staged one; one that asks for more waits, unless ``approve``.

    Values in ``config`` belong to the version: they go with it when it fails, and wait with it. Takes a ticket of
    whoever handed it over.
    """

    token: Name
    config: Config = field(default_factory=dict, repr=False)
    approve: Annotated[bool, Flag()] = False
    ticket: OptionalText = None


class PluginDiscard(Request, verb="plugin.discard", role="operator", recorded=True, result=Nothing):
    """Forget a staged plugin."""

    token: Name


class PluginApprove(Request, verb="plugin.approve", role="operator", recorded=True, result=ApprovedPlugin):
    """Approve a pending version; ``digest`` (from ``plugin.explain``) makes sure that it is the one that was shown.

    Takes a ticket.
    """

    name: Name
    digest: OptionalText = None
    ticket: OptionalText = None


class PluginReject(Request, verb="plugin.reject", role="operator", recorded=True, result=ChangedPlugin):
    """Refuse the version that waits for approval; takes a ticket."""

    name: Name
    ticket: OptionalText = None


class PluginRollback(Request, verb="plugin.rollback", role="operator", recorded=True, result=ChangedPlugin):
    """Go back to the version before, or to the kept one with the version or digest ``to``; takes a ticket."""

    name: Name
    to: OptionalText = None
    ticket: OptionalText = None


class PluginEnable(Request, verb="plugin.enable", role="operator", recorded=True, result=ChangedPlugin):
    """Let a plugin run again; also clears ``failed``. Takes a ticket for one that is disabled."""

    name: Name
    ticket: OptionalText = None


class PluginDisable(Request, verb="plugin.disable", role="operator", recorded=True, result=ChangedPlugin):
    """Stop a plugin and keep it stopped; its events wait."""

    name: Name


class PluginPause(Request, verb="plugin.pause", role="operator", recorded=True, result=PauseChange):
    """Send a plugin no events until it is resumed, also after a restart; they wait, and its sidecar stays."""

    name: Name


class PluginResume(Request, verb="plugin.resume", role="operator", recorded=True, result=PauseChange):
    """Send a paused plugin its events again."""

    name: Name


class PluginRemove(Request, verb="plugin.remove", role="operator", recorded=True, result=Nothing):
    """Stop a plugin and forget it with its config and its queue; takes a ticket.

    With ``cluster`` the cluster forgets it, too, with what waits for it; it need not be on this host. Refused while
    another living host has it.
    """

    name: Name
    ticket: OptionalText = None
    cluster: Annotated[bool, Flag()] = False


class PluginStart(Request, verb="plugin.start", role="operator", recorded=True, repeatable=True, result=StartedRun):
    """Start a plugin and wait until it runs."""

    name: Name


class PluginStop(Request, verb="plugin.stop", role="operator", recorded=True, repeatable=True, result=Nothing):
    """Stop a plugin; the next event starts it again."""

    name: Name


class PluginRestart(Request, verb="plugin.restart", role="operator", recorded=True, result=StartedRun):
    """Stop a plugin and start it again."""

    name: Name


class PluginList(Request, verb="plugin.list", role="viewer", result=ListedPlugins):
    """List every plugin with its live figures, and the daemon's alarms."""


class PluginShow(Request, verb="plugin.show", role="viewer", result=ShownPlugin):
    """Show everything about one plugin."""

    name: Name


class PluginExplain(Request, verb="plugin.explain", role="viewer", result=Explanation):
    """Show request, grant and effect line by line, each with its source."""

    name: Name


class PluginLogs(Request, verb="plugin.logs", role="viewer", result=LogLines):
    """Return the last lines of a plugin's log; with ``follow`` further ones come as ``log`` notifications."""

    name: Name
    lines: Annotated[int, Whole(10_000)] = 100
    follow: Annotated[bool, Flag()] = False


class LogLine(TypedDict):
    """A line of a plugin's log."""

    time: str
    run: str | None
    stream: str
    line: str
    plugin: str
