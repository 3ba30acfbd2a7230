"""Handlers of the ``mcp`` verbs: users call tools of MCP servers, operators see and approve them.

The room of MCP is loaded with the first of these calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from host.control import mcp_types
from host.control.elsewhere import Elsewhere
from host.control.endpoints import Caller, Verbs, serves
from host.control.terms import Nothing
from host.plugins.registry import Registry

if TYPE_CHECKING:
    from host.mcp.servers import Servers


_RUNS_THERE = "its server runs there alone"
_REMEDY = "see isolator mcp tools {0} --json on {{}}; isolator mcp approve {0} --from FILE approves that here"


class McpVerbs(Verbs):
    """Tools of MCP servers; ``servers`` loads the room."""

    def __init__(self, servers: Callable[[], Servers], registry: Registry, elsewhere: Elsewhere | None = None) -> None:
        self._servers, self._registry, self._elsewhere = servers, registry, elsewhere or Elsewhere()

    @serves(mcp_types.McpOpen)
    async def open(self, request: mcp_types.McpOpen, caller: Caller) -> mcp_types.Tools:
        self._elsewhere.check(request.name, _RUNS_THERE)
        instructions, tools, server = await self._servers().shown_to(request.name, caller.uid)
        return {
            "name": request.name, "server": server, "instructions": instructions, "tools": [dict(t) for t in tools],
        }  # fmt: skip

    @serves(mcp_types.McpCall)
    async def call(self, request: mcp_types.McpCall, caller: Caller) -> mcp_types.CalledTool:
        def report(progress: Mapping[str, Any]) -> None:
            if caller.drained.is_set():  # whoever does not read misses some
                caller.notify("mcp.progress", {"call": request.call, **progress})

        self._elsewhere.check(request.name, _RUNS_THERE)
        answer = await self._servers().call(
            request.name, request.tool, request.arguments, caller.uid, request.call,
            report if request.progress else None,
        )  # fmt: skip
        return cast(mcp_types.CalledTool, answer)

    @serves(mcp_types.McpCancel)
    async def cancel(self, request: mcp_types.McpCancel, caller: Caller) -> Nothing:
        self._servers().cancel(caller.uid, request.call)
        return {}

    @serves(mcp_types.McpTools)
    async def tools(self, request: mcp_types.McpTools, _: Caller) -> mcp_types.ComparedTools:
        if request.tools is None:
            self._elsewhere.check(request.name, _RUNS_THERE, _REMEDY.format(request.name))
        found, digest = await self._servers().inspect(request.name, request.tools)
        granted = self._servers().granted(request.name)
        return {
            "digest": digest,
            "tools": [
                {
                    "name": one.item.name, "state": one.state, "sha256": one.item.digest, "renamed": one.renamed,
                    "granted": granted(one.item.name), "body": dict(one.item.body),
                }
                for one in found
            ],
        }  # fmt: skip

    @serves(mcp_types.McpApprove)
    async def approve(self, request: mcp_types.McpApprove, caller: Caller) -> mcp_types.ApprovedTools:
        if request.tools is None:
            self._elsewhere.check(request.name, _RUNS_THERE, _REMEDY.format(request.name))
        approved = await self._servers().approve(request.name, request.digest, caller.by, request.tools)
        return {"approved": len(approved)}
