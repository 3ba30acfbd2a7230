"""State of a host on its way to another that takes its place: one type, of the types of those that hand something on.

Whoever changes one of them, in whatever way, raises ``HOST_STATE``: another version's state is not read, and the
process starts as after a crash.
"""

from __future__ import annotations

from host.control.server import ControlState
from host.delivery.worker import WorkerState
from host.host_api import ApiListenerState
from host.lifecycle import StartState
from host.plugins.logs import LogState
from isolator.audit.client import SenderState
from isolator.ipc.body import Body, Json

HOST_STATE = 2


class HostState(Body):
    """Everything that a host knows and neither its database nor the supervisor does."""

    version: int = HOST_STATE
    audit: SenderState
    workers: tuple[WorkerState, ...]
    logs: tuple[LogState, ...]
    api: tuple[ApiListenerState, ...]
    api_calls: int
    """the number of the newest call that the platform was sent"""
    control: ControlState
    starts: tuple[StartState, ...]
    mcp: Json | None
    """`ServersState` of `host.mcp.servers`, if there is an MCP server"""
