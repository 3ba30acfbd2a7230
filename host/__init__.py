"""Host: registry, queue, dispatch, host API, control socket; everything that serves the platform. Runs unprivileged.

For a platform that embeds it, ``PluginHost`` is the whole public surface.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing, which has it too, takes longer to import than all else here; mypy goes by the name
if TYPE_CHECKING:
    from typing import Any

    from host.client.plugin_host import Delivered, Emitted, PluginHost, Recorded

__all__ = ["Delivered", "Emitted", "PluginHost", "Recorded"]


def __getattr__(name: str) -> Any:
    """Import the library on first use: the command line imports this package and must stay light."""
    if name in __all__:
        from host.client import plugin_host

        return getattr(plugin_host, name)
    raise AttributeError(f"module 'host' has no attribute {name!r}")
