# SPDX-FileCopyrightText: Isolator contributors
# SPDX-License-Identifier: Apache-2.0
"""Client of the Isolator daemon: emit events, serve methods of the host API, follow the audit trail.

``Client`` waits, ``AsyncClient`` is for asyncio. Neither needs anything beyond the standard library. A name is imported
when it is first used, so that a program which only waits never loads asyncio.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from isolator_client.errors import (
    ConfinementError,
    DeniedError,
    IsolatorError,
    NeedsApprovalError,
    NotFoundError,
    UnavailableError,
    UsageError,
)

if TYPE_CHECKING:
    from isolator_client.aio import AsyncClient, Handler
    from isolator_client.blocking import Client
    from isolator_client.calls import Delivered, Emitted, Health, Staged
    from isolator_client.protocol import Notification
    from isolator_client.trail import Recorded

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "Client",
    "ConfinementError",
    "Delivered",
    "DeniedError",
    "Emitted",
    "Handler",
    "Health",
    "IsolatorError",
    "NeedsApprovalError",
    "NotFoundError",
    "Notification",
    "Recorded",
    "Staged",
    "UnavailableError",
    "UsageError",
]

_HOMES = {
    "AsyncClient": "aio",
    "Handler": "aio",
    "Client": "blocking",
    "Delivered": "calls",
    "Emitted": "calls",
    "Health": "calls",
    "Staged": "calls",
    "Notification": "protocol",
    "Recorded": "trail",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
