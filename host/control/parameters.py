"""Requests of the control socket as types: the kinds of parameters, and the one place where they are read.

A verb is a subclass of ``Request`` (all of them stand in ``verbs``). Its annotations are its parameters, each with the
kind that checks it; one with a default may be left out. What the caller sends beyond them is ignored.

    class EventWait(Request, verb="event.wait", role="emitter", result=Event):
        id: Annotated[str, Text()]
        timeout: Annotated[float, Number(3600.0)] = 30.0
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import MISSING, Field, field
from typing import Any, ClassVar, NamedTuple, Protocol, Self, dataclass_transform, get_type_hints

from isolator.base.structs import struct_class
from isolator.errors import UsageError
from isolator.policy.host import Role


class Kind(Protocol):
    """Values that a parameter may have."""

    def parse(self, key: str, value: Any) -> Any:
        """The value as the handler gets it; None stands for a missing parameter. Raises UsageError that names it."""

    def schema(self) -> dict[str, Any]:
        """JSON Schema of the value."""


@struct_class(frozen=True)
class Text:
    """Text of ``least`` to ``most`` characters; null is None where ``nullable``."""

    most: int = 4096
    least: int = 1
    nullable: bool = False

    def parse(self, key: str, value: Any) -> str | None:
        if value is None and self.nullable:
            return None
        if not isinstance(value, str) or len(value) < self.least:
            raise UsageError(key, "is missing or not text")
        if len(value) > self.most:
            raise UsageError(key, f"must be text of at most {self.most} characters")
        return value

    def schema(self) -> dict[str, Any]:
        return _nullable({"type": "string", "minLength": self.least, "maxLength": self.most}, self.nullable)


@struct_class(frozen=True)
class OneOf:
    """One of several texts; null is None."""

    values: tuple[str, ...]

    def parse(self, key: str, value: Any) -> str | None:
        if value is not None and value not in self.values:
            raise UsageError(key, f"must be one of {', '.join(self.values)}")
        return value if isinstance(value, str) else None

    def schema(self) -> dict[str, Any]:
        return {"type": ["string", "null"], "enum": [*self.values, None]}


@struct_class(frozen=True)
class Number:
    """A number from 0 to ``most``, as float; null is None where ``nullable``."""

    most: float
    nullable: bool = False

    def parse(self, key: str, value: Any) -> float | None:
        if value is None and self.nullable:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= self.most:
            raise UsageError(key, f"must be a number from 0 to {self.most}")
        return float(value)

    def schema(self) -> dict[str, Any]:
        return _nullable({"type": "number", "minimum": 0, "maximum": self.most}, self.nullable)


@struct_class(frozen=True)
class Whole:
    """A whole number from 0 to ``most``; a fraction is cut off."""

    most: int

    def parse(self, key: str, value: Any) -> int:
        number = Number(self.most).parse(key, value)
        assert number is not None
        return value if isinstance(value, int) else int(number)

    def schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": 0, "maximum": self.most}


@struct_class(frozen=True)
class Flag:
    """True or false; null is false."""

    def parse(self, key: str, value: Any) -> bool:
        if value is not None and not isinstance(value, bool):
            raise UsageError(key, "must be true or false")
        return bool(value)

    def schema(self) -> dict[str, Any]:
        return _nullable({"type": "boolean"}, True)


@struct_class(frozen=True)
class Object:
    """A JSON object of any content; ``what`` and ``why`` are those of the error, where they differ from the key's."""

    what: str = ""
    why: str = "must be an object"

    def parse(self, key: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise UsageError(self.what or key, self.why)
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "object"}


@struct_class(frozen=True)
class ListOf:
    """A list of texts, or of JSON objects of any content; null is None."""

    kind: type[str | dict[str, Any]]

    def parse(self, key: str, value: Any) -> Any:
        if value is not None and not (isinstance(value, list) and all(isinstance(item, self.kind) for item in value)):
            raise UsageError(key, f"must be a list of {'texts' if self.kind is str else 'objects'}")
        return value

    def schema(self) -> dict[str, Any]:
        return _nullable({"type": "array", "items": {"type": "string" if self.kind is str else "object"}}, True)


@struct_class(frozen=True)
class ConfigValues:
    """Config values by key, at most 64; null is none."""

    def parse(self, key: str, value: Any) -> dict[str, str]:
        values = value or {}
        if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()) or len(values) > 64:
            raise UsageError(key, "must be an object of texts, at most 64")
        return values

    def schema(self) -> dict[str, Any]:
        return _nullable({"type": "object", "additionalProperties": {"type": "string"}, "maxProperties": 64}, True)


@struct_class(frozen=True)
class Json:
    """Any JSON value."""

    def parse(self, key: str, value: Any) -> Any:
        return value

    def schema(self) -> dict[str, Any]:
        return {}


def _nullable(schema: dict[str, Any], nullable: bool) -> dict[str, Any]:
    return schema | {"type": [schema["type"], "null"]} if nullable else schema


@struct_class(frozen=True)
class Spec:
    """Everything about a verb but its parameters."""

    verb: str
    role: Role
    """The lowest role that may call it."""
    result: type[Any]
    """TypedDict of the answer."""
    recorded: bool
    """Whether each call is in the trail, not only a refused one."""
    repeatable: bool
    """Whether a call that was not answered may be made again, by the host that takes the place of this one."""

    @property
    def changes(self) -> bool:
        """Whether a call changes something: who may do no more than read changes nothing."""
        return self.recorded and self.role != "viewer"


class Parameter(NamedTuple):
    """One parameter of a verb."""

    key: str
    kind: Kind
    required: bool


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
class Request:
    """Base of every verb's request; annotations with values are parameters with defaults, as in a dataclass.

    No dataclass, because to make three dozen of them takes a tenth of the host's start.
    """

    spec: ClassVar[Spec]
    _fields: ClassVar[dict[str, Field[Any]]]
    _defaults: ClassVar[dict[str, Any]]

    def __init_subclass__(
        cls, *, verb: str, role: Role, result: type[Any], recorded: bool = False, repeatable: bool | None = None
    ) -> None:
        """Note the verb; ``repeatable`` is by default what changes nothing that is worth a record."""
        cls.spec = Spec(verb, role, result, recorded, not recorded if repeatable is None else repeatable)
        cls._fields = {}
        for name in vars(cls).get("__annotations__", {}):
            given = cls.__dict__.get(name, MISSING)
            cls._fields[name] = given if isinstance(given, Field) else field(default=given)
        cls._defaults = {name: one.default for name, one in cls._fields.items() if one.default is not MISSING}

    def __init__(self, **values: Any) -> None:
        made = self.__dict__
        made.update(self._defaults)
        made.update(values)
        if made.keys() != self._fields.keys():
            for name, one in self._fields.items():
                if name not in made and one.default_factory is not MISSING:
                    made[name] = one.default_factory()
            if made.keys() != self._fields.keys():
                raise TypeError(f"{self.spec.verb} has the parameters {', '.join(self._fields)}")

    def __repr__(self) -> str:
        shown = (f"{name}={self.__dict__[name]!r}" for name, one in self._fields.items() if one.repr)
        return f"{type(self).__name__}({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment] # a dictionary among its values has none either

    @classmethod
    def parse(cls, params: Mapping[str, Any]) -> Self:
        """The request that the parameters make; raises UsageError for the first one that does not fit."""
        return cls(
            **{
                key: kind.parse(key, params.get(key))
                for key, kind, required in cls.parameters()
                if required or key in params
            }
        )

    @classmethod
    @functools.cache
    def parameters(cls) -> tuple[Parameter, ...]:
        """The parameters in their order."""
        hints = get_type_hints(cls, include_extras=True)
        return tuple(
            Parameter(name, hints[name].__metadata__[0], one.default is MISSING and one.default_factory is MISSING)
            for name, one in cls._fields.items()
        )
