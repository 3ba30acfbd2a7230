"""State of a host on its way to another that takes its place: one type, of the types of those that hand something on.

Whoever changes one of them, in whatever way, makes the next format of it.
"""

from __future__ import annotations

from host.control.server import ControlState
from host.delivery.worker import WorkerState
from host.host_api.api import ApiListenerState
from host.lifecycle.lifecycle import StartState
from host.plugins.logs import LogState
from isolator.ipc.body import Body, Json
from isolator.ipc.formats import Formats
from isolator.ipc.succession import SenderState


class HostState(Body):
    """Everything that a host knows and neither its database nor the supervisor does."""

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


def _settled(body: Json) -> Json:
    """Format 2: pings and what is greeted are cut off unanswered, and nobody reads from what is being started."""

    def worker(one: Json) -> Json:
        session, modes = one["session"], one["modes"]
        if "exec" in modes:
            runs = [{key: run[key] for key in run if key != "beginning"} for run in modes["exec"]["invocations"]]
            modes = {**modes, "exec": {"invocations": runs}}
        if "http" in modes:
            modes = {**modes, "http": {"posts": modes["http"]["posts"]}}
        oneshot = {key: one["oneshot"][key] for key in one["oneshot"] if key != "ping"}
        session = None if session is not None and "hello" in session else session
        return {**one, "oneshot": oneshot, "session": session, "modes": modes}

    mcp = body["mcp"]
    if mcp is not None:
        mcp = {**mcp, "sessions": {name: one for name, one in mcp["sessions"].items() if "hello" not in one}}
    return {**body, "workers": [worker(one) for one in body["workers"]], "mcp": mcp}


FORMATS = Formats(HostState, 3, up=lambda body: body, down=_settled)
