# SPDX-FileCopyrightText: Isolator contributors
# SPDX-License-Identifier: Apache-2.0
"""The client for asyncio: any number of tasks share one connection, and it comes back by itself.

Two kinds of tasks belong to an open client. The *keeper* reads the connection; when it ends, the keeper connects again,
with growing pauses, and goes on reading. A *worker* runs for each call of a plugin to a method that is served here, and
one for each new connection registers everything that had been registered on the one before.

The daemon forgets a connection's methods when it closes, and has lost its event types when it is another daemon. Calls
that were open when a connection ended fail with ``UnavailableError`` and are not repeated: nobody knows whether they
were heard, and only the caller knows whether twice is harmless.

Each reader of the audit trail has a connection for itself: one that reads slowly delays neither calls nor handlers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from isolator_client import address, calls, tickets
from isolator_client.calls import Call, Delivered, Emitted, Health, Staged
from isolator_client.errors import DeniedError, IsolatorError, UnavailableError, UsageError
from isolator_client.link import Link, connect, lost
from isolator_client.protocol import TICKETED, Notification, encode, pauses
from isolator_client.trail import Recorded, Trail

T = TypeVar("T")

Handler = Callable[[str, dict[str, Any]], Awaitable[Any]]
"""Function of the platform that gets a plugin's name and parameters, and returns a value that JSON can hold.

An IsolatorError that it raises is told to the plugin as a refusal.
"""

REFUSED = -31001
"""Code of an answer to a plugin: it will not work, also not later."""

FAILED = -32603
"""Code of an answer to a plugin: the platform has a bug."""

TEXT_LIMIT = 400
"""Most characters of a refusal; the daemon passes on no more."""


@dataclass(frozen=True)
class _Served:
    """A method of the host API that is answered here."""

    call: Call[None]
    handler: Handler


class AsyncClient:
    """A connection to the daemon that comes back by itself; use it with ``async with``, or ``open`` and ``close``.

    ``path`` is the control socket; left out, it is ``run/isolator/control.sock`` below ``root``, else below
    ``$ISOLATOR_ROOT``, else below ``/``. An open client belongs to the event loop in which it was opened.
    """

    def __init__(self, path: address.StrPath | None = None, *, root: address.StrPath | None = None) -> None:
        self.path = address.control_socket(path, root)
        self._link: Link | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._workers: set[asyncio.Task[None]] = set()
        self._events: dict[str, Call[None]] = {}
        self._methods: dict[str, _Served] = {}
        self._away: IsolatorError = UnavailableError("the client", "is not open", "use 'async with', or await open()")

    async def __aenter__(self) -> AsyncClient:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Connect, waiting up to 30 s for a place in the daemon's queue of callers.

        Raises UnavailableError when no daemon runs there or all its places are taken, DeniedError when this user
        cannot reach its socket, RuntimeError when the client is open already.
        """
        if self._keeper is not None:
            raise RuntimeError("the client is open already")
        self._link = await connect(self.path)
        self._keeper = asyncio.create_task(self._keep(self._link), name="isolator-client")

    async def close(self) -> None:
        """Close the connection. Open calls fail; handlers that are at work are cancelled."""
        tasks = [task for task in (self._keeper, *self._workers) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        link, self._link, self._keeper = self._link, None, None
        self._away = UnavailableError("the client", "was closed")
        if link is not None:
            await link.close()

    @property
    def connected(self) -> bool:
        """Whether there is a connection at the moment."""
        return self._link is not None and not self._link.over

    # Verbs

    async def call(self, method: str, /, **params: Any) -> dict[str, Any]:
        """Ask for any verb of the control socket and return its answer.

        Raises the error that the daemon answers, UsageError for what cannot be sent, and UnavailableError while there
        is no connection or when it ends before the answer. Verbs that add or change a plugin take a ticket, which is
        fetched here: files that the parameters name are opened by this process, with its rights.
        """
        if method in TICKETED:
            name = tickets.updated(method, params)
            shown = None if name is None else await self._ask("plugin.show", {"name": name})
            params = await asyncio.to_thread(tickets.with_ticket, self.path, method, params, shown)
        return await self._ask(method, params)

    async def emit(
        self,
        name: str,
        payload: Mapping[str, Any],
        *,
        dedupe_key: str | None = None,
        ttl: float | None = None,
        traceparent: str | None = None,
        on_behalf_of: str | None = None,
    ) -> Emitted:
        """Emit an event: when this returns, it is on disk with a delivery for each plugin that subscribed to it.

        ``dedupe_key`` makes a repetition harmless, ``ttl`` are the seconds after which it expires undelivered.
        ``on_behalf_of`` names the person for whom you emit it; it is in the trail, and gives no right. Raises
        UsageError when the event's schema refuses the payload, UnavailableError when nobody knows whether the event
        was taken.
        """
        return await self._do(calls.emit(name, payload, dedupe_key, ttl, traceparent, on_behalf_of))

    async def wait(self, event_id: str, *, timeout: float = 30.0) -> list[Delivered]:
        """Wait until every delivery of an event is final, at most ``timeout`` seconds, and return how each stands."""
        return await self._do(calls.wait(event_id, timeout))

    async def plugins(self) -> list[dict[str, Any]]:
        """List every plugin with its live figures."""
        return await self._do(calls.plugins())

    async def register_event(
        self,
        name: str,
        schema: Mapping[str, Any],
        *,
        order_by: str | None = None,
        version: int = 1,
        breaking: bool = False,
    ) -> None:
        """Register an event of the platform's own: the daemon checks its payloads by this JSON Schema.

        Deliveries with the same value in the field ``order_by`` go one after the other. A schema that plugins which
        subscribe would not expect is a UsageError, unless it is ``breaking``. It is registered again on each new
        connection. Takes the role ``operator``.
        """
        call = calls.register_event(name, schema, order_by, version, breaking)
        await self._do(call)
        self._events[name] = call

    async def serve(self, method: str, permission: str, handler: Handler) -> None:
        """Answer a method of the host API, which plugins with ``permission`` may call; one process serves it at a time.

        ``handler`` runs in a task of its own for each call, and has 10 s. An IsolatorError that it raises is the answer
        to the plugin; any other exception goes to the loop's exception handler, and the plugin learns that the platform
        failed. The method is registered again on each new connection. Takes the role ``emitter``.
        """
        before = self._methods.get(method)
        served = _Served(calls.register_method(method, permission), handler)
        self._methods[method] = served  # at once: a plugin's first call may come along with the answer
        try:
            await self._do(served.call)
        except BaseException:
            if before is None:
                del self._methods[method]
            else:
                self._methods[method] = before
            raise

    async def unregister_event(self, name: str) -> None:
        """Have the daemon forget an event type; refused while plugins subscribe to it or its events wait."""
        await self._do(calls.unregister_event(name))
        self._events.pop(name, None)

    async def unserve(self, method: str) -> None:
        """Answer a method no longer; plugins learn that nobody serves it. Calls that are under way are answered."""
        await self._do(calls.unregister_method(method))
        self._methods.pop(method, None)

    async def health(self, name: str | None = None) -> list[Health]:
        """Return how every plugin, or the one of this name, is doing."""
        return await self._do(calls.health(name))

    async def stage(
        self,
        source: address.StrPath | int,
        *,
        name: str | None = None,
        hooks: Sequence[str] | None = None,
        update: str | None = None,
        config: Mapping[str, str] | None = None,
    ) -> Staged:
        """Hand a plugin over, and return what it asks for; nothing is registered yet.

        ``source`` is its folder, a package, or its binary (then with ``name`` and ``hooks``): a path, or a descriptor
        that this process has opened for reading. The daemon reads what it was handed with this user's rights, and opens
        no path.
        ``update`` names the registered plugin that it is a newer version of. Takes the role ``operator``.
        """
        files, opened = tickets.handed(source)
        call = calls.stage(files, name=name, hooks=hooks, update=update, config=config)
        params = await asyncio.to_thread(tickets.with_ticket, self.path, call.method, call.params, opened=opened)
        return call.read(await self._ask(call.method, params))

    async def commit(self, staged: Staged, *, config: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Register what was staged, with its config; returns the plugin as ``plugins`` shows it."""
        call = calls.commit(staged, config)
        return call.read(await self.call(call.method, **call.params))

    async def update(
        self, staged: Staged, *, config: Mapping[str, str] | None = None, approve: bool = False
    ) -> dict[str, Any]:
        """Exchange the version in use for the staged one; one that asks for more waits, unless ``approve``."""
        call = calls.update(staged, config, approve)
        return call.read(await self.call(call.method, **call.params))

    async def discard(self, staged: Staged) -> None:
        """Forget what was staged."""
        await self._do(calls.discard(staged))

    async def audit(self, *, after: int | None = None, lines: int = 0) -> AsyncGenerator[Recorded, None]:
        """Yield the records of the audit trail as they are written, over a connection of its own.

        The first is the one behind number ``after``; without it, the last ``lines`` that exist come first. A daemon
        that goes away is waited for, and the records resume behind the last one yielded. Raises IsolatorError at a
        break of the chain, and for an ``after`` that the trail does not reach: both mean that somebody changed it.
        Takes the role ``viewer``.
        """
        trail, waiting = Trail(after, lines), pauses()
        while True:
            try:
                async with contextlib.aclosing(self._follow(trail)) as records:
                    async for record in records:
                        waiting = pauses()
                        yield record
            except UnavailableError:
                if not trail.begun:
                    raise
            await asyncio.sleep(next(waiting))

    async def _follow(self, trail: Trail) -> AsyncGenerator[Recorded, None]:
        """Yield the records that one connection brings."""
        try:
            link = await connect(self.path)
        except DeniedError as error:
            raise trail.away(error) from None
        try:
            call = trail.follow()
            await link.send(encode(link.number(), call.method, call.params))
            async with contextlib.aclosing(link.messages()) as arriving:
                async for message in arriving:
                    if isinstance(message, Notification):
                        for record in trail.take(message):
                            yield record
                    elif message.error is not None:
                        raise message.error
                    else:
                        trail.begins(call.read(message.result))
            raise lost()
        finally:
            await link.close()

    # The connection

    async def _do(self, call: Call[T]) -> T:
        return call.read(await self._ask(call.method, call.params))

    async def _ask(self, method: str, params: Mapping[str, Any]) -> dict[str, Any]:
        if self._link is None or self._link.over:
            reason = self._away if self._link is None else self._link.reason or _away()
            raise UnavailableError(*reason.args)
        return await self._link.ask(method, params)

    async def _keep(self, link: Link) -> None:
        waiting = pauses()
        while True:
            await self._attend(link)
            self._away = link.reason or _away()
            if link.proven:
                waiting = pauses()
            await link.close()
            link = await self._connect_again(waiting)
            left = [*self._events.values(), *(served.call for served in self._methods.values())]
            self._link = link
            self._work(self._register_again(link, left))

    async def _attend(self, link: Link) -> None:
        async with contextlib.aclosing(link.notifications()) as arriving:
            async for notification in arriving:
                if notification.method == "api.call":
                    self._work(self._answer(link, notification.params))

    async def _connect_again(self, waiting: Iterator[float]) -> Link:
        self._link = None
        for pause in waiting:
            await asyncio.sleep(pause)
            try:
                return await connect(self.path)
            except IsolatorError as error:
                self._away = error
            except OSError as error:  # this process has no descriptor left, say
                self._away = UnavailableError("the daemon", f"cannot be connected to: {error.strerror}", "try again")
        raise AssertionError("pauses never end")

    async def _register_again(self, link: Link, left: list[Call[None]]) -> None:
        """Register everything on a new connection, and again at growing intervals that which is refused.

        A method is taken while the daemon has not noticed the end of the connection before, and for as long as another
        process of the platform serves it.
        """
        for pause in pauses():
            left = [call for call in left if not await self._settled(link, call)]
            if not left or link.over:
                return
            await asyncio.sleep(pause)

    async def _settled(self, link: Link, call: Call[None]) -> bool:
        try:
            await link.ask(call.method, call.params)
        except (
            DeniedError,
            UsageError,
        ) as error:  # no repetition mends either
            _report(f"registering again was refused: {error}", error)
        except IsolatorError:
            return False
        return True

    # Methods of the host API

    async def _answer(self, link: Link, given: Mapping[str, Any]) -> None:
        number, call = link.number(), given.get("call")
        try:
            line = encode(number, "api.answer", {"call": call, "result": await self._result(given)})
        except IsolatorError as error:
            text = str(error)[:TEXT_LIMIT].encode(errors="replace").decode()
            line = encode(number, "api.answer", {"call": call, "error": {"code": REFUSED, "message": text}})
        except Exception as error:  # the handler is broken, or its result is no JSON
            _report(f"the handler of {given.get('method')} failed", error)
            failure = {"code": FAILED, "message": "the platform failed"}
            line = encode(number, "api.answer", {"call": call, "error": failure})
        with contextlib.suppress(IsolatorError):  # the plugin, or the connection, did not wait for it
            await link.exchange(number, line)

    async def _result(self, given: Mapping[str, Any]) -> Any:
        method = str(given.get("method"))
        served = self._methods.get(method)
        if served is None:
            raise IsolatorError(method, "is not served here")
        return await served.handler(str(given.get("plugin")), given.get("params") or {})

    def _work(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._workers.add(task)
        task.add_done_callback(self._workers.discard)


def _away() -> UnavailableError:
    return UnavailableError("the daemon", "is away at the moment", "try again")


def _report(message: str, error: Exception) -> None:
    asyncio.get_running_loop().call_exception_handler({"message": f"isolator_client: {message}", "exception": error})
