"""Verbs and answers about MCP servers and their tools."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, NotRequired, TypedDict

from host.control.parameters import Flag, ListOf, Object, Request, Text
from host.control.terms import Name, Nothing


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
    """Compare what an MCP server offers with what is approved; starts it if need be.

    With ``tools``, bodies that were shown elsewhere, these are compared, and the server is not asked: on a host of a
    cluster that does not hold the plugin it does not run. Instructions are a body with nothing else than them.
    """

    name: Name
    tools: Annotated[list[dict[str, Any]] | None, ListOf(dict)] = None


class McpApprove(Request, verb="mcp.approve", role="operator", recorded=True, result=ApprovedTools):
    """Approve what an MCP server offers now; ``digest`` (from ``mcp.tools``) makes sure that it is what was shown.

    ``tools`` are those that were given there.
    """

    name: Name
    digest: Name
    tools: Annotated[list[dict[str, Any]] | None, ListOf(dict)] = None


class McpProgress(TypedDict):
    """Progress of a call, as far as the server reports it."""

    call: str
    progress: float
    total: NotRequired[float]
    message: NotRequired[str]
