"""Every message between the daemon's processes: one type a request, with the type of its reply.

The tables of docs/internals.md are generated from this file: an operation's meaning is its class's docstring (a line
that begins with ``Descriptors:`` or ``Reply's descriptors:`` names those that travel beside it), a field's is the text
below it.

Policies travel as JSON (of ``EffectivePolicy``, ``NetworkPolicy``, ``HostConfig``): the receiver that enforces one
reads it with ``isolator.policy``, and the audit process never loads that.
"""

from __future__ import annotations

from dataclasses import field
from enum import StrEnum
from typing import Any, Self, cast

from isolator.ipc.body import Body, Json, Request, omitted


class PluginState(StrEnum):
    """State of a plugin. ``pending``: found, not approved yet; ``rejected``: its manifest or policy is of no use."""

    PENDING = "pending"
    REJECTED = "rejected"
    DISABLED = "disabled"
    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    FAILED = "failed"


OUT_OF_MEMORY = "out of memory"
"""Cause of the end of a run whose cage was out of memory."""


class Origin(StrEnum):
    """Whose doing the end of a run was. Only the plugin's own counts against it and against its events."""

    PLUGIN = "plugin"
    OPERATOR = "operator"
    DAEMON = "daemon"


class PluginEntry(Body):
    """A plugin as the host and the command line see it: ``RegisteredEntry`` or ``FoundEntry``."""

    name: str
    version: str
    digest: str
    state: PluginState
    error: str = ""
    run: str | None = None
    pid: int | None = None
    uid: int | None = None
    started_at: str | None = None
    restarts: int = 0
    effective: Json | None = None
    """JSON of `EffectivePolicy`"""
    effective_digest: str | None = None
    manifest: Json | None = None
    """the parsed JSON object, at most 64 KiB; a larger one comes with `plugin.stage` only"""

    @classmethod
    def from_json(cls, data: object, where: str) -> Self:
        """Read an entry of either kind."""
        if cls is not PluginEntry:
            return super().from_json(data, where)
        kind = FoundEntry if isinstance(data, dict) and "found" in data else RegisteredEntry
        return cast(Self, kind.from_json(data, where))


class PendingVersion(Body):
    """A version that waits for approval."""

    version: str
    digest: str
    differences: tuple[str, ...]
    """what it asks for beyond the version in use"""


class RegisteredEntry(PluginEntry):
    """A registered plugin."""

    binary: str | None = None
    """path of a binary that is registered where it is"""
    previous: tuple[str, ...] = ()
    """digests of earlier versions, the latest first"""
    pending: PendingVersion | None = None
    ready: bool = False
    """the socket of its run has been there"""
    on_trial: bool = False
    """the version in use is new and being watched"""
    source: str = ""
    source_files: str = omitted(default="")
    """the folder that was registered beside a binary"""
    source_packaged: bool = omitted(default=False)
    """whether the source is a package"""
    signer: str = omitted(default="")
    """the publisher who has signed the version in use"""


class FoundEntry(PluginEntry):
    """A plugin in a folder of `plugin_dirs`: no run, uid or effective policy; state `pending` or `rejected`."""

    found: str
    """its folder"""


# --- every service, when another process takes its place -----------------------------------------------------------


class Left(Body):
    """What a process has done before another takes its place."""

    parts: int = 0
    """how many `state.part` it has sent"""
    refused: str = ""
    """why it stays: nothing of it has changed"""


class Leave(Request[Left], op="leave"):
    """Hand everything on to another process that takes this one's place, and end with the channel. This form, and that
    of the answer, never change."""


class StatePart(Request[None], op="state.part", fds=range(1, 61)):
    """Pass on a part of the state that the old process hands to the new one: S sends the same to that one, and answers
    when that has it. This form never changes.

    Descriptors: those of the state, in their order; the first of the first part is a sealed memfd with its JSON
    """

    number: int
    """from 0"""


# --- S → A ---------------------------------------------------------------------------------------------------------


class AuditReady(Body):
    """State of the trail as it was found."""

    blocked: str | None
    """why nothing can be written"""
    ended: bool
    """whether the trail tells of the stop of the daemon before"""
    runs: dict[str, str]
    """by run that has no end in the trail, its plugin: S records the end of those it did not start"""


class AuditHello(Request[AuditReady], op="hello"):
    """The first message."""

    root: str
    config: Json
    """JSON of `HostConfig`"""
    parts: int = omitted(default=0)
    """how many `state.part` have come: A takes the place of another, and goes on with that one's state"""


class RecordSource(Request[None], op="source", fds=range(1, 2)):
    """Read records from another process.

    Descriptors: a SOCK_SEQPACKET end
    """

    name: str
    """`supervisor`, `broker` or `host`"""


class Flush(Request[None], op="flush"):
    """Answered when everything received so far is on disk."""


class ServeMetrics(Request[None], op="metrics", fds=range(1, 65)):
    """Serve Prometheus figures.

    Descriptors: listening sockets (Unix, TCP)
    """


# --- S → B ---------------------------------------------------------------------------------------------------------


class BrokerHello(Request[None], op="hello"):
    """The first message; answered when the host's addresses are known."""

    root: str
    config: Json
    """JSON of `HostConfig`"""
    parts: int = omitted(default=0)
    """how many `state.part` have come: B takes the place of another, and goes on with that one's state"""


class AttachCage(Request[None], op="cage.attach", fds=range(65)):
    """Serve a cage's network.

    Descriptors: TCP v4, TCP v6, DNS UDP, DNS TCP listeners and the NFLOG socket, all made inside the cage's network
    namespace; then a listener of the host's for each of the policy's `listen` rules, in their order
    """

    run: str
    plugin: str
    policy: Json
    """JSON of `NetworkPolicy`"""


class DetachCage(Request[None], op="cage.detach"):
    """Close a cage's listeners and flows; answered after its `net.closed` records are sent."""

    run: str


class NewAuditSocket(Request[None], op="audit.source", fds=range(1, 2)):
    """Record to a new audit process.

    Descriptors: the new audit end
    """


# --- B → S ---------------------------------------------------------------------------------------------------------


class CageSockets(Request[None], op="cage.sockets"):
    """Make sockets for connections into a cage, to the ports that `listen` rules name; refused without such a rule.

    Reply's descriptors: unconnected TCP sockets made inside the cage's network
    """

    run: str
    count: int
    """at most 16"""
    version: int
    """4 or 6"""


# --- S → W ---------------------------------------------------------------------------------------------------------


class ConsoleHello(Request[None], op="hello", fds=range(3)):
    """The first message to the console (W); answered when it serves.

    Descriptors, unless they are in the state: the listener of its socket, and that of its port if there is one
    """

    root: str
    config: Json
    """JSON of `HostConfig`"""
    secrets: dict[str, tuple[str, ...]]
    """those of each ingress, by its name"""
    parts: int = omitted(default=0)
    """how many `state.part` have come: W takes the place of another"""


# --- S → H ---------------------------------------------------------------------------------------------------------


class HostHello(Request[None], op="hello", fds=range(3)):
    """The first message; answered when commands and events are accepted.

    Descriptors: the control socket's listener, unless that is in the state; a file with the JSON of `plugins` when it
    is too long for a message
    """

    root: str
    config: Json
    """JSON of `HostConfig`"""
    plugins: tuple[PluginEntry, ...] | None
    """null: in the second descriptor"""
    fresh: bool = False
    """the daemon has just started: H starts what is eager"""
    alarms: tuple[str, ...] = ()
    """those that S has"""
    parts: int = omitted(default=0)
    """how many `state.part` have come: H takes the place of another, and goes on with that one's state"""


class AlarmsChanged(Request[None], op="alarms"):
    """Show these alarms of S's from now on."""

    alarms: tuple[str, ...]


class ServeCallers(Request[None], op="serve.callers"):
    """Serve the control socket: all that waited while H took another's place has been sent before."""


class PluginChanged(Request[None], op="plugin.changed"):
    """Take over a plugin's new state, or forget a plugin."""

    plugin: PluginEntry | None = omitted(default=None)
    removed: str | None = omitted(default=None)
    """its name, in place of `plugin`"""


class Environment(Body):
    """Config of a plugin as its run gets it."""

    env: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """by name of each file of its config, the text"""
    apart: bool = False
    """`files` are in the descriptor"""
    secrets: tuple[str, ...] = ()
    """names of the variables that hold secrets"""


class GetEnvironment(Request[Environment], op="run.environment"):
    """Return a plugin's config for a start.

    Reply's descriptors: a sealed memfd with the JSON of `files` when that is too long for a message
    """

    name: str


class RunStarted(Request[None], op="run.started", fds=range(3, 4)):
    """A sidecar runs.

    Descriptors: read ends of stdout and stderr, the listener of its host API
    """

    name: str
    run: str
    pid: int


class DrainRun(Request[None], op="run.stopping"):
    """Drain a run before a graceful stop: send it nothing new, wait for its replies, send `shutdown` to a stream
    plugin that speaks it. S waits 3 s at most, then comes SIGTERM."""

    name: str
    run: str
    reason: str


class RunEnded(Request[None], op="run.ended"):
    """A run has ended."""

    name: str
    run: str
    exit_code: int | None
    signal: int | None
    cause: str
    origin: Origin
    """whose doing it was"""
    expected: bool
    uptime: float
    state: PluginState
    """the plugin's state after it"""
    retry_in: float | None
    """seconds until it is started again"""


class InvocationEnded(Request[None], op="invocation.ended"):
    """An invocation has ended, and nothing of it is left. Its time has gone by, or it was stopped, if `cause` is
    neither `exit` nor `signal`."""

    name: str
    run: str
    exit_code: int | None
    signal: int | None
    cause: str
    origin: Origin
    """whose doing it was"""


class StderrTail(Body):
    """End of a run's stderr."""

    stderr: tuple[str, ...] = ()
    """the last lines, redacted"""


class GetStderrTail(Request[StderrTail], op="run.last_words"):
    """Return the end of an ended run's stderr; S waits 1 s for it."""

    name: str
    run: str


# --- H → S ---------------------------------------------------------------------------------------------------------


class Running(Body):
    """A run in state `running`."""

    run: str
    pid: int


class RaiseAlarm(Request[None], op="alarm"):
    """Keep an alarm for the next H, too: this one ends, or has found something that a person has to know."""

    line: str


class EnsureRun(Request[Running], op="run.ensure"):
    """Start a plugin unless it runs; waits for a start in progress and for back-off. An error if it is `failed`,
    `disabled`, `pending` or `rejected`."""

    name: str
    reason: str = "event"
    """`operator`: start it although it is `failed`, and without waiting for the back-off"""


class ConnectRun(Request[None], op="run.connect"):
    """Connect to a sidecar's socket.

    Reply's descriptors: a connected stream socket; of an `mcp` sidecar two, which are its stdin and its stdout: once in
    each run
    """

    name: str
    run: str
    deadline: float = 10
    """seconds"""


class InvocationStarted(Body):
    """An invocation that runs, or whose program cannot be executed."""

    pid: int = omitted(default=0)
    failed: str = omitted(default="")
    """why it cannot be"""


class StartInvocation(Request[InvocationStarted], op="invocation.start", fds=range(1, 2)):
    """Run the program of a plugin with the mode `exec` once, in a cage of its own.

    Descriptors: a sealed memfd, its standard input

    Reply's descriptors: the listener of its host API, read ends of stdout and stderr
    """

    name: str
    run: str
    """ten random hexadecimal digits"""
    event: str
    type: str
    attempt: int


class BreakOff(Request[None], op="run.break_off"):
    """Break off every `run.ensure` and `run.connect` that is not answered, each with an error: H leaves, and nobody
    would use a connection that is made from now on. Served after `leave`."""


class RunReady(Request[None], op="run.ready"):
    """An `mcp` sidecar has answered its first request: it is up, as others are with their socket."""

    name: str
    run: str


class StopRun(Request[None], op="run.stop"):
    """Stop a plugin's run; the next event starts it again."""

    name: str
    reason: str = "asked"


class RestartRun(Request[Running], op="run.restart"):
    """Stop and start a plugin."""

    name: str
    reason: str = "restart"


class Staged(Body):
    """A plugin that was copied and read, with what an operator is shown of it."""

    token: str
    name: str
    digest: str
    synthesised: bool
    proposal: Json
    registered: bool
    differences: tuple[str, ...]
    """what it asks for beyond the version in use"""
    unchanged: bool
    files: int = 0
    size: int = 0
    """bytes that were copied"""
    faults: tuple[str, ...] = ()
    """of its files on this host, a sentence each"""
    signer: str = omitted(default="")
    """the publisher who has signed it"""


class StagePlugin(Request[Staged], op="plugin.stage"):
    """Copy and read a plugin; nothing is registered yet.

    Reply's descriptors: plugin.json, open for reading
    """

    path: str = omitted(default="")
    """the name of its folder or package; or the next four"""
    name: str = omitted(default="")
    binary: str = omitted(default="")
    hooks: tuple[str, ...] = omitted(default=())
    files: str = omitted(default="")
    update: str | None = omitted(default=None)
    """the registered name that it is a newer version of; the rest may be left out then: as the last one"""
    ticket: str | None = omitted(default=None)
    """with which the caller has handed it over; may be missing for a folder that the supervisor has found"""


class OnePlugin(Body):
    """A registered plugin after a change."""

    plugin: PluginEntry


class CommitPlugin(Request[OnePlugin], op="plugin.commit"):
    """Register what was staged; an error if the name is registered."""

    token: str
    ticket: str | None = omitted(default=None)
    """the kernel's word for who agrees"""


class DiscardPlugin(Request[None], op="plugin.discard"):
    """Forget what was staged."""

    token: str


class UpdatedPlugin(OnePlugin):
    """A registered plugin after an update."""

    unchanged: bool = omitted(default=False)
    pending: bool = omitted(default=False)
    """it asks for more, and waits for approval"""
    differences: tuple[str, ...] = omitted(default=())


class UpdatePlugin(Request[UpdatedPlugin], op="plugin.update"):
    """Exchange the version in use for the staged one; an error when that did not come up, and the version before is in
    use again."""

    token: str
    ticket: str | None = omitted(default=None)
    """the kernel's word for who agrees"""
    approve: bool = False
    """take it over also if it asks for more"""


class RejectPlugin(Request[OnePlugin], op="plugin.reject"):
    """Refuse the version that waits for approval."""

    name: str
    ticket: str | None = omitted(default=None)
    """the kernel's word for who asks"""


class RollBackPlugin(Request[OnePlugin], op="plugin.rollback"):
    """Exchange the version in use for the one before; an error as above."""

    name: str
    to: str | None = omitted(default=None)
    """version or digest (or its beginning) of a version that is kept, instead of the one before"""
    ticket: str | None = omitted(default=None)
    """the kernel's word for who asks"""


class ApprovePlugin(Request[OnePlugin], op="plugin.approve"):
    """Take a pending version or a changed binary into use, or write a policy file that is missing."""

    name: str
    ticket: str | None = omitted(default=None)
    """the kernel's word for who asks"""
    digest: str | None = omitted(default=None)
    """that of the version that was shown; an error if another one waits now"""


class RemovePlugin(Request[None], op="plugin.remove"):
    """Stop a plugin and delete everything of it."""

    name: str
    ticket: str | None = omitted(default=None)
    """the kernel's word for who asks"""


class EnablePlugin(Request[OnePlugin], op="plugin.enable"):
    """Let a plugin run; clears `failed` too."""

    name: str
    ticket: str | None = omitted(default=None)
    """the kernel's word for who asks; may be missing for one that is not disabled"""


class DisablePlugin(Request[OnePlugin], op="plugin.disable"):
    """Stop a plugin and keep it stopped."""

    name: str


class Plugins(Body):
    """Every plugin, without `manifest` and `effective`."""

    plugins: tuple[PluginEntry, ...]


class ListPlugins(Request[Plugins], op="plugin.status"):
    """Return every plugin with live figures."""


class Proposal(Body):
    """Request, grant and effect of a plugin."""

    proposal: Json


class ExplainPolicy(Request[Proposal], op="policy.explain"):
    """Return the proposal of a plugin as of now; of the version that waits for approval if there is one."""

    name: str


class ServiceEntry(Body):
    """One of the daemon's processes: whether it answers, how often it was started, how the one before ended."""

    name: str
    pid: int | None
    up: bool
    starts: int
    ended: str


class Services(Body):
    """The daemon's processes."""

    services: tuple[ServiceEntry, ...]


class ListServices(Request[Services], op="services"):
    """Return the daemon's processes."""


class Ledger(Body):
    """Controls of this host."""

    ledger: tuple[Json, ...]


class GetLedger(Request[Ledger], op="ledger"):
    """Return the controls of this host."""


class Reloading(Body):
    """A reload that has begun."""

    generation: int
    """the daemon's when it has come through"""


class ReloadDaemon(Request[Reloading], op="daemon.reload"):
    """Execute the program that is installed, in place; an error while another reload is under way."""


class Generation(Body):
    """State of the daemon's reloads."""

    version: str
    """the supervisor's"""
    generation: int
    """1 at its start, one more after each reload"""
    refused: str
    """why the last reload was refused"""


class GetGeneration(Request[Generation], op="daemon.generation"):
    """Return the daemon's generation."""


DIRECTIONS: dict[str, tuple[type[Request[Any]], ...]] = {
    "S → A": (AuditHello, RecordSource, Flush, ServeMetrics),
    "S → B": (BrokerHello, AttachCage, DetachCage, NewAuditSocket),
    "B → S": (CageSockets,),
    "S → W": (ConsoleHello,),
    "S ↔ old and new": (Leave, StatePart),
    "S → H": (
        HostHello, AlarmsChanged, ServeCallers, PluginChanged, GetEnvironment, RunStarted, DrainRun, RunEnded,
        InvocationEnded,
        GetStderrTail, NewAuditSocket,
    ),
    "H → S": (
        RaiseAlarm, EnsureRun, ConnectRun, BreakOff, RunReady, StartInvocation, StopRun, RestartRun, StagePlugin,
        CommitPlugin, DiscardPlugin, UpdatePlugin, RejectPlugin, RollBackPlugin, ApprovePlugin, RemovePlugin,
        EnablePlugin, DisablePlugin, ListPlugins, ExplainPolicy, ListServices, GetLedger, ReloadDaemon, GetGeneration,
    ),
}  # fmt: skip
"""Every request by sender and receiver: supervisor, audit, broker, host, console (W)."""
