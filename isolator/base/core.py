"""pydantic's core: reads and writes JSON, checks values. Its extension module alone.

The package around it imports descriptions of schemas for type checkers, which take 1.5 MiB of every process and 20 ms.
Whoever imports the package later gets the whole of it.
"""

from __future__ import annotations

import functools
import sys
import types
from importlib import import_module
from importlib.util import find_spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pydantic_core import PydanticSerializationError, SchemaError, SchemaValidator, ValidationError, to_json

_PACKAGE = "pydantic_core"
_RARE = {"decimal": "Decimal", "fractions": "Fraction", "uuid": "UUID"}
__all__ = ["PydanticSerializationError", "SchemaError", "SchemaValidator", "ValidationError", "from_json", "to_json"]


def _load() -> types.ModuleType:
    spec = find_spec(_PACKAGE)
    if _PACKAGE in sys.modules or spec is None or spec.submodule_search_locations is None:
        return import_module(_PACKAGE)
    around = sys.modules[_PACKAGE] = types.ModuleType(_PACKAGE)
    vars(around)["__path__"] = spec.submodule_search_locations
    try:
        return import_module(f"{_PACKAGE}._pydantic_core")
    except ImportError:  # a version that has it elsewhere
        pass
    finally:
        del sys.modules[_PACKAGE]
    return import_module(_PACKAGE)


def _caching(strings: str) -> Callable[..., Any]:
    """``from_json`` with a cache for these strings alone, where that can be chosen (pydantic 2.7)."""
    read: Callable[..., Any] = _core.from_json
    try:
        read(b"0", cache_strings=strings)
    except (TypeError, ValueError):
        return read
    return functools.partial(read, cache_strings=strings)


_core = _load()
globals().update({name: getattr(_core, name) for name in __all__})
from_json = _caching("none")
"""Values are nearly all new strings, which cost a third of their reading to look up in a cache."""
from_json_of_few_keys = _caching("keys")
"""For documents that all have the same keys: a third faster, for 260 KiB of the process that uses it."""


def write_no_rare_types() -> None:
    """Have ``to_json`` write no Decimal, Fraction or UUID in this process.

    It would import their modules with its first use, half a MiB for what no record and no answer has.
    """
    absent = {name: {kind: type(kind, (), {})} for name, kind in _RARE.items() if name not in sys.modules}
    for name, kinds in absent.items():
        vars(sys.modules.setdefault(name, types.ModuleType(name))).update(kinds)
    _core.to_json(None)
    for name in absent:
        del sys.modules[name]
