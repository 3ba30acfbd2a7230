"""State of a supervisor that crosses its exec (isolator.supervisor.reload): what the kernel does not keep by itself.

An exec keeps the process and its open descriptors, so a descriptor crosses as its number. No secret of a plugin
crosses: no value of an environment, no file of a config. Times are those of the monotonic clock, which an exec does not
change.

Each type belongs to the class that hands it over and takes it over again (``hand_over`` and ``adopt``). A change of any
of them is a new format (isolator.supervisor.reload.formats).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field, fields
from typing import Any

from isolator.ipc.body import Body, Json, omitted
from isolator.ipc.messages import FoundEntry, Origin, PluginState
from isolator.ipc.succession import DESCRIPTOR, SenderState


class LayerState(Body):
    """A layer of a running cage, as its own verbs understand it."""

    name: str
    values: Json
    fds: dict[str, int] = field(metadata=DESCRIPTOR)


class CageState(Body):
    """A cage that runs."""

    pid: int
    pidfd: int = field(metadata=DESCRIPTOR)
    status: int = field(metadata=DESCRIPTOR)
    """the pipe's end on which pid 1 reports"""
    oom: int = field(metadata=DESCRIPTOR)
    """v1: the eventfd of the memory group; -1: none"""
    oom_seen: bool
    started: float
    """time of the sidecar's exec"""
    layers: tuple[LayerState, ...]


class RunState(Body):
    """A run."""

    id: str
    uid: int
    gid: int
    cage: CageState
    directory: int = field(metadata=DESCRIPTOR)
    stdout: int = field(metadata=DESCRIPTOR)
    stderr: int = field(metadata=DESCRIPTOR)
    listener: int = field(metadata=DESCRIPTOR)
    """of its denied calls; -1: none"""
    drift: int = field(metadata=DESCRIPTOR)
    """reports changes of its network's rules; -1: none"""
    started_at: str
    began: float
    forced_cause: str
    origin: Origin
    reached: bool
    ready: bool
    """its socket has been there"""
    shown: dict[str, tuple[int, ...]]
    """device and inode of each path that it is shown"""
    usage: Json
    port: int | None = omitted(default=None)
    """where on its own loopback it listens"""
    streams: dict[str, int] = field(default_factory=dict, metadata=DESCRIPTOR)
    """this end of its stdin and stdout, if the host speaks to it over these"""


class InvocationState(Body):
    """An invocation."""

    run: RunState
    deadline: float
    """when it is stopped"""


class FenceState(Body):
    """A plugin's deadline."""

    until: float
    """seconds of CLOCK_BOOTTIME"""
    frozen: float | None
    """on that clock, when its cages were frozen, if they are"""


class PluginKept(Body):
    """A plugin, running or not."""

    name: str
    state: PluginState
    error: str
    notice: str
    outdated: str
    wanted: bool
    reason: str
    """of the start that comes next or was the last"""
    restarts: int
    ends: tuple[float, ...]
    others_ends: int
    crashes: tuple[float, ...]
    backoff_until: float | None
    effective: Json | None
    """JSON of `EffectivePolicy`"""
    run: RunState | None
    invocations: tuple[InvocationState, ...] = omitted(default=())
    fence: FenceState | None = omitted(default=None)


class ChannelState(Body):
    """An end of a channel to another process of the daemon."""

    socket: int = field(metadata=DESCRIPTOR)
    calls: int
    """the number of the last call"""
    held: tuple[Json, ...]
    """requests that have come and were not begun"""


class ServiceState(Body):
    """A service that runs."""

    name: str
    pid: int
    starts: int
    generations: int
    """processes so far, by which their leaves are numbered"""
    leaf: str
    channel: ChannelState


class AuditState(Body):
    """The links to the audit process."""

    client: SenderState
    sources: dict[str, int] = field(metadata=DESCRIPTOR)
    made_for: dict[str, int]


class TicketState(Body):
    """An open ticket."""

    token: str
    uid: int
    connection: int = field(metadata=DESCRIPTOR)
    until: float | None = omitted(default=None)
    """when it expires"""


class TicketsState(Body):
    """The supervisor's own socket."""

    listener: int = field(metadata=DESCRIPTOR)
    open: tuple[TicketState, ...]


class StagedState(Body):
    """A plugin that was shown to an operator who has not agreed yet; its copy stays where it is."""

    staged: Json
    """`Staged`, without the manifest, which is in the copy"""
    source: Json
    """`Source`"""
    update: bool
    """it is a newer version of a registered one"""
    by: str | None
    faults: tuple[str, ...]
    shown: str
    """digest of the policy that was shown"""


class RunnerState(Body):
    """A run of a user's."""

    id: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    """of the caller"""
    connection: int = field(metadata=DESCRIPTOR)
    """to the caller"""
    cage: CageState
    effective: Json
    """JSON of `EffectivePolicy`"""
    lease: int
    """uid of the cage"""
    lock: int = field(metadata=DESCRIPTOR)
    """holds that uid"""
    listener: int = field(metadata=DESCRIPTOR)
    """of its denied calls; -1: none"""
    theirs: tuple[int, ...] = field(metadata=DESCRIPTOR)
    """what the caller has sent, to be closed apart"""
    shown: tuple[str, ...]
    """denied calls that the caller was shown"""


class RunnersState(Body):
    """The runs of users, and the socket for them."""

    listener: int = field(metadata=DESCRIPTOR)
    waiting: tuple[int, ...] = field(metadata=DESCRIPTOR)
    """connections that have not sent their request yet"""
    runs: tuple[RunnerState, ...]
    theirs: tuple[int, ...] = field(metadata=DESCRIPTOR)
    """what callers that have their answer had sent, to be closed apart"""


class SubtreeState(Body):
    """The daemon's own control groups."""

    unified: str
    v1: dict[str, str]
    on_v2: tuple[str, ...]
    blkio: str | None
    cpuset: str | None


class DaemonState(Body):
    """A whole daemon at rest."""

    version: str
    generation: int
    began: float
    """when it began to come to rest"""
    journal: int = field(metadata=DESCRIPTOR)
    """holds the lock on the root"""
    launcher: int = field(metadata=DESCRIPTOR)
    """-1: there is none, nor a plugin, nor runs"""
    launcher_pid: int
    subtree: SubtreeState
    plugins: tuple[PluginKept, ...]
    services: tuple[ServiceState, ...]
    audit: AuditState
    tickets: TicketsState
    alarms: dict[str, str]
    found: tuple[FoundEntry, ...]
    staged: tuple[StagedState, ...] = omitted(default=())
    runners: RunnersState | None = omitted(default=None)
    alarm_ends: dict[str, float] = field(default_factory=dict)
    """when those of the alarms end whose cause is over"""
    control_opens: float | None = omitted(default=None)
    """until when only users with a role may connect to the control socket"""


def descriptors(body: Body) -> Iterator[int]:
    """Every descriptor that a state names."""
    body.to_json()  # its class is a dataclass from here on
    for one in fields(body):  # type: ignore[arg-type]
        value = getattr(body, one.name)
        if one.metadata.get("descriptor"):
            several = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
            yield from (fd for fd in several if fd >= 0)
        else:
            yield from _within(value)


def _within(value: Any) -> Iterator[int]:
    if isinstance(value, Body):
        yield from descriptors(value)
    elif isinstance(value, tuple):
        for one in value:
            yield from _within(one)
