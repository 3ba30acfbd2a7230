"""Bodies of messages as types, with strict JSON both ways.

A request type names its operation and, as its type argument, its reply; both ends of a channel use it::

    class Ensure(Request[Running], op="run.ensure"):
        name: str
        reason: str = "event"

    running = await channel.ask(Ensure(name="echo"))     # one end
    Channel(socket, by_op(Ensure.on(ensure), ...))       # the other: async def ensure(request: Ensure) -> Running

The sender of a message may be a process that was taken over, so ``from_json`` believes nothing: a missing or unknown
key, another type than the field's, or a number that is not finite is a ``UsageError``, which the channel returns as
the refusal. Fields may be ``str``, ``int``, ``float``, ``bool``, a ``StrEnum``, another body, ``tuple[X, ...]``,
``dict[str, X]``, ``Any`` (JSON that the receiver checks itself), each also ``| None``.
"""

from __future__ import annotations

import functools
import math
import os
import types
import typing
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import StrEnum
from typing import Any, ClassVar, Generic, Self, TypeVar, cast, dataclass_transform

from isolator.errors import UsageError

Json = dict[str, Any]
R = TypeVar("R", bound="Body | None")
_Check = Callable[[object], Any]


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
            except TypeError as error:
                raise UsageError(where, f"field {name!r} has to be {error}") from None
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
    checks: Mapping[str, _Check]


_shapes: dict[type[Body], _Shape] = {}


def _shape(cls: type[Body]) -> _Shape:
    shape = _shapes.get(cls)
    if shape is None:
        for base in reversed(cls.__mro__):
            if issubclass(base, Body) and base is not Body and "__dataclass_fields__" not in vars(base):
                dataclass(frozen=True, kw_only=True)(base)
        all_fields, hints = fields(cls), typing.get_type_hints(cls)  # type: ignore[arg-type]
        required = frozenset(f.name for f in all_fields if f.default is MISSING and f.default_factory is MISSING)
        checks = {one.name: _check(hints[one.name]) for one in all_fields}
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


def _check(hint: Any) -> _Check:
    """The function that converts a JSON value to a field's type, or raises TypeError with the type for a person."""
    if hint is Any:
        return lambda value: value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (_check(one) for one in arguments if one is not type(None))
        return lambda value: None if value is None else inner(value)
    if origin is tuple:
        return functools.partial(_tuple, _check(arguments[0]))
    if origin is dict:
        return functools.partial(_dict, _check(arguments[1]))
    if issubclass(hint, StrEnum):
        return functools.partial(_member, hint, f"one of {', '.join(hint)}")
    if issubclass(hint, Body):
        return functools.partial(_body, hint)
    return _SCALARS[hint]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("text")
    return value


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError("true or false")
    return value


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError("an integer")
    return value


def _number(value: object) -> float:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond any float
        pass
    raise TypeError("a finite number")


_SCALARS: dict[Any, _Check] = {str: _text, bool: _truth, int: _integer, float: _number}


def _tuple(check: _Check, value: object) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise TypeError("a list")
    return tuple(check(one) for one in value)


def _dict(check: _Check, value: object) -> Json:
    if not isinstance(value, dict):
        raise TypeError("an object")
    return {key: check(one) for key, one in value.items()}


def _member(kind: Callable[[object], StrEnum], names: str, value: object) -> StrEnum:
    try:
        return kind(value)
    except ValueError:
        raise TypeError(names) from None


def _body(kind: type[Body], value: object) -> Body:
    return kind.from_json(value, kind.__name__)
