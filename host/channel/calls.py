"""Calls of a plugin to the host API on one connection: those that are not answered, and what becomes of them elsewhere.

A host that leaves waits for what it does itself, and not for what others do (``patient``). What is still open is read
again by the host that takes its place.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class OpenCall:
    """A call that is not answered: its line, and whether it waits for somebody else."""

    line: bytes
    waits: bool = False


_present: ContextVar[OpenCall | None] = ContextVar("call", default=None)
"""The call that is served."""


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """While entered, the call that is served waits for others, who may take their time."""
    call = _present.get()
    if call is None:
        yield
        return
    call.waits = True
    try:
        yield
    finally:
        call.waits = False


class OpenCalls:
    """The calls of one connection; ``answered`` is called when one of them is no longer open."""

    def __init__(self, answered: Callable[[], None]) -> None:
        self._calls: dict[asyncio.Task[None], OpenCall] = {}
        self._answered = answered

    def __len__(self) -> int:
        return len(self._calls)

    def begin(self, line: bytes, serving: Coroutine[Any, Any, None]) -> None:
        """Serve the call of a line, which has no newline."""
        call, context = OpenCall(line), copy_context()
        context.run(_present.set, call)
        task = asyncio.get_running_loop().create_task(serving, context=context)
        self._calls[task] = call
        task.add_done_callback(self._ended)

    @property
    def busy(self) -> bool:
        """Whether one is open that does not wait for others."""
        return any(not call.waits for call in self._calls.values())

    def break_off(self) -> list[bytes]:
        """Serve none any more; returns the lines of those that are not answered, for whoever reads them again."""
        lines = [call.line for task, call in self._calls.items() if not task.done()]
        self.cancel()
        return lines

    def cancel(self) -> None:
        """Serve none any more."""
        for task in self._calls:
            task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._calls[task]
        self._answered()
