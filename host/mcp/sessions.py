"""Sessions with servers that run: each run has one, from its start on.

Events and callers share it (``host.mcp.servers``).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from host.channel.reply import NotSentError, shown
from host.fence.fences import Fences
from host.mcp.session import Session
from host.plugins.registry import Plugin, Registry
from host.plugins.secrets import Redactor
from host.wire import mcp as protocol
from isolator.audit.client import AuditClient
from isolator.audit.schema import PluginHealth
from isolator.errors import IsolatorError, UnavailableError, translated
from isolator.ipc.channel import Channel
from isolator.ipc.messages import ConnectRun, EnsureRun, RunReady, StopRun
from isolator.ipc.tasks import Tasks
from isolator.linux.descriptors import close_all

CLOSED_SECONDS = 2.0
"""Seconds in which a server whose output is closed has to end by itself."""
DRAIN_SECONDS = 2.0
"""Seconds that a server which is to stop has to answer what is in flight."""


class Sessions:
    """The sessions of this host. ``redactor``: a plugin's."""

    def __init__(
        self,
        supervisor: Channel,
        registry: Registry,
        audit: AuditClient,
        redactor: Callable[[str], Redactor],
        fences: Fences,
    ) -> None:
        self._supervisor, self._registry, self._audit = supervisor, registry, audit
        self._redactor, self._fences = redactor, fences
        self._sessions: dict[str, Session] = {}
        self._greeted: dict[str, Session] = {}
        """Sessions whose first request is not answered, by plugin."""
        self.connecting = 0
        """Sessions that are about to send it."""
        self._opening: dict[str, asyncio.Task[Session]] = {}
        """Tasks that open sessions, by run."""
        self._ends: dict[str, asyncio.Event] = {}
        """Events that are set once a run has ended whose session is over, by run."""
        self._finished: deque[str] = deque(maxlen=64)
        """Runs that have ended."""
        self._leaving = False
        self._tasks = Tasks()

    def run_started(self, name: str, run: str) -> None:
        """Open the session with a run."""
        if run not in self._opening and (name not in self._sessions or self._sessions[name].run != run):
            self._begin(name, run)

    def _begin(self, name: str, run: str) -> asyncio.Task[Session]:
        return self._own(name, run, self._open(name, run))

    def _own(self, name: str, run: str, opening: Coroutine[Any, Any, Session]) -> asyncio.Task[Session]:
        task = self._opening[run] = self._tasks.run(f"session with {name}", opening, expected=(IsolatorError,))
        return task

    async def _open(self, name: str, run: str) -> Session:
        await self._fences.of(name).opened()
        await self._stays()
        session = self._new_session(self._registry.need(name), run)
        try:
            await self._connect(name, session)
        except IsolatorError:
            await self._stays()
            raise
        if self._leaving:
            session.begin_to_leave()
        return await self._greet(name, session)

    async def _connect(self, name: str, session: Session) -> None:
        self.connecting += 1
        try:
            answer = await self._supervisor.ask_fds(ConnectRun(name=name, run=session.run))
            if len(answer.fds) != 2:
                close_all(answer.fds)
                raise UnavailableError(f"plugin {name}", "the supervisor sent no streams", "try again")
            stdin, stdout = (socket.socket(fileno=fd) for fd in answer.fds)
            answer.fds.clear()
            await session.connect(stdin, stdout)
        finally:
            self.connecting -= 1

    async def _greet(self, name: str, session: Session) -> Session:
        """Wait until a connected session is open, whichever host has begun it."""
        plugin = self._registry.need(name)
        patience = plugin.effective.restart.start_timeout if plugin.effective is not None else 10.0
        self._greeted[name] = session
        try:
            await session.greet(patience)
        except NotSentError as error:
            raise UnavailableError(f"plugin {name}", self._shown(name, str(error)), "see its log") from None
        finally:
            if self._greeted.get(name) is session:
                del self._greeted[name]
        self._sessions[name] = session
        await self._supervisor.ask(RunReady(name=name, run=session.run))
        return session

    async def session(self, name: str) -> Session:
        """The session with a server, which is started if need be; raises IsolatorError."""
        present = self._sessions.get(name)
        if present is not None and present.open:
            return present
        run = await self._ensure(name)
        if (end := self._ends.get(run)) is not None:  # its session is over before the supervisor knows
            with translated(TimeoutError, UnavailableError, f"plugin {name}", "its last run does not end", "try again"):
                await asyncio.wait_for(end.wait(), protocol.PATIENCE)
            run = await self._ensure(name)
        present = self._sessions.get(name)
        if present is not None and present.run == run and present.open:
            return present
        return await asyncio.shield(self._opening.get(run) or self._begin(name, run))

    async def _ensure(self, name: str) -> str:
        await self._stays()
        try:
            return (await self._supervisor.ask(EnsureRun(name=name))).run
        except IsolatorError:
            await self._stays()
            raise

    async def _stays(self) -> None:
        """Never return in a process that leaves: what waits for a server is begun again by the next one.

        A run's streams are handed out once. Who asks for them as it leaves would have them for nobody.
        """
        if self._leaving:
            await asyncio.Event().wait()

    def _ended(self, name: str, session: Session, why: str) -> None:
        if self._sessions.get(name) is session:
            del self._sessions[name]
        if session.run in self._finished:
            return
        end = self._ends[session.run] = asyncio.Event()
        if why:
            detail = f"protocol: {self._shown(name, why)}"
            self._audit.record(PluginHealth(ok=False, detail=detail), plugin=name, run=session.run)
            self._stop(name, session.run, end, "it broke the protocol")
        else:
            self._stop(name, session.run, end, "it has closed its output", patience=CLOSED_SECONDS)

    def _stop(self, name: str, run: str, end: asyncio.Event, reason: str, *, patience: float = 0.0) -> None:
        """Have a run stopped that does not ``end`` by itself within ``patience`` seconds."""

        async def stop() -> None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(end.wait(), patience)
            plugin = self._registry.get(name)
            if not end.is_set() and plugin is not None and plugin.run == run:
                await self._supervisor.ask(StopRun(name=name, reason=reason))

        self._tasks.run(f"stop of {name}", stop(), expected=(IsolatorError,))

    def run_ended(self, name: str, run: str) -> None:
        """Forget a run that is over."""
        self._opening.pop(run, None)  # one that is still under way fails by itself, for those who await it
        self._finished.append(run)
        session = self._sessions.get(name)
        if session is not None and session.run == run:
            session.close()
        end = self._ends.pop(run, None)
        if end is not None:
            end.set()

    async def drain(self, name: str, run: str) -> None:
        """Send a run nothing new, and return once nothing is unanswered."""
        session = self._sessions.get(name)
        if session is not None and session.run == run:
            del self._sessions[name]
            session.draining = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_SECONDS):
                    await session.settled()

    def close(self) -> None:
        """Let go of everything; the supervisor ends the servers."""
        for task in self._opening.values():
            task.cancel()
        for session in list(self._sessions.values()):
            session.close()

    def hold(self) -> None:
        """Read nothing from now on."""
        self._leaving = True
        for session in (*self._sessions.values(), *self._greeted.values()):
            session.begin_to_leave()

    def _new_session(self, plugin: Plugin, run: str) -> Session:
        assert plugin.manifest is not None
        name, era = plugin.name, plugin.manifest.transport.era
        return Session(run, era, lambda session, why: self._ended(name, session, why), self._fences.of(name))

    def _shown(self, name: str, text: str) -> str:
        return shown(text, self._redactor(name))
