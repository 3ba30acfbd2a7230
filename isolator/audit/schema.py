"""The records of the trail: one type each, with who may write it and the fields of its ``data``.

    audit.record(NetDenied(rule="port", name="example.org", port=25), plugin=name, run=run_id)

A type is a set of annotated fields; type checkers know its constructor from them. An instance is no more than the
``data`` of one record as it is written: the fields that were passed, in that order. A field declared ``= ABSENT`` may
be missing; ``None`` is written as ``null``. Thousands of records a second pass here, so nothing is checked at run time.

The writer's rule, the table in docs/audit.md and the JSON Schemas in docs/schemas/ follow from this file, and so does
the test that compares it with the trail of a daemon. A field's docstring is its description there. To add a record:
declare its type here, record it, and run ``python3 docs/generate``.

Sizes are in bytes; SHA-256 are 64 hex digits; ``*_us`` are microseconds; a *digest* is the SHA-256 of a plugin's files.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, dataclass_transform

AUDIT, BROKER, HOST, SUPERVISOR = "audit", "broker", "host", "supervisor"
"""The processes that write records, by the first part of ``origin``."""
SENDERS = (HOST, SUPERVISOR, BROKER)
"""Processes that send records to the writer, in the order in which it reads simultaneous ones."""

ApiVerdict = Literal["granted", "denied", "failed", "unknown", "limited"]

IDENTIFIERS = ("plugin", "run", "event_id", "delivery_id")
"""The keys of a record, beside those of ``data``, that its sender fills in; text or null."""
MAX_ID = 256
"""Longest identifier kept whole, in characters."""

ABSENT: Any = object()
"""Default of a field that a record may lack, and its value as an attribute of such a record."""


def _name_in_data(attribute: str) -> str:
    """The name of a field on disk: ``from`` is a keyword of Python's, its field is declared as ``from_``."""
    return attribute.rstrip("_")


class Field:
    """One field of a record: reads its value from ``data``."""

    def __init__(self, name: str, *, required: bool) -> None:
        self.name, self.required = name, required

    def __get__(self, record: RecordData | None, owner: type[RecordData]) -> Any:
        return self if record is None else record.data.get(self.name, ABSENT)


def _every(data: dict[str, Any]) -> bool:
    return True


@dataclass(frozen=True)
class Summed:
    """Records of a type that the writer counts, beyond the budget of their cause, instead of writing each.

    For what a plugin or a caller can repeat at will; never for what changes a plugin, its config or the daemon.
    """

    which: str
    """Clause of the documents: which records of the type."""
    by: str = ""
    """Field of ``data`` by whose values they are counted apart."""
    covers: Callable[[dict[str, Any]], bool] = _every
    by_caller: bool = False
    """Whether their cause is the ``uid`` in ``data``, and not the plugin."""


@dataclass_transform(eq_default=False, kw_only_default=True, frozen_default=True)
class RecordData:
    """Type and ``data`` of one record; base of all record types."""

    TYPE: ClassVar[str]
    SOURCES: ClassVar[tuple[str, ...]]
    """The processes that may write it."""
    CAUSED: ClassVar[bool] = False
    """Whether the writer adds the event in flight: ``event_id``, or, of several, ``event_ids`` in ``data``."""
    SUMMED: ClassVar[Summed | None] = None

    __slots__ = ("data",)

    def __init_subclass__(cls) -> None:
        for name in inspect.get_annotations(cls):
            setattr(cls, name, Field(_name_in_data(name), required=name not in cls.__dict__))

    def __init__(self, /, **data: Any) -> None:
        self.data = data

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.data})"


class _Range(RecordData):
    def __init__(self, /, **data: Any) -> None:
        super().__init__(**{_name_in_data(name): value for name, value in data.items()})


# --- the daemon ------------------------------------------------------------------------------------------------------


class HostStarted(RecordData):
    """The daemon accepts commands."""

    TYPE = "host.started"
    SOURCES = (SUPERVISOR,)

    version: str
    """Isolator's."""
    kernel: str
    python: str
    ledger: list[dict[str, Any]]
    """This host's controls, as ``isolator check --json`` prints them."""
    config: str | None
    """Path of host.toml; null when there is none."""
    config_sha256: str
    """Digest of the settings in force."""
    cleared: list[str]
    """Remains of an earlier daemon that were removed."""


class BackupTaken(RecordData):
    """A backup is made: all that is on record before this is in it, and nothing else."""

    TYPE = "backup.taken"
    SOURCES = (HOST,)

    id: str
    """The backup's."""
    uid: int
    """Caller."""


class BackupRestored(RecordData):
    """The daemon starts with the data of a backup: what came after that backup is not in this trail."""

    TYPE = "backup.restored"
    SOURCES = (SUPERVISOR,)

    id: str
    """The backup's; its ``backup.taken`` is in this trail if a daemon ran then."""
    taken: str
    """Time of the backup."""
    machine: str
    """Name of the host that it was taken on."""
    version: str
    """Isolator's, of then."""


class DaemonReloaded(_Range):
    """The supervisor has executed the program that is installed, in place; what ran goes on."""

    TYPE = "daemon.reloaded"
    SOURCES = (SUPERVISOR,)

    from_: str
    """Version of before."""
    to: str
    """Version of now."""
    adopted: int
    """Runs that went on."""
    seconds: float
    """Time in which nothing was begun."""
    generation: int
    """Number of the daemon's images so far."""
    config_sha256: str
    """Digest of the settings in force."""


class HostStopped(RecordData):
    """The daemon has stopped every plugin."""

    TYPE = "host.stopped"
    SOURCES = (SUPERVISOR,)

    seconds: float
    """Duration of the stop."""


class ServiceEnded(RecordData):
    """A process of the daemon's own, or work within the supervisor, ended by itself, or hung and was ended."""

    TYPE = "service.ended"
    SOURCES = (SUPERVISOR,)

    service: str
    """``audit``, ``broker``, ``host``, ``launcher``, or ``supervisor: `` and the work."""
    why: str
    hung: bool
    """Whether it was ended because it did not answer."""


class DatabaseDamaged(RecordData):
    """The host's database is not as it was left, or cannot be relied on any more."""

    TYPE = "database.damaged"
    SOURCES = (HOST,)

    why: str
    missing: int = ABSENT
    """Events that the trail has as accepted and the database does not have."""
    last: str = ABSENT
    """Id of the newest of them."""


class Resources(RecordData):
    """Use of one run: every ``snapshot_interval``, and once at its end."""

    TYPE = "resources"
    SOURCES = (SUPERVISOR,)

    tasks: int
    """Threads of all processes."""
    processes: int
    cpu_us: int = ABSENT
    """Processor time since the start."""
    user_us: int = ABSENT
    system_us: int = ABSENT
    throttled_us: int = ABSENT
    """Time that ``cpu`` of the policy kept it waiting."""
    throttled: int = ABSENT
    """Periods in which it was kept waiting."""
    memory: int = ABSENT
    memory_peak: int = ABSENT
    swap: int = ABSENT
    anonymous: int = ABSENT
    """Part of ``memory`` without a file behind it."""
    cached: int = ABSENT
    """Part of ``memory`` that caches files."""
    oom_kills: int = ABSENT
    """Processes killed because of ``memory`` of the policy."""
    tasks_peak: int = ABSENT
    pressure_cpu: float = ABSENT
    """Percent of the last 10 s in which a task waited for the processor."""
    pressure_memory: float = ABSENT
    """Percent of the last 10 s in which a task waited for memory."""
    pressure_io: float = ABSENT
    """Percent of the last 10 s in which a task waited for a disk."""
    threads: int = ABSENT
    """As of the last snapshot before the processes ended, like the fields that follow."""
    open_files: int = ABSENT
    io_read: int = ABSENT
    """Bytes read from disks."""
    io_written: int = ABSENT
    """Bytes written to disks."""
    network_bytes: int = ABSENT
    """Bytes sent inside the cage's network."""
    tcp_sockets: int = ABSENT
    state_free: int = ABSENT
    """Bytes that ``/state`` has room for."""
    state_files_free: int = ABSENT
    """Files that ``/state`` has room for."""
    tmp_free: int = ABSENT
    """Bytes that ``/tmp`` has room for; as of the last snapshot before the run ended, like the next."""
    tmp_files_free: int = ABSENT
    """Files that ``/tmp`` has room for."""


# --- plugins: versions -----------------------------------------------------------------------------------------------


class PluginAdded(RecordData):
    """A plugin was approved and registered."""

    TYPE = "plugin.added"
    SOURCES = (SUPERVISOR,)

    new: str
    """Digest."""
    version: str
    policy_sha256: str | None
    """Of the effective policy; null when the plugin is rejected."""
    who: str | None
    """``uid:N`` of the caller."""


class PackageResolved(RecordData):
    """A package was fetched from its registry, in a cage, and staged."""

    TYPE = "package.resolved"
    SOURCES = (HOST,)

    by: str
    """``uid:N`` of the caller."""
    package: str
    """``npm:NAME@VERSION`` or ``pypi:NAME==VERSION``."""
    digest: str
    """Of the folder that was made of it."""
    hashes: dict[str, str]
    """By ``NAME@VERSION`` of all that it consists of, the hash that the registry names; as the caller says."""


class PluginPending(RecordData):
    """A found plugin, or a version that asks for more than the one in use, waits for approval."""

    TYPE = "plugin.pending"
    SOURCES = (SUPERVISOR,)

    version: str
    folder: str = ABSENT
    """Place of a plugin that was found in a watched folder; the fields that follow are those of a version."""
    old: str = ABSENT
    """Digest in use."""
    new: str = ABSENT
    """Digest that waits."""
    differences: list[str] = ABSENT
    """Everything that it asks for beyond the version in use."""
    who: str | None = ABSENT
    """``uid:N`` of the caller."""


class PluginApproved(RecordData):
    """A waiting version, a changed binary or a policy was approved."""

    TYPE = "plugin.approved"
    SOURCES = (SUPERVISOR,)

    old: str
    """Digest in use."""
    new: str
    """Digest approved."""
    version: str
    binary_sha256: str | None
    """Of a binary that stays outside of the plugin's files."""
    differences: list[str]
    """Everything that it asks for beyond the version in use."""
    who: str | None
    """``uid:N`` of the caller."""


class _Exchanged(RecordData):
    old: str
    """Digest before."""
    new: str
    """Digest in use now."""
    version: str
    reason: str
    who: str | None
    """``uid:N`` of the caller, or ``the daemon``."""
    old_policy_sha256: str | None = ABSENT
    """Of the effective policy before."""
    policy_sha256: str | None = ABSENT
    """Of the effective policy now."""


class PluginUpdated(_Exchanged):
    """Another version is in use and came up."""

    TYPE = "plugin.updated"
    SOURCES = (SUPERVISOR,)


class PluginDeclined(RecordData):
    """A version that waited for approval was refused and is not kept."""

    TYPE = "plugin.declined"
    SOURCES = (SUPERVISOR,)

    new: str
    """Digest that waited."""
    version: str
    who: str
    """``uid:N`` of the caller."""


class PluginRolledBack(_Exchanged):
    """An earlier version is in use again: on demand, or because the new one did not come up."""

    TYPE = "plugin.rolled_back"
    SOURCES = (SUPERVISOR,)


class PluginRemoved(RecordData):
    """A plugin was stopped and removed with its state."""

    TYPE = "plugin.removed"
    SOURCES = (SUPERVISOR,)

    old: str
    """Digest."""
    who: str | None
    """``uid:N`` of the caller."""


class PluginRejected(RecordData):
    """A found plugin, or an edited policy, has an error."""

    TYPE = "plugin.rejected"
    SOURCES = (SUPERVISOR,)

    reason: str
    folder: str = ABSENT
    """Place of a plugin that was found in a watched folder; the fields that follow are those of a policy."""
    what: Literal["policy"] = ABSENT
    file: str = ABSENT
    """Path of the policy."""
    policy_sha256: str | None = ABSENT
    """Of the effective policy that stays in force; null when there is none."""


# --- plugins: runs ---------------------------------------------------------------------------------------------------


class CageStarted(RecordData):
    """A cage was built and its program runs; all that ``isolator run --audit`` tells of it."""

    TYPE = "plugin.started"

    pid: int
    """Of the cage's first process, on the host."""
    uid: int
    policy_sha256: str
    """Of the effective policy."""
    milliseconds: dict[str, float]
    """Duration of each step of the start."""
    degraded: list[str]
    """Keys of the controls that are not enforced in full."""


class PluginStarted(CageStarted):
    """A plugin's cage was built and its program runs."""

    SOURCES = (SUPERVISOR,)

    reason: str
    cgroup: str
    """Path of the control group."""
    digest: str
    binary_sha256: str | None
    """Of a binary that stays outside of the plugin's files."""
    env: list[str]
    """Names of the environment's variables."""
    ledger: dict[str, str]
    """By control, whether it is ``enforced``, ``degraded`` or ``missing``."""
    signer: str = ABSENT
    """Publisher of ``[trust]`` who has signed this version."""


class CageStopped(RecordData):
    """A program without a daemon has ended: ``isolator run --audit``."""

    TYPE = "plugin.stopped"

    exit_code: int | None
    signal: int | None
    cause: str
    seconds: float
    """Since the start."""
    oom_kills: int
    task_denials: int


class _Ended(RecordData):
    cause: str
    """``exit``, ``signal``, or in words why it was ended."""
    origin: str = ABSENT
    """Whose doing it was: ``plugin``, ``operator`` or ``daemon``. Only the first counts against the plugin."""
    exit_code: int | None = ABSENT
    signal: int | None = ABSENT
    """Number of the signal that killed it."""
    oom_kills: int = ABSENT
    """Processes killed because of ``memory`` of the policy."""
    task_denials: int = ABSENT
    """Forks refused because of ``tasks`` of the policy."""
    uptime: float = ABSENT
    """Seconds since the start."""


class _SidecarEnded(_Ended):
    stderr: list[str] = ABSENT
    """Last lines, redacted."""


class PluginStopped(_SidecarEnded):
    """A run ended because it was stopped, or with an earlier daemon: then only ``cause`` is known."""

    TYPE = "plugin.stopped"
    SOURCES = (SUPERVISOR,)


class PluginCrashed(_SidecarEnded):
    """A run ended by itself, or a start failed: then only ``cause`` and ``reason`` are there."""

    TYPE = "plugin.crashed"
    SOURCES = (SUPERVISOR,)
    CAUSED = True

    reason: str = ABSENT
    """Why a start failed."""


class ExecStarted(RecordData):
    """An invocation of a plugin with the mode `exec`: its cage was built, and the program runs for one event."""

    TYPE = "exec.started"
    SOURCES = (SUPERVISOR,)
    CAUSED = True

    attempt: int
    pid: int
    digest: str
    """Digest of the plugin's version."""
    policy_sha256: str
    milliseconds: float
    """From the beginning of the cage to the exec."""
    signer: str = ABSENT
    """Publisher of ``[trust]`` who has signed this version."""


class ExecEnded(_Ended):
    """An invocation ended, or could not be started: then only ``cause``, ``origin`` and ``reason`` are there."""

    TYPE = "exec.ended"
    SOURCES = (SUPERVISOR,)
    CAUSED = True

    reason: str = ABSENT
    """Why it could not be started."""
    cpu_us: int = ABSENT
    """Processor time."""
    memory_peak: int = ABSENT
    io_read: int = ABSENT
    io_written: int = ABSENT
    network_bytes: int = ABSENT


class RunStarted(CageStarted):
    """A runner's ``isolator run`` through the daemon: its cage was built, and its program runs.

    ``plugin`` of it and of all that follows is ``_run.UID``, by the caller's uid.
    """

    TYPE = "run.started"
    SOURCES = (SUPERVISOR,)

    by: str
    """Who asked, as the kernel says: ``uid:1000``. ``uid`` is the cage's own."""
    program: str
    cgroup: str
    """Path of the control group."""
    env: list[str]
    """Names of the environment's variables."""
    read: list[str]
    """Paths that it is shown."""
    write: list[str]
    """Folders that it may change."""


class RunEnded(_Ended):
    """A runner's run has ended, or could not be started: then only ``cause`` and ``reason`` are there."""

    TYPE = "run.ended"
    SOURCES = (SUPERVISOR,)

    by: str = ABSENT
    """Who asked, as the kernel says."""
    reason: str = ABSENT
    """Why a start failed."""


class PluginFailed(RecordData):
    """A plugin crashed too often."""

    TYPE = "plugin.failed"
    SOURCES = (SUPERVISOR,)

    reason: str
    """How the last run ended, and how often that was."""


class PluginQuarantined(RecordData):
    """A failed plugin is not started again by itself."""

    TYPE = "plugin.quarantined"
    SOURCES = (SUPERVISOR,)

    reason: str
    crashes: int
    seconds: float
    """Window in which the crashes were counted."""


class PluginPaused(RecordData):
    """A plugin is sent no events any more; they wait, and its sidecar stays as it is."""

    TYPE = "plugin.paused"
    SOURCES = (HOST,)

    by: str
    """``uid:N`` of the caller."""


class PluginResumed(PluginPaused):
    """A paused plugin is sent events again."""

    TYPE = "plugin.resumed"
    SOURCES = (HOST,)

    seconds: float
    """Length of the pause."""


class PluginHealth(RecordData):
    """A ping was missed or answered again, or the plugin broke a protocol."""

    TYPE = "plugin.health"
    SOURCES = (HOST,)
    SUMMED = Summed("all", by="ok")

    ok: bool
    latency_us: int = ABSENT
    """Duration of the ping."""
    misses: int = ABSENT
    """Pings missed in a row."""
    detail: str = ABSENT


# --- events ----------------------------------------------------------------------------------------------------------


class EventAccepted(RecordData):
    """An event and its deliveries are on disk."""

    TYPE = "event.accepted"
    SOURCES = (HOST,)

    event: str
    """Name of the event's type."""
    subject: str
    """Key within which events stay in order."""
    bytes: int
    """Size of the payload."""
    sha256: str
    """Of the payload."""
    plugins: list[str]
    """Plugins that it is delivered to."""
    by: str | None
    """``uid:N`` of the caller."""
    number: int = ABSENT
    """Number of the event in the queue; grows, with gaps. A queue that is restored from before is noticed by it."""
    on_behalf_of: str = ABSENT
    """The person for whom the caller emitted it, on the caller's word."""


class EventDispatched(RecordData):
    """An attempt begins: its first byte is sent after this record."""

    TYPE = "event.dispatched"
    SOURCES = (HOST,)
    SUMMED = Summed("after a reply of busy", covers=lambda data: "busy" in data)

    attempt: int
    """1 for the first."""
    queued_us: int | None
    """Time since the delivery was due; null when that is not known."""
    request_bytes: int
    request_sha256: str
    busy: int = ABSENT
    """Earlier requests of this delivery that were answered busy; such a reply is no attempt."""


class EventResponse(RecordData):
    """An attempt ended."""

    TYPE = "event.response"
    SOURCES = (HOST,)
    SUMMED = Summed("`outcome` busy", covers=lambda data: data.get("outcome") == "busy")

    attempt: int
    outcome: Literal["ok", "skipped", "retry", "busy", "rejected", "failed", "unknown"]
    status: str | None
    """The plugin's own."""
    detail: str | None
    """The plugin's reason, or the fault; redacted."""
    latency_us: int
    """Duration from request to reply."""
    response_bytes: int
    response_sha256: str | None
    response: str | None
    """First 4 KiB of the reply, redacted."""


class _GivenUp(RecordData):
    reason: str
    attempts: int


class EventDead(_GivenUp):
    """A delivery was given up."""

    TYPE = "event.dead"
    SOURCES = (HOST,)


class EventQuarantined(_GivenUp):
    """A delivery was given up because the plugin crashed of it."""

    TYPE = "event.quarantined"
    SOURCES = (HOST,)


class EventReplayed(_GivenUp):
    """A delivery was queued again on demand."""

    TYPE = "event.replayed"
    SOURCES = (HOST,)

    by: str
    """``uid:N`` of the caller."""


class EventRetried(RecordData):
    """A delivery that waited for its next attempt was tried at once, on demand."""

    TYPE = "event.retried"
    SOURCES = (HOST,)

    attempts: int
    """Attempts before."""
    by: str
    """``uid:N`` of the caller."""


class EventSkipped(EventRetried):
    """A delivery that waited was passed over on demand; later events of its key go on."""

    TYPE = "event.skipped"
    SOURCES = (HOST,)


class EventCancelled(EventRetried):
    """A delivery that waited was cancelled on demand, with all of its event's."""

    TYPE = "event.cancelled"
    SOURCES = (HOST,)


# --- tools -----------------------------------------------------------------------------------------------------------


class _Tool(RecordData):
    tool: str
    uid: int
    """User that called it."""
    arguments_sha256: str
    """Of their canonical JSON."""


class ToolStarted(_Tool):
    """A user's call of an MCP tool begins: its first byte is sent after this record. Its `event_id` is the call's."""

    TYPE = "tool.started"
    SOURCES = (HOST,)


class ToolCalled(_Tool):
    """A user's call of an MCP tool has ended, or was denied."""

    TYPE = "tool.called"
    SOURCES = (HOST,)

    outcome: Literal[
        "ok",
        "tool_error",
        "input_required",
        "refused",
        "error",
        "bad_reply",
        "unknown",
        "not_sent",
        "cancelled",
        "denied",
    ]
    """``refused``: by the server, which knows no such tool or not these arguments; ``denied``: by policy or pins."""
    detail: str | None
    """The server's reason, or the fault; redacted."""
    latency_us: int
    """Duration from request to answer."""


class ToolsApproved(RecordData):
    """What an MCP server offers was approved."""

    TYPE = "tools.approved"
    SOURCES = (HOST,)

    by: str
    """``uid:N`` of the caller."""
    tools: dict[str, str]
    """SHA-256 of each tool's description by its name, and of the server's ``instructions``."""


# --- network ---------------------------------------------------------------------------------------------------------


class _Net(RecordData):
    CAUSED = True
    SUMMED = Summed("all", by="rule")

    rule: str
    """The grant that allowed it, or the reason of a refusal."""
    various: Literal[True] = ABSENT
    """Many different ones with the same rule were counted together; the other fields are missing."""
    count: int = ABSENT
    """Number that this record stands for; 1 when missing."""


class NetQuery(_Net):
    """A plugin looked up a name."""

    TYPE = "net.query"
    SOURCES = (BROKER,)

    name: str | None = ABSENT
    type: str | None = ABSENT
    """Record type: ``A``, ``AAAA``, ..."""
    verdict: str = ABSENT
    """``allowed``, ``denied``, ``withheld`` (the name has no address that may be reached) or ``failed``."""


class NetConnect(_Net):
    """A connection was opened, or its other side could not be reached."""

    TYPE = "net.connect"
    SOURCES = (BROKER,)

    name: str | None = ABSENT
    """Name that the plugin looked up; null when it used an address."""
    address: str = ABSENT
    """Of the far end."""
    port: int = ABSENT
    direction: Literal["in"] = ABSENT
    """There for a connection from outside to a ``listen`` port."""
    cage_port: int = ABSENT
    """Port inside the cage of such a connection."""
    verdict: Literal["allowed", "failed"] = ABSENT
    flow: str = ABSENT
    """Identifies the connection in its ``net.closed``."""
    error: str = ABSENT
    """Why the other side could not be reached, such as ``econnrefused``; ``upstream``: its name was not resolved."""
    via: str = ABSENT
    """The proxy that it goes through; where that looks the name up, ``address`` is the one inside the cage."""


class NetClosed(RecordData):
    """A connection ended."""

    TYPE = "net.closed"
    SOURCES = (BROKER,)
    CAUSED = True
    SUMMED = Summed("all", by="name")

    name: str | None
    address: str
    port: int
    direction: Literal["in"] = ABSENT
    cage_port: int = ABSENT
    sent: int
    """Bytes from the plugin."""
    received: int
    """Bytes to the plugin."""
    duration_ms: float
    reason: str
    """``closed``, ``idle``, ``cage ended``, a refusal's rule, or an error such as ``econnreset``."""
    flow: str


class NetDenied(_Net):
    """A connection or packet was refused."""

    TYPE = "net.denied"
    SOURCES = (BROKER, SUPERVISOR)

    name: str | None = ABSENT
    """Name that the plugin looked up; null when it used an address."""
    address: str | None = ABSENT
    port: int | None = ABSENT
    direction: Literal["in"] = ABSENT
    cage_port: int = ABSENT
    protocol: str = ABSENT
    """``tcp``, ``udp``, ``icmp``, ..."""
    verdict: Literal["denied"] = ABSENT
    detail: str = ABSENT
    """In which way the first bytes were malformed."""
    asked: list[str] = ABSENT
    """Names in the first bytes, where they differ from ``name``."""
    why: str = ABSENT
    """Difference of the cage's ruleset from the one that was made (rule ``ruleset-changed``)."""


# --- denials, host API, control --------------------------------------------------------------------------------------


class SyscallDenied(RecordData):
    """A system call was refused."""

    TYPE = "syscall.denied"
    SOURCES = (SUPERVISOR,)
    CAUSED = True
    SUMMED = Summed("all", by="call")

    call: str
    count: int


class FsDenied(RecordData):
    """The daemon did not use a file that a plugin offered it."""

    TYPE = "fs.denied"
    SOURCES = (SUPERVISOR,)
    CAUSED = True
    SUMMED = Summed("all", by="path")

    path: str
    count: int
    why: str


class ApiCalled(RecordData):
    """A plugin called the host API."""

    TYPE = "api.called"
    SOURCES = (HOST,)
    CAUSED = True
    SUMMED = Summed("all", by="method")

    method: str
    """``connect`` for a refused connection, ``*`` for calls beyond the rate limit."""
    verdict: ApiVerdict
    permission: str | None = ABSENT
    """Permission that the method needs; null when none."""
    latency_us: int = ABSENT
    uid: int = ABSENT
    """User that was refused a connection."""
    count: int = ABSENT
    """Calls that were refused because of the rate limit."""


class ControlCalled(RecordData):
    """A verb of the control socket was called that changes something, or was denied."""

    TYPE = "control.called"
    SOURCES = (HOST,)
    SUMMED = Summed("`verdict` not ok", by="verb", covers=lambda data: data.get("verdict") != "ok", by_caller=True)

    verb: str
    uid: int
    """Of the caller, as the kernel tells it."""
    pid: int
    role: str | None
    verdict: str
    """``ok`` or the code of the error."""
    on_behalf_of: str = ABSENT
    """For whom the caller acted, as the caller says: recorded, and trusted by nobody."""


class ConfigChanged(RecordData):
    """A plugin's config or policy changed, or the stored config as a whole."""

    TYPE = "config.changed"
    SOURCES = (HOST, SUPERVISOR)

    names: list[str]
    """Keys, never values; ``policy`` for an edited policy."""
    file: str = ABSENT
    """Path of the policy."""
    old_policy_sha256: str | None = ABSENT
    """Of the effective policy before."""
    policy_sha256: str = ABSENT
    """Of the effective policy now."""
    rotated: int = ABSENT
    """Values that were encrypted with a new key."""
    lost: Literal[True] = ABSENT
    """The database is gone, and every value with it."""
    why: str = ABSENT
    by: str = ABSENT
    """``uid:N`` of the caller."""
    waits: bool = ABSENT
    """Whether the values belong to a version that waits for approval."""


class SecretInjected(RecordData):
    """Secrets were put into the environment of a start."""

    TYPE = "secret.injected"
    SOURCES = (HOST,)

    names: list[str]
    """Keys, never values."""


# --- the trail itself ------------------------------------------------------------------------------------------------


class AuditSeal(_Range):
    """A signature over all records since the seal before."""

    TYPE = "audit.seal"
    SOURCES = (AUDIT,)

    from_: int
    """First record that it covers."""
    to: int
    """Last record that it covers: the one before."""
    hash: str
    """Of the last record that it covers."""
    key: str
    """First 16 hex digits of the SHA-256 of the public key."""
    signature: str
    """Ed25519, in hex."""
    origins: dict[str, str]
    """By source, session and number of its last record."""
    runs: dict[str, str]
    """By run that has begun and not ended, its plugin."""


RETENTION = "retention"
"""``why`` of the gap that full files leave which are deleted because there are enough."""


class AuditGap(_Range):
    """Records were lost, refused, cut off or retired, or the trail's files were touched from outside."""

    TYPE = "audit.gap"
    SOURCES = (AUDIT, BROKER, HOST, SUPERVISOR)

    count: int | None
    """Records that are missing here; null when nobody knows."""
    why: str
    """``retention`` for full files that were deleted because there were enough."""
    source: str = ABSENT
    """Process whose records are missing."""
    bytes: int = ABSENT
    """Size of what was cut off."""
    sha256: str = ABSENT
    """Of what was cut off, or of the first line that was refused."""
    text: str = ABSENT
    """Beginning of it."""
    kept: str = ABSENT
    """Name of the file, beside the trail, that holds it."""
    found: dict[str, Any] = ABSENT
    """``seq`` and ``hash`` of the last record that was there."""
    written: dict[str, Any] = ABSENT
    """``seq`` and ``hash`` of the last record that had been written."""
    from_: int = ABSENT
    """First record that was retired."""
    to: int = ABSENT
    """Last record that was retired."""
    hash: str | None = ABSENT
    """Of the last record that was retired."""
    files: list[str] = ABSENT
    """Names of the files that were deleted."""


class AuditSummary(RecordData):
    """Records beyond the budget of their cause, counted instead of written; ``plugin`` names it if there is one."""

    TYPE = "audit.summary"
    SOURCES = (AUDIT,)

    type: str
    """Type of the records."""
    source: str
    """Process that sent the first of them."""
    count: int
    """Number of the records."""
    total: int = ABSENT
    """Number that they stand for, where some have a ``count`` of their own."""
    first: str
    """Time of the first."""
    last: str
    """Time of the last."""
    uid: int = ABSENT
    """Caller that caused them; missing also where many callers are counted together."""
    by: dict[str, int] = ABSENT
    """Their number by verb, method, rule, call, path or name; of many different ones the rest is ``other``."""


RECORDS: dict[str, type[RecordData]] = {
    kind.TYPE: kind
    for kind in list(globals().values())
    if isinstance(kind, type) and issubclass(kind, RecordData) and hasattr(kind, "SOURCES") and hasattr(kind, "TYPE")
}
"""Every record of the trail by its type, in the order of this file."""


def may_write(source: str, type: str) -> bool:
    """Whether the process ``source`` may write records of ``type``."""
    kind = RECORDS.get(type)
    return kind is not None and source in kind.SOURCES
