"""Imports of modules without others that they take where there are any: memory and start of every process count."""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing, which has it too, takes longer to import than all else here; mypy goes by the name
if TYPE_CHECKING:
    from collections.abc import Collection


def import_without(absent: Collection[str], *names: str) -> None:
    """Import modules as on a host that lacks the absent ones, which can be imported afterwards.

    OpenSSL takes a third of the time of asyncio and hashlib, and a fifth of their memory; Python has hashes of its own.
    """
    missing = {*absent} - sys.modules.keys()
    sys.modules |= dict.fromkeys(missing)  # type: ignore[arg-type]  # None: an import of it fails
    try:
        for name in names:
            __import__(name)
    finally:
        for name in missing:
            del sys.modules[name]


def give_asyncio_tls() -> None:
    """Have asyncio take up ``ssl`` after all, for a process that has imported it without."""
    import asyncio.base_events
    import asyncio.selector_events
    import asyncio.sslproto
    import importlib
    import ssl

    if getattr(asyncio.sslproto, "ssl", None) is None:
        importlib.reload(asyncio.sslproto)
        for module in (asyncio.base_events, asyncio.selector_events):
            vars(module)["ssl"] = ssl
