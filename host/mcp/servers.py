"""Servers that run, and the users who call their tools.

Every run of a server has one session, from its start on: events and callers share it. A caller is a uid that the
kernel names, which the policy's ``[grant] callers`` has; it is shown approved tools that ``[grant] tools`` names, and
can call these alone. Each call is in the trail before its first byte is sent, with an id like an event's.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from host.channel.reply import LostError, NotSentError, shown
from host.events import new_event_id
from host.fence.fences import Fences
from host.mcp.calls import CALLS, CallState, Sent, cancelled, keep_until_asked_for, under_way
from host.mcp.pins import Pins
from host.mcp.session import Progress, Reply, Session, SessionState
from host.mcp.sessions import Sessions
from host.mcp.tools import INSTRUCTIONS, Compared, Item, compare, digest_of, is_unchanged, offered, permits
from host.mcp.unended import end_of, unended
from host.plugins.registry import Plugin, Registry
from host.plugins.secrets import Redactor
from host.queue.owed import Debts
from host.wire import mcp as protocol
from isolator.audit.client import AuditClient
from isolator.audit.schema import ToolCalled, ToolsApproved, ToolStarted
from isolator.errors import DeniedError, IsolatorError, UnavailableError, UsageError, translated
from isolator.ipc.body import Body
from isolator.ipc.channel import Channel
from isolator.ipc.succession import Departure, Descriptors
from isolator.policy.model import canonical_json

MODE = "mcp"
_NO_SESSION = "its session has ended"


class ServersState(Body):
    """Every session and every call, on their way to another host."""

    sessions: dict[str, SessionState]
    """by plugin"""
    calls: tuple[CallState, ...]


class Servers(Sessions):
    """The servers of this host. ``use``: a context in which a plugin counts as busy; ``redactor``: a plugin's."""

    def __init__(
        self,
        supervisor: Channel,
        registry: Registry,
        audit: AuditClient,
        pins: Pins,
        redactor: Callable[[str], Redactor],
        use: Callable[[str], AbstractContextManager[None]],
        fences: Fences,
        debts: Debts,
    ) -> None:
        super().__init__(supervisor, registry, audit, redactor, fences)
        self.pins, self._use, self._debts = pins, use, debts
        self._calls: dict[tuple[int, str], Sent] = {}
        """By caller's uid and its key of the call."""
        self._starting: set[Sent] = set()
        """Calls that are on record, while that is not with the kernel and nothing of them is sent."""
        self._unsent: dict[tuple[int, str], asyncio.Task[Any]] = {}
        """Tasks whose calls wait for their server, likewise."""
        self.awaited: dict[str, Reply] = {}
        """The answers that events wait for, by the ids of requests that another host has sent."""

    def forget(self, name: str) -> None:
        """Forget a plugin that was removed."""
        self.pins.forget(name)

    # Tools

    async def inspect(
        self, name: str, bodies: list[dict[str, Any]] | None = None
    ) -> tuple[tuple[Compared, ...], str]:  # fmt: skip
        """Compare a server's tools with those that are approved; also the digest of what it offers now.

        ``bodies``: what was shown elsewhere takes the place of what it offers, and it is not asked.
        """
        now = await self._now(name, bodies)
        return compare(self.pins.of(name), now), digest_of(now)

    async def approve(
        self, name: str, digest: str, by: str, bodies: list[dict[str, Any]] | None = None
    ) -> tuple[Item, ...]:  # fmt: skip
        """Approve what ``inspect`` has shown, which has to be what there is now; raises UsageError when it is not."""
        now = await self._now(name, bodies)
        if digest_of(now) != digest:
            raise UsageError(f"tools of {name}", "have changed since they were shown", "look at them again")
        tools = {item.name or "instructions": item.digest for item in now}
        change = self._debts.of_plugin(name, lambda: ToolsApproved(by=by, tools=tools))
        with change:
            await self.pins.approve(name, now, change.note)
        return now

    async def _now(self, name: str, bodies: list[dict[str, Any]] | None) -> tuple[Item, ...]:
        self._server(name)
        if bodies is not None:
            return _items(name, bodies)
        with self._use(name):
            return tuple((await self._offers(name, await self.session(name), again=True)).values())

    async def shown_to(self, name: str, uid: int) -> tuple[str, list[Mapping[str, Any]], str]:
        """View of a caller: the instructions, the tools, and the server's name; raises IsolatorError."""
        self._admit(name, uid)
        with self._use(name):
            session = await self.session(name)
            now = await self._offers(name, session, again=True)
        usable = [item for item in self.pins.of(name) if is_unchanged(item, now.get(item.name))]
        granted = self.granted(name)
        tools = [item.body for item in usable if item.name != INSTRUCTIONS and granted(item.name)]
        texts = [str(item.body.get("instructions", "")) for item in usable if item.name == INSTRUCTIONS]
        assert session.greeting is not None
        return "".join(texts), tools, session.greeting.name

    async def _offers(self, name: str, session: Session, *, again: bool = False) -> Mapping[str, Item]:
        """The tools of a session's server (``Session.tools``); raises UnavailableError."""
        try:
            return await session.tools(again=again)
        except (NotSentError, LostError, ValueError) as error:
            why = self._shown(name, str(error))
            raise UnavailableError(f"tools of {name}", why, f"see 'isolator plugin logs {name}'") from None

    # Calls

    async def call(
        self, name: str, tool: str, arguments: Mapping[str, Any], uid: int, key: str, progress: Progress | None
    ) -> dict[str, Any]:
        """Call a tool for a user; returns ``{id, result}`` or ``{id, error}``. Raises IsolatorError when it is refused.

        ``key`` names the call among those of this user: one that another host has sent is awaited and not sent again.
        """
        sent = self._calls.get((uid, key))
        if sent is None:
            sent = await self._begin_call(name, tool, arguments, uid, key, progress)
        elif sent.awaited or (sent.call.plugin, sent.call.tool) != (name, tool):
            raise under_way(key)
        sent.awaited = True
        try:
            with self._use(name):
                answer, _ = await sent.reply
        except LostError as error:
            self._record(sent, "unknown", str(error))
            raise UnavailableError(f"tool {tool}", f"{error}; nobody knows what it has done") from None
        except NotSentError as error:
            self._record(sent, "not_sent", str(error))
            raise UnavailableError(f"tool {tool}", str(error), "try again") from None
        except asyncio.CancelledError:
            if (uid, key) in self._calls:  # not handed on
                self._record(sent, "cancelled", "the caller no longer waits")
            if sent.given_up:
                raise cancelled(tool) from None
            raise
        finally:
            self._calls.pop((uid, key), None)
        judged = protocol.judge(answer)
        self._record(sent, judged.verdict, judged.detail)
        if judged.verdict in ("input_required", "bad_reply"):
            return {"id": sent.call.id, "error": {"code": protocol.INTERNAL_ERROR, "message": judged.detail}}
        if answer.result is None:
            return {"id": sent.call.id, "error": dict(answer.error or {})}
        return {"id": sent.call.id, "result": dict(answer.result)}

    def cancel(self, uid: int, key: str) -> None:
        """Give up a call of a user's, if it is under way; one that was not sent yet never is."""
        if (sent := self._calls.get((uid, key))) is not None:
            sent.given_up = True
            sent.reply.cancel()
        elif (unsent := self._unsent.pop((uid, key), None)) is not None:
            unsent.cancel()

    def granted(self, name: str) -> Callable[[str], bool]:
        """Return the test whether the policy of a plugin grants a tool."""
        plugin = self._server(name)
        patterns = plugin.effective.tools if plugin.effective is not None else ()
        return lambda tool: permits(patterns, tool)

    async def _begin_call(
        self, name: str, tool: str, arguments: Mapping[str, Any], uid: int, key: str, progress: Progress | None
    ) -> Sent:
        """Send a call when its server can take it; ``cancel`` ends the wait for that."""
        if (uid, key) in self._unsent:
            raise under_way(key)
        if sum(one == uid for one, _ in (*self._calls, *self._unsent)) >= CALLS:
            raise UnavailableError(f"tool {shown(tool, str, 80)}", f"{CALLS} calls of uid {uid} are under way", "wait")
        task = asyncio.current_task()
        assert task is not None
        self._unsent[uid, key] = task
        try:
            with self._use(name):
                return await self._send(name, tool, arguments, uid, key, progress)
        except asyncio.CancelledError:
            if self._unsent.get((uid, key)) is not task:
                raise cancelled(tool) from None
            raise
        finally:
            if self._unsent.get((uid, key)) is task:
                del self._unsent[uid, key]

    async def _send(
        self, name: str, tool: str, arguments: Mapping[str, Any], uid: int, key: str, progress: Progress | None
    ) -> Sent:
        self._admit(name, uid)
        digest = hashlib.sha256(canonical_json(dict(arguments)).encode()).hexdigest()
        try:
            session = await self._allowed(name, tool, uid)
            while not session.has_slot:
                await session.slot(protocol.PATIENCE)
                session = await self._allowed(name, tool, uid)  # it may not be any more
        except DeniedError as error:
            denied = ToolCalled(
                tool=tool[:128], uid=uid, arguments_sha256=digest, outcome="denied", detail=error.why, latency_us=0
            )
            self._audit.record(denied, plugin=name, event_id=new_event_id(time.time()))
            raise
        except NotSentError as error:
            raise UnavailableError(f"tool {tool}", str(error), "try again") from None
        number, reply = session.new_id(), asyncio.get_running_loop().create_future()
        params = {"name": tool, "arguments": dict(arguments)}
        data = protocol.request(session.era, number, "tools/call", params, progress=progress is not None)
        if len(data) > protocol.MAX_LINE:
            raise UsageError(f"tool {tool}", f"its arguments are longer than {protocol.MAX_LINE} bytes")
        event_id = new_event_id(time.time())
        started = ToolStarted(tool=tool, uid=uid, arguments_sha256=digest)
        self._audit.record(started, plugin=name, run=session.run, event_id=event_id)
        call = CallState(
            plugin=name, uid=uid, key=key, number=number, id=event_id, tool=tool, arguments_sha256=digest,
            sent_ns=time.perf_counter_ns(),
        )  # fmt: skip
        sent = Sent(call, session.run, reply)
        await self._started(sent)
        self._calls[uid, key] = sent
        session.write(number, data, protocol.PATIENCE, reply, progress)
        return sent

    async def _started(self, sent: Sent) -> None:
        """Wait until the record of a call's start is with the kernel; one that is not sent then has its end there."""
        call = sent.call
        self._starting.add(sent)
        try:
            await self._audit.flushed()
            self._check_grant(call.plugin, call.tool, call.uid)  # the policy may be another by now
        except asyncio.CancelledError:
            if sent in self._starting:
                self._record(sent, "cancelled", "it was not sent yet")
            raise
        except IsolatorError as error:
            self._record(sent, "not_sent", error.why)
            raise
        finally:
            self._starting.discard(sent)

    async def _allowed(self, name: str, tool: str, uid: int) -> Session:
        """The session with a server of which a user may call a tool at this moment; raises IsolatorError."""
        self._check_grant(name, tool, uid)
        session = await self.session(name)
        offered = (await self._offers(name, session)).get(tool)
        self._check_grant(name, tool, uid)  # the policy may be another by now
        approved = next((item for item in self.pins.of(name) if item.name == tool), None)
        if offered is None or tool == INSTRUCTIONS:
            raise UsageError(f"tool {shown(tool, str, 80)}", f"is none of {name}", "list the tools again")
        if approved is None or not is_unchanged(approved, offered):
            why = "has changed since it was approved" if approved is not None else "is new and not approved"
            raise DeniedError(f"tool {tool}", why, f"isolator mcp approve {name}, if you trust it")
        return session

    def _check_grant(self, name: str, tool: str, uid: int) -> None:
        """Raise DeniedError unless the policy of a server lets the user call the tool."""
        self._admit(name, uid)
        if not self.granted(name)(tool):
            remedy = f'add "{shown(tool, str, 80)}" to tools in [grant] of policies/{name}.toml, to allow it'
            raise DeniedError(f"tool {shown(tool, str, 80)}", f"is not granted by the policy of {name}", remedy)

    def _admit(self, name: str, uid: int) -> None:
        plugin = self._server(name)
        if plugin.effective is None or uid not in plugin.effective.callers:
            why = f"its policy does not name uid {uid} as a caller"
            raise DeniedError(f"plugin {name}", why, f"add {uid} to callers in [grant] of policies/{name}.toml")

    def _server(self, name: str) -> Plugin:
        plugin = self._registry.need(name)
        if plugin.mode != MODE:
            raise UsageError(f"plugin {name}", f"is no MCP server: its mode is {plugin.mode}")
        return plugin

    def end_left(self, trail: Path) -> None:
        """Record the end of the calls that a host before this one, which was killed, has begun.

        ``trail``: the folder of the trail.
        """

        async def end() -> None:
            await self._audit.passed()  # what that process had handed over has its place
            for one in await asyncio.to_thread(unended, trail, self._audit.session):
                self._audit.record(end_of(one), plugin=one.plugin, run=one.run, event_id=one.event_id)

        self._tasks.run("calls of another host process", end())

    def _record(self, sent: Sent, outcome: Any, detail: str | None) -> None:
        plugin = sent.call.plugin
        record = sent.over(outcome, self._shown(plugin, detail) if detail else None)
        # With the kernel, on its way to the trail, before the caller has the answer.
        self._audit.record(record, plugin=plugin, run=sent.run, event_id=sent.call.id, urgent=True)

    # One host in the place of another

    @property
    def replied(self) -> bool:
        """Whether an answer is there, to the first request of a session or to a call, that is about to be handled."""
        calls = any(one.awaited and one.reply.done() for one in self._calls.values())
        return calls or any(session.opening.done() for session in self._greeted.values())

    def pass_on(self, departure: Departure) -> ServersState:
        """Hand every session on, with the calls that are in flight; those that are not sent are begun anew."""
        while self._starting:
            self._record(self._starting.pop(), "not_sent", "another host process takes over")
        calls = tuple(one.call for one in self._calls.values())
        self._calls.clear()
        sessions = {**self._sessions, **self._greeted}
        states = {name: session.leave(departure) for name, session in sessions.items() if session.lasts}
        return ServersState(sessions=states, calls=calls)

    async def take_over(self, state: ServersState, descriptors: Descriptors) -> None:
        """Go on with the sessions of another host; ``awaited`` has what events wait for.

        A request that no session brings along is lost: that was being stopped, or the request was not written yet.
        """
        loop = asyncio.get_running_loop()
        for name, one in state.sessions.items():
            plugin = self._registry.get(name)
            if plugin is None:
                continue
            session = self._new_session(plugin, one.run)
            awaited = {number: self.awaited.pop(number) for number in one.deadlines if number in self.awaited}
            for call in state.calls:
                if call.plugin == name and call.number in one.deadlines:
                    awaited[call.number] = loop.create_future()
                    keep_until_asked_for(self._calls, Sent(call, one.run, awaited[call.number]), self._record)
            with contextlib.suppress(OSError):
                await session.go_on(one, awaited, descriptors)
                if one.hello:
                    self._own(name, one.run, self._greet(name, session))
                else:
                    self._sessions[name] = session
        unanswered, self.awaited = self.awaited, {}
        for reply in unanswered.values():
            reply.set_exception(LostError(_NO_SESSION))
        for call in state.calls:
            if (call.uid, call.key) not in self._calls:  # not to be sent again, to another run
                lost = loop.create_future()
                lost.set_exception(LostError(_NO_SESSION))
                keep_until_asked_for(self._calls, Sent(call, None, lost), self._record)


def _items(name: str, bodies: list[dict[str, Any]]) -> tuple[Item, ...]:
    """The items with these bodies, as a server would offer them; raises UsageError for what none offers."""
    texts = [body["instructions"] for body in bodies if [*body] == ["instructions"]]
    with translated(ValueError, UsageError, f"tools of {name}", "", "take what 'isolator mcp tools --json' shows"):
        if len(texts) > 1 or not all(isinstance(text, str) for text in texts):
            raise ValueError("there is more than one text of instructions")
        return offered("".join(texts), (body for body in bodies if [*body] != ["instructions"]))
