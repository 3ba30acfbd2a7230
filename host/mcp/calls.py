"""Calls of tools that are under way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from host.channel.reply import shown
from host.mcp.session import Reply
from host.wire import mcp as protocol
from isolator.audit.schema import ToolCalled
from isolator.errors import UnavailableError, UsageError
from isolator.ipc.body import Body

CALLS = 64
"""Calls of one user at a time, of all servers: each keeps its arguments here until it is sent."""


class CallState(Body):
    """A call of a caller's, as another host goes on with it; ``key`` is the caller's name for it."""

    plugin: str
    uid: int
    key: str
    number: str
    id: str
    tool: str
    arguments_sha256: str
    sent_ns: int


@dataclass(eq=False)
class Sent:
    """A call whose answer is awaited."""

    call: CallState
    run: str | None
    """That it was sent to; None: nobody knows any more."""
    reply: Reply
    given_up: bool = False
    """The caller has cancelled it."""
    awaited: bool = False
    """Its caller waits for the answer: not so until it has asked the host that took this one over."""

    def over(self, outcome: Any, detail: str | None) -> ToolCalled:
        """The record of a call that has come to an end; ``detail`` is fit to be shown."""
        call = self.call
        latency = (time.perf_counter_ns() - call.sent_ns) // 1000
        return ToolCalled(
            tool=call.tool, uid=call.uid, arguments_sha256=call.arguments_sha256, outcome=outcome, detail=detail,
            latency_us=latency,
        )  # fmt: skip


def keep_until_asked_for(
    calls: dict[tuple[int, str], Sent], sent: Sent, record: Callable[[Sent, str, str], None]
) -> None:  # fmt: skip
    """Keep a call of another host's for its caller, who asks again; one who has gone does not, and it is given up."""
    place = sent.call.uid, sent.call.key
    calls[place] = sent

    def drop() -> None:
        if calls.get(place) is sent and not sent.awaited:
            del calls[place]
            if not sent.reply.cancel():
                sent.reply.exception()  # nobody awaits that either
            record(sent, "cancelled", "the caller no longer waits")

    asyncio.get_running_loop().call_later(protocol.PATIENCE, drop)


def under_way(key: str) -> UsageError:
    return UsageError(f"call {key[:40]}", "is under way already", "give each call a key of its own")


def cancelled(tool: str) -> UnavailableError:
    return UnavailableError(f"tool {shown(tool, str, 80)}", "the call was cancelled")
