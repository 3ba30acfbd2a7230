"""Records of tools of MCP servers."""

from __future__ import annotations

from typing import Literal

from isolator.audit.schema.base import HOST, RecordData, Summed


class _Tool(RecordData):
    tool: str
    uid: int
    """User that called it."""
    arguments_sha256: str
    """Of their canonical JSON."""


class ToolStarted(_Tool, type="tool.started", sources=(HOST,)):
    """A user's call of an MCP tool begins: its first byte is sent after this record. Its `event_id` is the call's."""


class ToolCalled(
    _Tool,
    type="tool.called",
    sources=(HOST,),
    summed=Summed("`outcome` denied", by="tool", covers=lambda data: data.get("outcome") == "denied", by_caller=True),
):
    """A user's call of an MCP tool has ended, or was denied."""

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


class ToolsApproved(RecordData, type="tools.approved", sources=(HOST,)):
    """What an MCP server offers was approved."""

    by: str
    """``uid:N`` of the caller."""
    tools: dict[str, str]
    """SHA-256 of each tool's description by its name, and of the server's ``instructions``."""
