"""Every message between the daemon's processes: one type a request, with the type of its reply; a module a direction.

The tables of docs/internals.md are generated from these files: an operation's meaning is its class's docstring (a line
that begins with ``Descriptors:`` or ``Reply's descriptors:`` names those that travel beside it), a field's is the text
below it.

Policies travel as JSON (of ``EffectivePolicy``, ``NetworkPolicy``, ``HostConfig``): the receiver that enforces one
reads it with ``isolator.policy``, and the audit process never loads that.
"""

# ruff: noqa: F403, F405  # all that these modules declare is a message, or a part of one

from __future__ import annotations

from typing import Any

from isolator.ipc.body import Request
from isolator.ipc.messages.audit import *
from isolator.ipc.messages.broker import *
from isolator.ipc.messages.console import *
from isolator.ipc.messages.from_host import *
from isolator.ipc.messages.plugins import *
from isolator.ipc.messages.succession import *
from isolator.ipc.messages.to_host import *

DIRECTIONS: dict[str, tuple[type[Request[Any]], ...]] = {
    "S → A": (AuditHello, RecordSource, Flush, ServeMetrics),
    "S → B": (BrokerHello, AttachCage, DetachCage, FencePlugin, NewAuditSocket),
    "B → S": (CageSockets,),
    "S → W": (ConsoleHello,),
    "S ↔ old and new": (ReadFormats, WriteFormat, Leave, StatePart),
    "S → H": (
        HostHello, AlarmsChanged, ServeCallers, PluginChanged, PluginTurned, GetEnvironment, RunStarted,
        DrainRun, RunEnded, InvocationBegun, InvocationEnded, GetStderrTail, NewAuditSocket,
        GiveUp,
    ),
    "H → S": (
        RaiseAlarm, ShutOut, EnsureRun, ConnectRun, ConnectRuns, LendSocket, BreakOff, RunReady,
        StartInvocation, StopRun, RestartRun, HoldPlugin, FreePlugin, LosePlugin, StagePlugin,
        CommitPlugin, DiscardPlugin, UpdatePlugin, RejectPlugin, RollBackPlugin, ApprovePlugin, RemovePlugin,
        EnablePlugin, DisablePlugin, ListPlugins, ExplainPolicy, ListServices, GetLedger, ReloadDaemon, GetGeneration,
        ListOutdated,
    ),
}  # fmt: skip
"""Every request by sender and receiver: supervisor, audit, broker, host, console (W)."""
