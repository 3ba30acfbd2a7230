"""H → S: the host to the supervisor."""

from __future__ import annotations

from typing import Any

from isolator.ipc.body import Body, Json, Request, omitted
from isolator.ipc.messages.plugins import PluginEntry
from isolator.ipc.messages.to_host import Environment


class Running(Body):
    """A run in state `running`."""

    run: str
    pid: int


class RaiseAlarm(Request[None], op="alarm"):
    """Keep an alarm for the next H, too: this one ends, or has found something that a person has to know."""

    line: str


class ShutOut(Request[None], op="control.shut"):
    """Let nobody without a role connect to the control socket for a while: such users flood it."""

    uid: int
    """the one that connected last"""


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


class RunOf(Body):
    """A run of a plugin."""

    name: str
    run: str


class Connected(Body):
    """The connections that could be made at once."""

    answers: tuple[Any, ...]
    """of each run in their order: whether there is a connection, or the error with which it is refused"""


class ConnectRuns(Request[Connected], op="run.connect_many"):
    """Connect to the sockets of many sidecars, without waiting for any: `run.connect` is for those that have to be.

    Reply's descriptors: the connected stream sockets
    """

    runs: tuple[RunOf, ...]
    """64 at most"""


class LentSocket(Body):
    """A sidecar's socket file."""

    changed_ns: int
    """its `st_ctime_ns`: once it has another, the descriptor is of no use any more"""


class LendSocket(Request[LentSocket], op="run.socket"):
    """Open a sidecar's socket file for H, which may connect to it from then on without asking, as long as it is the
    same. An error if it is being replaced; `run.connect` is for whatever cannot be reached this way.

    Reply's descriptors: the socket file (O_PATH)
    """

    name: str
    run: str


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
    environment: Environment | None = omitted(default=None)
    """its config; without it S asks for that"""


class BreakOff(Request[None], op="run.break_off"):
    """Break off every `run.ensure` and `run.connect` that is not answered, each with an error: H leaves, and nobody
    would use a connection that is made from now on. Served after `leave`. An `invocation.start` that is not answered
    goes on, and the next host gets `invocation.begun`."""


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


class HoldPlugin(Request[None], op="fence.hold"):
    """Let a plugin act until a time, which each later one moves; from the first on it is bound to one. A notification:
    S freezes its cages at that time by its own clock, thaws them when it is moved on, and tells B."""

    name: str
    until: float
    """seconds of CLOCK_BOOTTIME; one that has passed: let it not act"""


class FreePlugin(Request[None], op="fence.free"):
    """Bind a plugin to no time any more. A notification."""

    name: str


class LosePlugin(Request[None], op="fence.lost"):
    """Kill the cages of a plugin, frozen as they are, and start none until `fence.hold`. A notification."""

    name: str


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
    since: float = omitted(default=0.0)
    """of the supervisor: Unix time of its start, which a reload leaves as it is"""


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


class Outdated(Body):
    """A service whose process is one of before the last reload, or does not serve yet."""

    name: str
    refused: str
    """why it could not be exchanged, and goes on; empty while that is still to come"""


class OutdatedServices(Body):
    """Services that the last reload has not exchanged."""

    services: tuple[Outdated, ...]


class ListOutdated(Request[OutdatedServices], op="daemon.outdated"):
    """Return the services that the last reload has not exchanged, or not yet."""
