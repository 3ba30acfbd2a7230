"""Calls of tools that are under way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from host.channel.reply import shown
from host.mcp.session import Reply
from host.wire import mcp as protocol
from isolator.audit.schema import ToolCalled
from isolator.errors import UnavailableError, UsageError
from isolator.ipc.body import Body

CALLS = 64
"""Calls of one user at a time, of all servers: each keeps its arguments here until it is sent."""


class CallState(Body):
    """A call of a caller's, on its way to another host."""

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

    plugin: str
    uid: int
    run: str | None
    """That it was sent to; None: nobody knows any more."""
    number: str
    id: str
    tool: str
    arguments_sha256: str
    sent_ns: int
    reply: Reply
    given_up: bool = False
    """The caller has cancelled it."""
    awaited: bool = False
    """Its caller waits for the answer: not so until it has asked the host that took this one over."""

    def pass_on(self, key: str) -> CallState:
        """Hand the call, which its caller knows by ``key``, to another host."""
        return CallState(
            plugin=self.plugin, uid=self.uid, key=key, number=self.number, id=self.id, tool=self.tool,
            arguments_sha256=self.arguments_sha256, sent_ns=self.sent_ns,
        )  # fmt: skip

    @classmethod
    def taken_over(cls, call: CallState, run: str | None, reply: Reply) -> Self:
        """Await ``reply`` to a call that another host has sent."""
        return cls(
            call.plugin, call.uid, run, call.number, call.id, call.tool, call.arguments_sha256, call.sent_ns, reply
        )  # fmt: skip

    def over(self, outcome: Any, detail: str | None) -> ToolCalled:
        """The record of a call that has come to an end; ``detail`` is fit to be shown."""
        return ToolCalled(
            tool=self.tool,
            uid=self.uid,
            arguments_sha256=self.arguments_sha256,
            outcome=outcome,
            detail=detail,
            latency_us=(time.perf_counter_ns() - self.sent_ns) // 1000,
        )


def keep_until_asked_for(
    calls: dict[tuple[int, str], Sent], key: str, sent: Sent, record: Callable[[Sent, str, str], None]
) -> None:
    """Keep a call of another host's for its caller, who asks again; one who has gone does not, and it is given up."""
    calls[sent.uid, key] = sent

    def drop() -> None:
        if calls.get((sent.uid, key)) is sent and not sent.awaited:
            del calls[sent.uid, key]
            if not sent.reply.cancel():
                sent.reply.exception()  # nobody awaits that either
            record(sent, "cancelled", "the caller no longer waits")

    asyncio.get_running_loop().call_later(protocol.PATIENCE, drop)


def under_way(key: str) -> UsageError:
    return UsageError(f"call {key[:40]}", "is under way already", "give each call a key of its own")


def cancelled(tool: str) -> UnavailableError:
    return UnavailableError(f"tool {shown(tool, str, 80)}", "the call was cancelled")
