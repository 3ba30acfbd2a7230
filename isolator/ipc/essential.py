"""Work without which a service is of no use: when it fails, its process ends, and the supervisor starts another one.

A task or thread that dies in silence leaves a process that answers and does nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Coroutine
from typing import Any

_log = logging.getLogger(__name__)


def essential(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    """Run ``work`` in a task whose failure ends this process; that it returns or is cancelled is its owner's doing."""
    task = asyncio.get_running_loop().create_task(work, name=name)
    task.add_done_callback(_end_if_failed)
    return task


def end_process(name: str, error: BaseException) -> None:
    """End this process at once, after one line."""
    why = f"{type(error).__name__}: {error}"
    _log.critical("%s has failed: %s; the process ends, and another takes its place", name, why)
    os._exit(1)


def _end_if_failed(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        end_process(task.get_name(), error)
