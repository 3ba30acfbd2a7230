"""Imports without others that they bring along: memory and start of every process count.

Of what asyncio imports, a third of the time and a fourth of the memory is for encryption, for tracebacks with lines
of source, and for looking into functions. None of it is used before something fails.
"""

from __future__ import annotations

import sys
from functools import partial
from types import FunctionType, MethodType, ModuleType

TYPE_CHECKING = False  # typing, which has it too, takes longer to import than all else here; mypy goes by the name
if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from typing import Any


class _Later(ModuleType):
    """A module that is imported when something of it is used first, but for what it has ``at_once``."""

    def __init__(self, name: str, at_once: dict[str, Any]) -> None:
        super().__init__(name)
        self.__dict__.update(at_once)

    def __getattr__(self, attribute: str) -> Any:
        name: str = self.__dict__["__name__"]
        if sys.modules.get(name) is self:
            del sys.modules[name]
        __import__(name)  # unlike import_module, seen by -X importtime
        module = sys.modules[name]
        self.__dict__.update(module.__dict__)
        return getattr(module, attribute)


def import_asyncio(*, without: Collection[str] = ("ssl",)) -> None:
    """Import asyncio and what it needs until something fails; modules that are to be absent can be imported later.

    OpenSSL takes a third of the time of asyncio and hashlib, and a fifth of their memory; Python has hashes of its own.
    """
    for name in ("linecache", "tokenize", "textwrap", "locale", "inspect", "asyncio.sslproto", "asyncio.staggered"):
        if name not in sys.modules:
            sys.modules[name] = _Later(name, _OF_INSPECT if name == "inspect" else {})
    missing = {*without} - sys.modules.keys()
    sys.modules |= dict.fromkeys(missing)  # type: ignore[arg-type]  # None: an import of it fails
    try:
        __import__("asyncio")
        __import__("hashlib")
    finally:
        for name in missing:
            del sys.modules[name]


def give_asyncio_tls() -> None:
    """Have asyncio take up ``ssl`` after all, for a process that has imported it without."""
    import asyncio.base_events
    import asyncio.selector_events
    import ssl

    for module in (asyncio.base_events, asyncio.selector_events):
        vars(module)["ssl"] = ssl


def _is_coroutine_function(function: Callable[..., Any]) -> bool:
    """Whether a call of it makes a coroutine."""
    while isinstance(function, partial | MethodType):
        function = function.func if isinstance(function, partial) else function.__func__
    return bool(getattr(getattr(function, "__code__", None), "co_flags", 0) & 0x80)


def _unwrap(function: Any) -> Any:
    while (inner := getattr(function, "__wrapped__", None)) is not None:
        function = inner
    return function


_OF_INSPECT: dict[str, Any] = {
    "iscoroutinefunction": _is_coroutine_function,
    "isfunction": lambda value: isinstance(value, FunctionType),
    "unwrap": _unwrap,
}
"""Functions that asyncio calls for each handler of a signal; ``signal`` shows the one before in an error of its own."""
