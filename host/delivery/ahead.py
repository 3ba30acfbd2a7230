"""Results that are made ahead: while an event is synced, a part of its first attempt is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class MadeAhead(Generic[P, T]):
    """A function whose result may be made ahead; it is used once, by the next call, and only for equal arguments."""

    def __init__(self, make: Callable[P, T]) -> None:
        self._make = make
        self._made: tuple[tuple[object, ...], T] | None = None

    def prepare(self, *args: P.args, **no_keywords: P.kwargs) -> None:
        """Make the result of a call that will most likely come."""
        self._made = (args, self._make(*args, **no_keywords))

    def __call__(self, *args: P.args, **no_keywords: P.kwargs) -> T:
        made, self._made = self._made, None
        return made[1] if made is not None and made[0] == args else self._make(*args, **no_keywords)
