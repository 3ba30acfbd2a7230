"""Values of JSON, or of another process, checked by the type that they are declared with.

Types may be ``str``, ``int``, ``float``, ``bool``, ``None``, ``Any``, a ``Literal``, a ``StrEnum``, ``tuple[X, ...]``,
``tuple[X, Y]``, ``list[X]``, ``dict[str, X]``, a dataclass, a class with a ``read_value``, a union of these, and each
in an ``Annotated``.
"""

from __future__ import annotations

import functools
import math
import types
import typing
from collections.abc import Callable
from enum import StrEnum
from typing import Any, Literal, TypeVar

T = TypeVar("T")

Check = Callable[[Any], Any]
"""Returns the value as its type has it; raises ValueError, which says what it has to be."""


_known: dict[Any, dict[str, Check]] = {}
"""Checks of the fields, by dataclass."""


def check_of(hint: Any) -> Check:
    """The check of a type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return check_of(arguments[0])
    if origin is Literal:
        return functools.partial(_choice, arguments)
    if origin is typing.Union or origin is types.UnionType:
        inner = [check_of(one) for one in arguments if one is not type(None)]
        one = inner[0] if len(inner) == 1 else functools.partial(_first, inner)
        return functools.partial(_nullable, one) if len(inner) < len(arguments) else one
    if origin is list:
        return functools.partial(_list, check_of(arguments[0]))
    if origin is tuple and arguments[1:] == (...,):
        return functools.partial(_tuple, check_of(arguments[0]))
    if origin is tuple:
        return functools.partial(_record, [check_of(one) for one in arguments])
    if origin is dict:
        return functools.partial(_dict, check_of(arguments[1]))
    if hint in _SCALARS:
        return _SCALARS[hint]
    if issubclass(hint, StrEnum):
        return functools.partial(_member, hint, tuple(hint))
    return hint.read_value if hasattr(hint, "read_value") else functools.partial(read, hint)


def read(kind: type[T], value: Any) -> T:
    """An object of a dataclass, from the values of its fields by name; raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError("has to be an object")
    checks = _known.get(kind)
    if checks is None:
        checks = _known[kind] = {name: check_of(hint) for name, hint in typing.get_type_hints(kind).items()}
    if unknown := value.keys() - checks.keys():
        raise ValueError(f"has no {min(map(str, unknown))}")
    try:
        return kind(**{name: checks[name](one) for name, one in value.items()})
    except TypeError as error:  # a field is missing
        raise ValueError(str(error)) from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("has to be text")
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("has to be true or false")
    return value


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("has to be an integer")
    return value


def _number(value: Any) -> float:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond any float
        pass
    raise ValueError("has to be a finite number")


_SCALARS: dict[Any, Check] = {str: _text, bool: _truth, int: _integer, float: _number, Any: lambda value: value}


def _choice(choices: tuple[str, ...], value: Any) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"has to be one of {', '.join(choices)}")
    return value


def _member(kind: type[StrEnum], choices: tuple[str, ...], value: Any) -> StrEnum:
    return kind(_choice(choices, value))


def _nullable(check: Check, value: Any) -> Any:
    return None if value is None else check(value)


def _first(checks: list[Check], value: Any) -> Any:
    problem = ""
    for check in checks:
        try:
            return check(value)
        except ValueError as error:
            problem = problem or str(error)
    raise ValueError(problem)


def _list(check: Check, value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError("has to be a list")
    return [check(one) for one in value]


def _tuple(check: Check, value: Any) -> tuple[Any, ...]:
    return tuple(_list(check, value))


def _record(checks: list[Check], value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple) or len(value) != len(checks):
        raise ValueError(f"has to be a list of {len(checks)}")
    return tuple([check(one) for check, one in zip(checks, value, strict=True)])


def _dict(check: Check, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError("has to be an object")
    return {key: check(one) for key, one in value.items()}
