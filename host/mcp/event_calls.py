"""Events as calls of tools, and the outcomes that the answers mean."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from host.channel.reply import Outcome
from host.mcp import template
from host.plugins.manifest import ToolCall
from host.wire import mcp as protocol


def call_of(call: ToolCall, payload: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of ``tools/call`` for an event with this payload."""
    return {"name": call.tool, "arguments": template.fill(call.arguments, payload)}


def outcome_of(reply: tuple[protocol.Answer, bytes]) -> Outcome:
    """The outcome of an attempt."""
    answer, data = reply
    judged = protocol.judge(answer)
    text, size, digest = data.decode("utf-8", "replace"), len(data), hashlib.sha256(data).hexdigest()
    if judged.verdict == "ok":
        return Outcome("ok", "ok", None, text, size, digest)
    if judged.verdict in ("input_required", "refused"):
        return Outcome("rejected", judged.verdict, judged.detail, text, size, digest)
    return Outcome("failed", judged.verdict, judged.detail, text, size, digest)
