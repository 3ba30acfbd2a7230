"""Imports without others that they bring along: memory and start of every process count.

Of what asyncio imports, a third of the time and a fourth of the memory is for encryption, for tracebacks with lines
of source, and for looking into functions. None of it is used before something fails; nor does a command that runs one
cage use, before that, what else it and ``pathlib`` bring along (``put_off_for_a_command``).
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType

TYPE_CHECKING = False  # typing, which has it too, takes longer to import than all else here; mypy goes by the name
if TYPE_CHECKING:
    import hashlib
    from collections.abc import Callable, Collection, Iterator
    from typing import Any


class _Later(ModuleType):
    """A module that is imported when something of it is used first, but for what it has ``at_once``."""

    def __init__(self, name: str, at_once: dict[str, Any]) -> None:
        super().__init__(name)
        self.__dict__.update(at_once)

    def __getattr__(self, attribute: str) -> Any:
        name: str = self.__dict__["__name__"]
        if attribute == "__path__" and name != "logging":  # asked by "from NAME import"; it is no package
            raise AttributeError(attribute)
        module = _load(name)
        self.__dict__.update(module.__dict__)
        return getattr(module, attribute)


def _load(name: str) -> ModuleType:
    if isinstance(sys.modules.get(name), _Later):
        del sys.modules[name]
    __import__(name)  # unlike import_module, seen by -X importtime
    return sys.modules[name]


def import_asyncio(*, without: Collection[str] = ("ssl",)) -> None:
    """Import asyncio and what it needs until something fails; modules that are to be absent can be imported later.

    OpenSSL takes a third of the time of asyncio and hashlib, and a fifth of their memory; Python has hashes of its own.
    """
    _put_off(_OF_ASYNCIO)
    with _absent(without):
        __import__("asyncio")
        __import__("hashlib")


def put_off_for_a_command() -> None:
    """Put off modules that asyncio and ``pathlib`` import and a command that ends soon uses only when something fails.

    A daemon logs, and starts programs.
    """
    _put_off(_OF_ASYNCIO | _OF_A_COMMAND)


def import_hashlib(*, without: Collection[str]) -> None:
    """Import hashlib, as ``import_asyncio`` does."""
    with _absent(without):
        __import__("hashlib")


def sha256_of_much() -> hashlib._Hash:
    """A SHA-256, as of hashlib, for what may be large: OpenSSL's, which a process without it loads at the first use."""
    import _hashlib

    made: hashlib._Hash = _hashlib.openssl_sha256()
    return made


def _put_off(modules: dict[str, dict[str, Any]]) -> None:
    for name in modules.keys() - sys.modules.keys():
        later = sys.modules[name] = _Later(name, modules[name])
        package, _, of_it = name.rpartition(".")
        if package and package != "asyncio":  # "import PACKAGE.NAME" finds it there; asyncio itself goes by sys.modules
            setattr(__import__(package), of_it, later)


@contextmanager
def _absent(names: Collection[str]) -> Iterator[None]:
    missing = {*names} - sys.modules.keys()
    sys.modules |= dict.fromkeys(missing)  # type: ignore[arg-type]  # None: an import of it fails
    try:
        yield
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
    __import__("logging").getLogger("asyncio").addFilter(_is_news)


def _is_news(record: Any) -> bool:
    """Whether a record of asyncio's tells anything: of its own streams it warns at the end of each TLS connection."""
    return not str(record.msg).startswith("returning true from eof_received() has no effect")


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


class _LoggerLater:
    """A logger that is made when something is to be written. What asyncio gives it a handler for is the default."""

    def __init__(self, name: str) -> None:
        self._name = name

    def addHandler(self, _handler: None) -> None:
        """Do without the handler: there is none yet."""

    def debug(self, *_message: object) -> None:
        """Write nothing, as loggers do by default."""

    def __getattr__(self, attribute: str) -> Any:
        return getattr(_load("logging").getLogger(self._name), attribute)


def _later(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that is imported when it is called."""

    def call(*arguments: Any, **named: Any) -> Any:
        return getattr(_load(module), name)(*arguments, **named)

    return call


_OF_ASYNCIO: dict[str, dict[str, Any]] = {
    "linecache": {}, "tokenize": {}, "textwrap": {}, "locale": {}, "asyncio.sslproto": {}, "asyncio.staggered": {},
    "inspect": _OF_INSPECT,
    "traceback": {"extract_stack": _later("traceback", "extract_stack")},
    "urllib.parse": {"quote_from_bytes": _later("urllib.parse", "quote_from_bytes")},
}  # fmt: skip
_OF_A_COMMAND: dict[str, dict[str, Any]] = {
    "logging": {"getLogger": _LoggerLater, "StreamHandler": lambda: None, "DEBUG": 10},
    "subprocess": {"PIPE": -1, "STDOUT": -2, "DEVNULL": -3},
}
"""Modules by name, each with what is taken of it at once."""
