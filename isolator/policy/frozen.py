"""Frozen models: immutable objects with typed, named fields, which refuse unknown names and values of another type.

The interface is that part of pydantic's which policies need. It is made anew because policies are read at the start of
every process, and of every ``isolator run``: importing pydantic takes longer than all else that these do before there
is a cage.

Fields may be of the types of ``isolator.base.typed``, and other models. The fields of the last base come first.
"""

from __future__ import annotations

import functools
import json
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar, Literal, Self, dataclass_transform

from isolator.base.structs import Field, field
from isolator.base.typed import Check, check_of

_REQUIRED = object()
_SCALARS = frozenset({str, int, float, bool, type(None)})


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
class Frozen:
    """Base of every policy model: strict about unknown names and about types, immutable, comparable, hashable."""

    model_fields: ClassVar[tuple[str, ...]] = ()
    """The names of the fields, in order."""
    _defaults: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        names: dict[str, Any] = {}
        for base in reversed(cls.__mro__):
            if base is Frozen or not issubclass(base, Frozen):
                continue
            for name in base.__annotations__:
                names[name] = base.__dict__.get(name, _REQUIRED)
        cls.model_fields = tuple(names)
        cls._defaults = names

    def __init__(self, **values: Any) -> None:
        """Raise ValueError for a name that is no field, a field that is missing, and a value of another type."""
        values = self._completed(values)
        checks = _checks(self.__class__) if values else {}  # type: ignore[arg-type]  # hashed as a class
        made = self.__dict__
        for name, default in self._defaults.items():
            if name in values:
                try:
                    made[name] = checks[name](values.pop(name))
                except ValueError as error:
                    raise ValueError(f"{type(self).__name__}.{name}: {error}") from None
            elif default is _REQUIRED:
                raise ValueError(f"{type(self).__name__}.{name} is missing")
            else:
                made[name] = default.make() if isinstance(default, Field) and default.make else default
        if values:
            raise ValueError(f"{type(self).__name__} has no {', '.join(map(repr, sorted(values)))}")

    @classmethod
    def _completed(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The values to make an object of; for a model whose defaults depend on more than their field."""
        return values

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen")

    def __eq__(self, other: object) -> bool:
        return self.__dict__ == other.__dict__ if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash((type(self), *self.__dict__.values()))

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self.__dict__.items())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self)})"

    def model_copy(self, *, update: Mapping[str, Any]) -> Self:
        """A copy with other values for some fields."""
        return type(self)(**{**self.__dict__, **update})

    def model_dump(
        self, *, mode: Literal["python", "json"] = "python", exclude: Collection[str] = ()
    ) -> dict[str, Any]:
        """The fields as a dictionary, models in them likewise; ``json``: tuples as lists."""
        lists = mode == "json"
        return {
            name: value if type(value) in _SCALARS else _plain(value, lists=lists)
            for name, value in self.__dict__.items()
            if name not in exclude
        }

    def model_dump_json(self, *, exclude: Collection[str] = ()) -> str:
        """JSON without spaces, the fields in order."""
        data = self.model_dump(mode="json", exclude=exclude)
        return json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    @classmethod
    def read_value(cls, value: Any) -> Self:
        """For a field of another model: an object of this one, or its dictionary; raises ValueError."""
        return value if isinstance(value, cls) else cls.model_validate(value)

    @classmethod
    def model_validate(cls, data: Any) -> Self:
        """The object of a dictionary as ``model_dump`` makes it, whoever made it; raises ValueError."""
        if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
            raise ValueError(f"{cls.__name__} is an object")
        return cls(**data)


def field_types(model: type[Frozen]) -> dict[str, Any]:
    """The types of a model's fields by name, each with its ``Annotated``."""
    found: dict[str, Any] = {}
    for base in reversed(model.__mro__):
        if issubclass(base, Frozen) and base is not Frozen:
            found |= base.__annotations__
    if any(isinstance(hint, str) for hint in found.values()):
        found = typing.get_type_hints(model, include_extras=True)
    return {name: found[name] for name in model.model_fields}


def _plain(value: Any, *, lists: bool) -> Any:
    if isinstance(value, Frozen):
        return value.model_dump(mode="json" if lists else "python")
    if isinstance(value, tuple):
        items = [_plain(one, lists=lists) for one in value]
        return items if lists else tuple(items)
    return {key: _plain(one, lists=lists) for key, one in value.items()} if isinstance(value, dict) else value


@functools.cache
def _checks(model: type[Frozen]) -> dict[str, Check]:
    """How each field of a model is checked; made when the first object is that needs it."""
    return {name: check_of(hint) for name, hint in field_types(model).items()}
