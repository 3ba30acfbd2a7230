"""Frozen models: immutable objects with typed, named fields, which refuse unknown names and values of another type.

The interface is that part of pydantic's which policies need. It is made anew because policies are read at the start of
every process, and of every ``isolator run``: importing pydantic takes longer than all else that these do before there
is a cage.

Fields may be ``str``, ``int``, ``float``, ``bool``, a ``Literal``, another model, ``tuple[X, ...]``, ``tuple[X, Y]``,
``dict[str, X]``, ``Any``, a union of these, and each in an ``Annotated``. The fields of the last base come first.
"""

from __future__ import annotations

import functools
import json
import math
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar, Literal, Self, dataclass_transform

_Check = Callable[[Any], Any]
_REQUIRED = object()


class _Fresh:
    """Default of a field: what ``make`` returns, for each object anew."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


def fresh(*, default_factory: Callable[[], Any]) -> Any:
    """A field whose default is made for each object anew."""
    return _Fresh(default_factory)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(fresh,))
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
        checks = _checks(self.__class__) if values else {}
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
                made[name] = default.make() if isinstance(default, _Fresh) else default
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
        plain = functools.partial(_plain, lists=mode == "json")
        return {name: plain(value) for name, value in self if name not in exclude}

    def model_dump_json(self, *, exclude: Collection[str] = ()) -> str:
        """JSON without spaces, the fields in order."""
        data = self.model_dump(mode="json", exclude=exclude)
        return json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

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


_made: dict[type[Frozen], dict[str, _Check]] = {}


def _checks(model: type[Frozen]) -> dict[str, _Check]:
    """How each field of a model is checked; made when the first object is that needs it."""
    if model not in _made:
        _made[model] = {name: _check(hint) for name, hint in field_types(model).items()}
    return _made[model]


def _check(hint: Any) -> _Check:
    """The check of a type: returns the value as the model has it, or raises ValueError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _check(arguments[0])
    if origin is Literal:
        return functools.partial(_choice, arguments)
    if origin is typing.Union or origin is types.UnionType:
        return functools.partial(_first, [_check(one) for one in arguments])
    if origin is tuple and arguments[1:] == (...,):
        return functools.partial(_tuple, _check(arguments[0]))
    if origin is tuple:
        return functools.partial(_record, [_check(one) for one in arguments])
    if origin is dict:
        return functools.partial(_dict, _check(arguments[1]))
    if isinstance(hint, type) and issubclass(hint, Frozen):
        return functools.partial(_model, hint)
    return _SCALARS[hint]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("is no text")
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("is neither true nor false")
    return value


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("is no whole number")
    return value


def _number(value: Any) -> float:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond any float
        pass
    raise ValueError("is no finite number")


def _nothing(value: Any) -> None:
    if value is not None:
        raise ValueError("is not null")


def _any(value: Any) -> Any:
    return value


_SCALARS: dict[Any, _Check] = {
    str: _text, bool: _truth, int: _integer, float: _number, type(None): _nothing, Any: _any,
}  # fmt: skip


def _choice(choices: tuple[Any, ...], value: Any) -> Any:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"is none of {', '.join(map(repr, choices))}")
    return value


def _first(checks: list[_Check], value: Any) -> Any:
    problem = ""
    for check in checks:
        try:
            return check(value)
        except ValueError as error:
            problem = problem or str(error)
    raise ValueError(problem)


def _tuple(check: _Check, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError("is no list")
    return tuple([check(one) for one in value])


def _record(checks: list[_Check], value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple) or len(value) != len(checks):
        raise ValueError(f"is no list of {len(checks)}")
    return tuple([check(one) for check, one in zip(checks, value, strict=True)])


def _dict(check: _Check, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError("is no object")
    return {key: check(one) for key, one in value.items()}


def _model(kind: type[Frozen], value: Any) -> Frozen:
    return value if isinstance(value, kind) else kind.model_validate(value)
