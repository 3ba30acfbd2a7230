"""S → H: the supervisor to the host."""

from __future__ import annotations

from dataclasses import field

from isolator.ipc.body import Body, Json, Request, omitted
from isolator.ipc.messages.plugins import Origin, PluginEntry, PluginState


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
    fences: dict[str, float] = field(default_factory=dict)
    """by plugin that is bound to one, the time of CLOCK_BOOTTIME until which it may act"""


class AlarmsChanged(Request[None], op="alarms"):
    """Show these alarms of S's from now on."""

    alarms: tuple[str, ...]


class GiveUp(Request[None], op="give.up"):
    """Give what this host holds in its cluster to other hosts: S stops, and has ended every cage. Answered when the log
    has it, or does not take it in time."""


class ServeCallers(Request[None], op="serve.callers"):
    """Serve the control socket: all that waited while H took another's place has been sent before."""


class PluginChanged(Request[None], op="plugin.changed"):
    """Take over a plugin's new state, or forget a plugin."""

    plugin: PluginEntry | None = omitted(default=None)
    removed: str | None = omitted(default=None)
    """its name, in place of `plugin`"""


class PluginTurned(Request[None], op="plugin.turned"):
    """Take over a plugin's state: nothing else of its entry has changed since H was told of it."""

    name: str
    state: PluginState
    error: str
    run: str | None
    pid: int | None
    started_at: str | None
    ready: bool
    restarts: int
    on_trial: bool
    lease: str = omitted(default="")


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


class InvocationBegun(Request[None], op="invocation.begun", fds=range(4)):
    """The answer to an `invocation.start` whose sender has left meanwhile: an invocation has begun, or not.

    Descriptors: those of that answer
    """

    name: str
    run: str
    failed: str = omitted(default="")
    """why its program cannot be executed"""
    refused: str = omitted(default="")
    """why it was not begun"""


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
