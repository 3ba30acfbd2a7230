"""Structs: classes of named fields, as ``dataclasses`` makes them, without compiling methods for each.

Making a dataclass takes up to half a millisecond, and a command imports some forty before its cage starts. Those that
``isolator run`` needs are structs; elsewhere dataclasses do as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")

_FIELDS, _DEFAULTS = "__struct_fields__", "__struct_defaults__"


class Field:
    """Default of a field: what ``make`` returns, for each object anew; None: the object sets it itself."""

    def __init__(self, make: Callable[[], Any] | None) -> None:
        self.make = make


def field(*, default_factory: Callable[[], Any] | None = None, init: bool = True) -> Any:
    """A field whose default is made for each object anew; or (``init=False``) that ``__post_init__`` sets."""
    return Field(default_factory if init else None)


@dataclass_transform(field_specifiers=(field,))
def struct_class(*, frozen: bool = False) -> Callable[[type[T]], type[T]]:
    """Give a class ``__init__``, ``__eq__`` and ``__repr__`` by its annotated fields; ``frozen``: and a hash."""

    def decorate(cls: type[T]) -> type[T]:
        names: dict[str, None] = {}
        defaults: dict[str, Any] = {}
        for base in reversed(cls.__mro__[1:]):
            names |= dict.fromkeys(base.__dict__.get(_FIELDS, ()))
            defaults |= base.__dict__.get(_DEFAULTS, {})
        for name, hint in cls.__annotations__.items():
            if str(hint).startswith(("ClassVar", "typing.ClassVar")):
                continue
            names[name] = None
            if name in cls.__dict__:
                defaults[name] = cls.__dict__[name]
        setattr(cls, _FIELDS, tuple(names))
        setattr(cls, _DEFAULTS, defaults)
        methods = {"__init__": _init, "__eq__": _equal, "__repr__": _show, "__hash__": _hash if frozen else None}
        if frozen:
            methods |= {"__setattr__": _refuse, "__delattr__": _refuse}
        for name, given in (methods | {"__match_args__": tuple(names)}).items():
            setattr(cls, name, given)
        return cls

    return decorate


def replace(value: T, /, **changes: Any) -> T:
    """A copy with other values for some fields."""
    cls = type(value)
    return cls(**{name: getattr(value, name) for name in getattr(cls, _FIELDS)} | changes)


def _init(self: Any, *values: Any, **named: Any) -> None:
    cls = type(self)
    names: tuple[str, ...] = getattr(cls, _FIELDS)
    if len(values) == len(names) and not named:  # as most are made
        self.__dict__.update(zip(names, values, strict=True))
        if (complete := getattr(self, "__post_init__", None)) is not None:
            complete()
        return
    defaults: dict[str, Any] = getattr(cls, _DEFAULTS)
    made = self.__dict__
    made.update(zip(names, values, strict=False))
    made.update(named)
    if len(made) != len(values) + len(named) or not named.keys() <= {*names}:
        raise TypeError(f"{cls.__name__} has the fields {', '.join(names)}, each once")
    for name in names[len(values) :] if len(made) < len(names) else ():
        if name in made:
            continue
        if name not in defaults:
            raise TypeError(f"{cls.__name__} needs {name}")
        elif not isinstance(default := defaults[name], Field):
            made[name] = default
        elif default.make is not None:
            made[name] = default.make()
    if (complete := getattr(self, "__post_init__", None)) is not None:
        complete()


def _values(self: Any) -> tuple[Any, ...]:
    return tuple([getattr(self, name) for name in getattr(type(self), _FIELDS)])


def _equal(self: Any, other: Any) -> Any:
    return _values(self) == _values(other) if type(other) is type(self) else NotImplemented


def _hash(self: Any) -> int:
    return hash(_values(self))


def _show(self: Any) -> str:
    shown = (f"{name}={getattr(self, name)!r}" for name in getattr(type(self), _FIELDS))
    return f"{type(self).__name__}({', '.join(shown)})"


def _refuse(self: Any, name: str, *_: Any) -> None:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"cannot change {name} of a {type(self).__name__}")
