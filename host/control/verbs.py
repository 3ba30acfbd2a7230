"""The verbs of the control socket: one type each, with parameters, result, role, and whether each call is recorded.

This is the contract. The server reads requests with it, the table in docs/embedding.md is generated from it, and
clients are tested against ``listing``. The handlers stand in one module per noun, beside this one. The verbs that only
platforms need are in ``platform_types``.
"""

from __future__ import annotations

import inspect
from dataclasses import field
from typing import Annotated, Any, NotRequired, TypedDict, get_origin, get_type_hints

from host.control import cluster_types  # noqa: F401 # its verbs are among those that are listed
from host.control.parameters import Flag, Number, Object, OneOf, Request, Text, Texts, Whole
from host.control.platform_types import ApiCall
from host.control.terms import LARGEST, Attempted, Config, Name, Nothing, OptionalText, Pause
from isolator.audit.schema import MAX_ID

MAX_WAIT = 3600.0
"""Seconds that ``event.wait`` may take."""
MAX_TTL = 31 * 86400.0
"""Seconds after which an event may expire at the latest."""
MAX_RECORDS = 10_000
"""Records that ``audit.follow`` may begin with."""
STORED_STATES = (
    "queued",
    "retry",
    "in_flight",
    "ok",
    "skipped",
    "dead",
    "expired",
    "quarantined",
    "cancelled",
    "moved",
)
"""States of deliveries as ``event.list`` can look for them."""

# Events


class Delivery(TypedDict):
    """One delivery of an event; ``holding``, of one that is not final: the reason why nothing is sent."""

    event_id: str
    event: str
    plugin: str
    state: str
    attempts: int
    status: str | None
    detail: str | None
    reply: str | None
    latency_us: int | None
    updated: float
    next_attempt: float | None
    holding: NotRequired[str | None]


class Event(TypedDict):
    """One event with its deliveries."""

    id: str
    name: str
    time: str
    accepted: float
    subject: str
    payload: dict[str, Any]
    by: str | None
    deliveries: list[Delivery]


class Emitted(TypedDict):
    id: str
    plugins: list[str]
    overflowed: list[str]
    duplicate: bool


class Events(TypedDict):
    events: list[Event]


class Deliveries(TypedDict):
    deliveries: list[Delivery]


class Replayed(TypedDict):
    id: str
    plugins: list[str]


class ChangedEvent(TypedDict):
    """An event, and the plugins whose deliveries were changed."""

    id: str
    plugins: list[str]


class Recovery(TypedDict):
    """A recovery as planned: the number of deliveries, and the id of its job; null where nothing was begun."""

    job: str | None
    plugin: str
    count: int


class RecoveryJob(TypedDict):
    """A recovery job; ``done`` of about ``total`` deliveries are queued; ``state``: running, done or cancelled."""

    id: str
    plugin: str
    dead: bool
    missed: bool
    rate: float
    by: str
    created: float
    state: str
    total: int
    done: int


class RecoveryJobs(TypedDict):
    jobs: list[RecoveryJob]


class EventEmit(Request, verb="event.emit", role="emitter", result=Emitted):
    """Accept one event; it and its deliveries are on disk when the answer comes.

    ``on_behalf_of``: the person for whom it is emitted; it is in the record ``event.accepted``, and gives no right.
    """

    name: Name
    payload: Annotated[dict[str, Any], Object("event", "the payload must be an object")] = field(default_factory=dict)
    dedupe_key: Annotated[str | None, Text(256, nullable=True)] = None
    ttl: Annotated[float | None, Number(MAX_TTL, nullable=True)] = None
    trace: Annotated[str | None, Text(128, least=0, nullable=True)] = None
    on_behalf_of: Annotated[str | None, Text(MAX_ID, nullable=True)] = None


class EventWait(Request, verb="event.wait", role="emitter", result=Event):
    """Wait until every delivery of an event is final, at most ``timeout`` seconds."""

    id: Name
    timeout: Annotated[float, Number(MAX_WAIT)] = 30.0


class EventList(Request, verb="event.list", role="viewer", result=Events):
    """List the newest events: those of one name, since a Unix time, with a delivery at a plugin and in a state."""

    limit: Annotated[int, Whole(10_000)] = 50
    event: OptionalText = None
    plugin: OptionalText = None
    state: Annotated[str | None, OneOf(STORED_STATES)] = None
    since: Annotated[float, Number(LARGEST)] = 0.0


class EventShow(Request, verb="event.show", role="viewer", result=Event):
    """Show one event with its deliveries."""

    id: Name


class EventDead(Request, verb="event.dead", role="viewer", result=Deliveries):
    """List the dead letters, or those of one plugin."""

    plugin: OptionalText = None
    limit: Annotated[int, Whole(100_000)] = 1000


class EventReplay(Request, verb="event.replay", role="operator", recorded=True, result=Replayed):
    """Queue the dead letters of an event again; with ``plugin`` also a delivery there that succeeded."""

    id: Name
    plugin: OptionalText = None


class EventRetry(Request, verb="event.retry", role="operator", recorded=True, result=ChangedEvent):
    """Try deliveries of an event that wait for their next attempt at once, each in its place in its key's order."""

    id: Name
    plugin: OptionalText = None


class EventSkip(Request, verb="event.skip", role="operator", recorded=True, result=ChangedEvent):
    """Pass an event over: its waiting deliveries, or that of one plugin, end as skipped, and their keys go on."""

    id: Name
    plugin: OptionalText = None


class EventCancel(Request, verb="event.cancel", role="operator", recorded=True, result=ChangedEvent):
    """Cancel an event (every delivery of it that is not final), or a recovery job: what it has queued stays."""

    id: Name


class EventRecover(Request, verb="event.recover", role="operator", recorded=True, result=Recovery):
    """Begin a job that queues what a plugin has missed, or was given up there, since a Unix time, at ``rate`` a second.

    Without ``dead`` and ``missed`` it is both. With ``dry_run`` only the plan is returned.
    """

    plugin: Name
    since: Annotated[float, Number(LARGEST)]
    dead: Annotated[bool, Flag()] = False
    missed: Annotated[bool, Flag()] = False
    rate: Annotated[float, Number(10_000.0)] = 20.0
    dry_run: Annotated[bool, Flag()] = False


class EventJobs(Request, verb="event.jobs", role="viewer", result=RecoveryJobs):
    """List the recovery jobs, those that ended too, the newest first."""


# The audit trail


class FollowedTrail(TypedDict):
    """``after``: the record before the first that is sent; ``last``: the newest record at this moment."""

    after: int
    last: int


class AuditFollow(Request, verb="audit.follow", role="viewer", recorded=True, result=FollowedTrail):
    """Follow the trail after record ``after``, or from its last ``lines`` records on, as ``audit.records``."""

    after: Annotated[int | None, Whole(LARGEST)] = None
    lines: Annotated[int, Whole(MAX_RECORDS)] = 0


class AuditSearch(Request, verb="audit.search", role="viewer", recorded=True, result=Nothing):
    """Search the trail: what is found follows as ``audit.found``, the last of which has ``more`` false.

    Times are as in the trail; a type may end in ``.*``; ``limit`` keeps the newest (0: all). ``story`` is the beginning
    of an event's id, and finds everything that the event caused; it stands alone.
    """

    plugin: OptionalText = None
    types: Annotated[list[str] | None, Texts()] = None
    event: OptionalText = None
    since: OptionalText = None
    until: OptionalText = None
    limit: Annotated[int, Whole(100_000)] = 0
    story: OptionalText = None

    def wanted(self) -> dict[str, Any]:
        """The parameters as plain data."""
        return dict(self.__dict__)


# Plugins


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
    """Whether the plugin is paused now, and whether that is a change."""

    paused: bool
    changed: bool


class ListedPlugin(PluginEntry):
    """One plugin with its queue's length and the state of its worker.

    ``last`` and ``failing_since`` (Unix time of the first of the failed attempts in a row) are those of this host
    process; ``next_attempt`` is the Unix time at which the earliest delivery that waits for its retry is due.
    ``attempts_ended`` counts since this host process started; ``latency_p99_us`` is exceeded by one of a hundred of the
    newest attempts (256 at most). ``caps``: bytes of ``memory``, thousandths of a core (``cpu``), ``tasks``.
    """

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
    mode: str
    hooks: list[str]
    config: list[ConfigItem]
    missing: list[str]
    stderr: list[str]
    held_by: str | None
    """The event whose retry is next; later ones of its key wait for it."""
    log_bytes_dropped: int


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
    hooks: Annotated[list[str] | None, Texts()] = None
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
    """Stop a plugin and forget it with its config and its queue; takes a ticket."""

    name: Name
    ticket: OptionalText = None


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


# Config


class ConfigItems(TypedDict):
    items: list[ConfigItem]


class ConfigChange(TypedDict):
    restarted: bool


class Reencrypted(TypedDict):
    values: int


class ConfigList(Request, verb="config.list", role="viewer", result=ConfigItems):
    """List a plugin's config: keys, types and values, but never the value of a secret."""

    name: Name


class ConfigSet(Request, verb="config.set", role="operator", recorded=True, result=ConfigChange):
    """Set values of a plugin's config, and restart the plugin if it runs."""

    name: Name
    config: Config = field(default_factory=dict, repr=False)


class ConfigUnset(Request, verb="config.unset", role="operator", recorded=True, result=ConfigChange):
    """Forget a value of a plugin's config, and restart the plugin if it runs."""

    name: Name
    key: Name


class ConfigRotateKey(Request, verb="config.rotate_key", role="operator", recorded=True, result=Reencrypted):
    """Encrypt every plugin's config with a new key."""


# The daemon


class ServiceEntry(TypedDict):
    """One of the daemon's processes; ``ended``: how the one before it ended, empty if none has."""

    name: str
    pid: int | None
    up: bool
    starts: int
    ended: str


class Trail(TypedDict):
    """The audit trail; ``last`` is null while it cannot be read."""

    last: int | None
    pending: int
    blocked: str | None


class DaemonStatus(TypedDict):
    """The daemon at a glance; ``failing``, ``waiting`` and ``paused`` name plugins.

    ``services`` is empty while S is away.
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
    """The daemon's generation: 1 at its start, one more with each reload; why the last one was refused, if it was."""

    generation: int
    version: str
    refused: str


class ReloadBegun(TypedDict):
    generation: int


class Reload(Request, verb="daemon.reload", role="operator", recorded=True, result=ReloadBegun):
    """Have the daemon execute the program that is installed, in place; returns the generation that comes of it."""


class DaemonGeneration(Request, verb="daemon.generation", role="viewer", result=Reloaded):
    """Return the daemon's generation, and why the last reload was refused, if it was."""


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


# Tools of MCP servers


class Tools(TypedDict):
    """Name, instructions and tools of an MCP server, as one caller may see them."""

    name: str
    server: str
    """The server's name for itself."""
    instructions: str
    tools: list[dict[str, Any]]


class CalledTool(TypedDict):
    """The end of a call: the server's result or its error; ``id`` is that of ``audit story``."""

    id: str
    result: NotRequired[dict[str, Any]]
    error: NotRequired[dict[str, Any]]


class ComparedTool(TypedDict):
    """A tool, or with an empty name the server's instructions.

    ``state``: ``approved``, ``new``, ``changed`` or ``missing``; ``granted``: whether ``[grant] tools`` names it.
    """

    name: str
    state: str
    sha256: str
    renamed: str
    granted: bool
    body: dict[str, Any]


class ComparedTools(TypedDict):
    digest: str
    tools: list[ComparedTool]


class ApprovedTools(TypedDict):
    approved: int


class McpOpen(Request, verb="mcp.open", role="caller", result=Tools):
    """Return the approved tools of an MCP server that the caller may use; starts it if need be."""

    name: Name


class McpCall(Request, verb="mcp.call", role="caller", repeatable=True, result=CalledTool):
    """Call a tool; ``call`` names the call among those of this user, for ``mcp.cancel`` and ``mcp.progress``."""

    name: Name
    tool: Name
    arguments: Annotated[dict[str, Any], Object("arguments", "must be an object")] = field(default_factory=dict)
    call: Annotated[str, Text(128)]
    progress: Annotated[bool, Flag()] = False


class McpCancel(Request, verb="mcp.cancel", role="caller", result=Nothing):
    """Give up a call of this user's; its ``mcp.call`` is answered with an error."""

    call: Annotated[str, Text(128)]


class McpTools(Request, verb="mcp.tools", role="operator", result=ComparedTools):
    """Compare what an MCP server offers with what is approved; starts it if need be."""

    name: Name


class McpApprove(Request, verb="mcp.approve", role="operator", recorded=True, result=ApprovedTools):
    """Approve what an MCP server offers now; ``digest`` (from ``mcp.tools``) makes sure that it is what was shown."""

    name: Name
    digest: Name


# Notifications to the caller


class McpProgress(TypedDict):
    """Progress of a call, as far as the server reports it."""

    call: str
    progress: float
    total: NotRequired[float]
    message: NotRequired[str]


class AuditRecords(TypedDict):
    """Lines of the trail, byte for byte."""

    lines: list[str]


class AuditFound(TypedDict):
    """Lines of the trail that a search found, byte for byte; ``error``, in the last, why it did not come to its end."""

    lines: list[str]
    more: bool
    error: dict[str, Any] | None


class LogLine(TypedDict):
    """A line of a plugin's log."""

    time: str
    run: str | None
    stream: str
    line: str


NOTIFICATIONS: dict[str, type[Any]] = {
    "api.call": ApiCall,
    "audit.records": AuditRecords,
    "audit.found": AuditFound,
    "log": LogLine,
    "mcp.progress": McpProgress,
}

_NOUNS = ("event", "api", "audit", "plugin", "config", "daemon")
"""The order in which verbs are listed; those of other nouns, and without one, come last."""


def verbs() -> dict[str, type[Request]]:
    """The request types by verb."""

    def place(verb: str) -> int:
        noun = verb.partition(".")[0]
        return _NOUNS.index(noun) if noun in _NOUNS else len(_NOUNS)

    found = {request.spec.verb: request for request in Request.__subclasses__()}
    return {verb: found[verb] for verb in sorted(found, key=place)}


def listing() -> dict[str, dict[str, Any]]:
    """The verbs as plain data, for documents and for tests of clients.

    Each has ``summary`` (one sentence), ``about`` (all of it), ``role``, ``recorded``, ``params`` (by key: JSON Schema
    and ``required``) and ``result`` (by key: whether it is always there).
    """
    return {
        verb: {
            "summary": (request.__doc__ or "").partition("\n")[0],
            "about": inspect.cleandoc(request.__doc__ or ""),
            "role": request.spec.role,
            "recorded": request.spec.recorded,
            "params": {p.key: {"schema": p.kind.schema(), "required": p.required} for p in request.parameters()},
            "result": result_keys(request.spec.result),
        }
        for verb, request in verbs().items()
    }


def result_keys(result: type[Any]) -> dict[str, bool]:
    """The keys of an answer, each with whether it is always there."""
    hints = get_type_hints(result, include_extras=True)
    return {key: get_origin(hint) is not NotRequired for key, hint in hints.items()}
