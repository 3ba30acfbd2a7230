"""Endpoints of the control socket, and the caller that they answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from host.control.parameters import Request, Spec
from isolator.ipc.body import Body, Json

R = TypeVar("R", bound=Request)
V = TypeVar("V")
ROLES = ("caller", "viewer", "emitter", "operator")


class Belonging(Body):
    """Something that a verb keeps for a connection as long as it is open."""

    verb: str
    data: Json


@dataclass(eq=False)
class Caller:
    """The process at the other end of a connection; ``notify`` sends it a notification.

    A handler that sends much of it calls ``narrow`` once and then waits for ``drained`` each time: so no more than that
    many bytes, and the last notification, ever wait in this process for a caller that does not read.
    """

    uid: int
    pid: int
    role: str | None
    may_call: bool
    """The role ``caller``, which one may have besides the one that it has here."""
    notify: Callable[[str, Mapping[str, Any]], None]
    narrow: Callable[[int], None]
    cut: Callable[[], None]
    """Ends the connection at once; messages that wait for the caller to read them are dropped."""
    drained: asyncio.Event = field(default_factory=asyncio.Event)
    on_close: list[Callable[[], None]] = field(default_factory=list)
    belongings: list[Callable[[], Belonging]] = field(default_factory=list)
    """Things that verbs keep for this connection, for a host that takes the place of this one."""
    follows: int = 0
    """Things kept for this connection that go on in no other host (a stream, a search). As long as there is one, the
    connection is not handed on: its caller connects again."""

    gone: bool = False
    """The connection has closed."""
    is_console: bool = False
    """The console's own connection: the name of whom it asks for goes into the trail."""

    def keep(self, end: Callable[[], None], belonging: Callable[[], Belonging] | None = None) -> Callable[[], None]:
        """Have ``end`` called when the connection closes; the returned function takes that back, once it is over.

        ``belonging``: one of ``belongings`` for as long; without it, one of what it ``follows``. If the connection has
        closed by now, ``end`` is called in the loop's next turn.
        """
        if self.gone:
            asyncio.get_running_loop().call_soon(end)
        self.on_close.append(end)
        if belonging is not None:
            self.belongings.append(belonging)
        else:
            self.follows += 1

        def over() -> None:
            self.on_close.remove(end)
            if belonging is not None:
                self.belongings.remove(belonging)
            else:
                self.follows -= 1

        return over

    def leave(self) -> None:
        """End what is kept for the connection, which has closed."""
        self.gone = True
        for end in list(self.on_close):
            end()

    @property
    def by(self) -> str:
        """The caller's name in the trail."""
        return f"uid:{self.uid}"


Result = Mapping[str, Any]
Reply = Callable[[Result | None, Exception | None], None]


@dataclass(frozen=True)
class Endpoint(Generic[R]):
    """A verb and its handler."""

    request: type[R]
    answer: Callable[[R, Caller], Awaitable[Result]]


@dataclass(frozen=True)
class QuickEndpoint(Generic[R]):
    """A verb that is called thousands of times a second: without a task, ``start`` answers through its third argument.

    While ``full()`` a request takes a task and waits for ``room()`` first.
    """

    request: type[R]
    start: Callable[[R, Caller, Reply], None]
    full: Callable[[], bool]
    room: Callable[[], Awaitable[None]]
    hurry: Callable[[], None] = lambda: None
    """Called once a request was started that is the only one of its connection at the moment."""

    async def there_is_room(self) -> None:
        """Wait until ``start`` may be called."""
        while self.full():
            await self.room()

    async def answer(self, request: R, caller: Caller) -> Result:
        """Start the request, and wait for the answer."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()

        def reply(result: Result | None, error: Exception | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result or {})

        self.start(request, caller, reply)
        return await future


AnyEndpoint = Endpoint[Any] | QuickEndpoint[Any]

Handler = Callable[[V, R, Caller], Awaitable[Result]]


def serves(request: type[R]) -> Callable[[Handler[V, R]], Handler[V, R]]:
    """Declare that a method of ``Verbs`` answers a verb."""

    def declare(handler: Handler[V, R]) -> Handler[V, R]:
        handler.__dict__["serves"] = request
        return handler

    return declare


class Verbs:
    """Base of the handlers of some verbs: methods that are declared with ``serves``."""

    def endpoints(self) -> list[AnyEndpoint]:
        """The verbs with their handlers."""
        found = ((name, getattr(one, "serves", None)) for name, one in vars(type(self)).items())
        return [Endpoint(request, getattr(self, name)) for name, request in found if request is not None]


def may(caller: Caller, spec: Spec) -> bool:
    """Decide whether a caller has the role that a verb needs."""
    if spec.role == "caller":
        return caller.may_call
    return caller.role is not None and ROLES.index(caller.role) >= ROLES.index(spec.role)
