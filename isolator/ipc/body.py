"""Bodies of messages as types, with strict JSON both ways.

A request type names its operation and, as its type argument, its reply; both ends of a channel use it::

    class Ensure(Request[Running], op="run.ensure"):
        name: str
        reason: str = "event"

    running = await channel.ask(Ensure(name="echo"))     # one end
    Channel(socket, by_op(Ensure.on(ensure), ...))       # the other: async def ensure(request: Ensure) -> Running

The sender of a message may be a process that was taken over, so ``from_json`` believes nothing: a missing or unknown
key, another type than the field's, or a number that is not finite is a ``UsageError``, which the channel returns as
the refusal. Fields may be of the types of ``isolator.base.typed`` (``Any``: JSON that the receiver checks itself), and
other bodies.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar, Generic, Self, TypeVar, cast, dataclass_transform

from isolator.base.typed import Check, check_of
from isolator.errors import UsageError

Json = dict[str, Any]
R = TypeVar("R", bound="Body | None")


@dataclass
class Message:
    """One packet, its body still unchecked; whoever handles it owns the descriptors."""

    fields: Json
    fds: list[int] = field(default_factory=list)

    def close(self) -> None:
        """Close every descriptor that was not taken out."""
        while self.fds:
            os.close(self.fds.pop())


Handler = Callable[[Message], Awaitable["Message | Json | None"]]


@dataclass(frozen=True)
class AtOnce:
    """A handler that waits for nothing: a channel calls it as it reads, if all that came before has begun."""

    handler: Handler

    def __call__(self, message: Message) -> Awaitable[Message | Json | None]:
        return self.handler(message)


def by_op(*served: tuple[str, Handler]) -> dict[str, Handler]:
    """Handlers by operation, from ``Request.on`` and ``Request.on_fds``."""
    return dict(served)


def omitted(*, default: Any) -> Any:
    """A field that is left out of the JSON while it has its default."""
    return field(default=default, metadata={"omitted": True})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, omitted))
class Body:
    """Base of every body; its subclasses are frozen dataclasses, made with keyword arguments.

    A subclass becomes a dataclass when it is first used: that takes a millisecond, and there are fifty.
    """

    def __new__(cls, **_: Any) -> Self:
        _shape(cls)
        return super().__new__(cls)

    def to_json(self) -> Json:
        """The JSON object, for ``json.dumps``."""
        made: Json = {}
        for one in _shape(type(self)).fields:
            value = getattr(self, one.name)
            if not (one.metadata.get("omitted") and value == one.default):
                made[one.name] = _plain(value)
        return made

    @classmethod
    def read_value(cls, value: object) -> Self:
        """For a field of another body: ``from_json`` under the name of this one."""
        return cls.from_json(value, cls.__name__)

    @classmethod
    def from_json(cls, data: object, where: str) -> Self:
        """Check and convert a JSON object; ``where`` names it in the UsageError that is raised for a bad one."""
        if not isinstance(data, dict):
            raise UsageError(where, "has to be a JSON object")
        shape = _shape(cls)
        unknown = data.keys() - shape.checks.keys()
        if unknown:
            raise UsageError(where, f"unknown field {ascii(min(map(str, unknown)))[:80]}")
        missing = shape.required - data.keys()
        if missing:
            raise UsageError(where, f"field {min(missing)!r} is missing")
        values = {}
        for name, value in data.items():
            try:
                values[name] = shape.checks[name](value)
            except ValueError as error:
                raise UsageError(where, f"field {name!r} {error}") from None
        return cls(**values)


@dataclass(frozen=True)
class WithFds(Generic[R]):
    """A body and the descriptors that come along; whoever receives it owns them."""

    body: R
    fds: list[int]


class Request(Body, Generic[R]):
    """Base of every request, which ``Channel.ask`` sends and waits for the reply, ``Channel.tell`` without waiting."""

    op: ClassVar[str]
    reply: ClassVar[type[Body] | None]
    """None: answered with an empty object."""
    fds: ClassVar[range]
    """How many descriptors may come along."""

    def __init_subclass__(cls, *, op: str, fds: range = range(1)) -> None:
        super().__init_subclass__()
        (reply,) = typing.get_args(cls.__orig_bases__[0])  # type: ignore[attr-defined]
        cls.op, cls.reply, cls.fds = op, (None if reply is type(None) else reply), fds

    @classmethod
    def on(cls, handler: Callable[[Self], Awaitable[R | WithFds[R]]]) -> tuple[str, Handler]:
        """The entry of a channel's handlers that serves this request."""
        return cls.on_fds(lambda request, _: handler(request))

    @classmethod
    def on_now(cls, handler: Callable[[Self], R | WithFds[R]]) -> tuple[str, Handler]:
        """As ``on``, for a handler that waits for nothing."""
        return cls.on_fds_now(lambda request, _: handler(request))

    @classmethod
    def on_fds_now(cls, handler: Callable[[Self, list[int]], R | WithFds[R]]) -> tuple[str, Handler]:
        """As ``on_fds``, for a handler that waits for nothing."""

        async def serve(request: Self, fds: list[int]) -> R | WithFds[R]:
            return handler(request, fds)

        op, served = cls.on_fds(serve)
        return op, AtOnce(served)

    @classmethod
    def on_fds(cls, handler: Callable[[Self, list[int]], Awaitable[R | WithFds[R]]]) -> tuple[str, Handler]:
        """As ``on``, for a handler that takes the descriptors: those left in its list are closed afterwards."""

        async def serve(message: Message) -> Message | None:
            data = {key: value for key, value in message.fields.items() if key not in ("op", "id")}
            request = cls.from_json(data, cls.op)
            if len(message.fds) not in cls.fds:
                raise UsageError(cls.op, f"{len(message.fds)} descriptors came with it")
            result = await handler(request, message.fds)
            body, fds = (result.body, result.fds) if isinstance(result, WithFds) else (result, [])
            return Message(body.to_json() if body is not None else {}, fds)

        return cls.op, serve

    @classmethod
    def read_reply(cls, fields: Json) -> R:
        """The reply from its JSON; raises UsageError when it is none."""
        where = f"the answer to {cls.op}"
        return cast(R, cls.reply.from_json(fields, where) if cls.reply is not None else None)


@dataclass(frozen=True)
class _Shape:
    """Fields of a body type, worked out once."""

    fields: tuple[Field[Any], ...]
    required: frozenset[str]
    checks: Mapping[str, Check]


_shapes: dict[type[Body], _Shape] = {}


def _shape(cls: type[Body]) -> _Shape:
    shape = _shapes.get(cls)
    if shape is None:
        for base in reversed(cls.__mro__):
            if issubclass(base, Body) and base is not Body and "__dataclass_fields__" not in vars(base):
                dataclass(frozen=True, kw_only=True)(base)
        all_fields, hints = fields(cls), typing.get_type_hints(cls)  # type: ignore[arg-type]
        required = frozenset(f.name for f in all_fields if f.default is MISSING and f.default_factory is MISSING)
        checks = {one.name: check_of(hints[one.name]) for one in all_fields}
        shape = _shapes[cls] = _Shape(all_fields, required, checks)
    return shape


def make_ready(*kinds: type[Body]) -> None:
    """Work out these types now, for copies of this process to share: it writes to half a MiB of what they share."""
    for kind in kinds:
        _shape(kind)


def _plain(value: Any) -> Any:
    if isinstance(value, Body):
        return value.to_json()
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict) and any(isinstance(one, Body) for one in value.values()):
        return {key: _plain(one) for key, one in value.items()}
    return value
