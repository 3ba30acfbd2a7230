"""Handler of ``audit.search``: records of the trail for callers that cannot read its files.

Each search is a process of its own (``isolator.audit.search``) with a small share of the processor, so that no
delivery waits for one. A user has one at a time, all together have ``AT_ONCE``; further ones wait their turn.
What is found goes out a block at a time, each when the one before has been read. A caller that reads nothing for
``STALLED`` seconds, or ends, ends its search.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from host.control.audit_types import AuditSearch
from host.control.endpoints import Caller, Verbs, serves
from host.control.terms import Nothing
from isolator.audit.search import CPU_SECONDS, FAILED, MEMORY
from isolator.errors import IsolatorError, UnavailableError
from isolator.ipc.tasks import Tasks

AT_ONCE = 2
WAITING = 64
"""Searches that are under way or wait; one more is refused."""
BLOCK = 1 << 16
"""Bytes of the trail in one notification, and bytes that may wait for a caller beside it."""
LINE = 4 << 20
STALLED = 600.0
PAUSE = 0.004
"""Seconds after each block, so that a caller that reads fast takes a small part of this process's time."""


class Searches(Verbs):
    """The searches of this process's callers."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tasks = Tasks()
        self._places = asyncio.Semaphore(AT_ONCE)
        self._turns: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._running: dict[Caller, asyncio.Task[None]] = {}

    @serves(AuditSearch)
    async def search(self, request: AuditSearch, caller: Caller) -> Nothing:
        if caller in self._running:
            raise UnavailableError("audit.search", "this connection searches already", "wait, or open another one")
        if len(self._running) >= WAITING:
            raise UnavailableError("audit.search", f"{WAITING} searches are under way", "try again")
        caller.narrow(BLOCK)
        over = caller.keep(lambda: self._end(caller))
        task = self._running[caller] = self._tasks.run("a search of the trail", self._run(request, caller))
        task.add_done_callback(lambda _: self._ended(caller, over))
        return {}

    def close(self) -> None:
        for caller in list(self._running):
            self._end(caller)

    def _ended(self, caller: Caller, over: Callable[[], None]) -> None:
        self._running.pop(caller, None)
        over()

    def _end(self, caller: Caller) -> None:
        if (task := self._running.get(caller)) is not None:
            task.cancel()

    async def _run(self, request: AuditSearch, caller: Caller) -> None:
        failure: IsolatorError | None = None
        try:
            async with self._turns[caller.uid], self._places:
                await self._stream(request, caller)
        except IsolatorError as error:
            failure = error
        except TimeoutError:
            caller.cut()
            return
        caller.notify(
            "audit.found", {"lines": [], "more": False, "error": failure.to_json() if failure is not None else None}
        )

    async def _stream(self, request: AuditSearch, caller: Caller) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-m", "isolator.audit.search", str(self._directory), str(os.getpid()),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, limit=LINE,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        try:
            process.stdin.write(json.dumps(request.wanted()).encode() + b"\n")
            process.stdin.close()
            block: list[str] = []
            size = 0
            while line := await process.stdout.readline():
                block.append(line.rstrip(b"\n").decode("ascii", "backslashreplace"))
                size += len(line)
                if size >= BLOCK:
                    await self._send(block, caller)
                    block, size = [], 0
            if block:
                await self._send(block, caller)
            words = await process.stderr.read(BLOCK)
            code = await process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        if code == FAILED:
            raise IsolatorError.from_json(_object(words))
        if code != 0:
            share = f"{CPU_SECONDS} s of the processor and {MEMORY >> 20} MiB"
            raise UnavailableError("audit.search", f"ended before it was done; it has {share}", "narrow it: --since")

    async def _send(self, block: list[str], caller: Caller) -> None:
        caller.notify("audit.found", {"lines": block, "more": True, "error": None})
        async with asyncio.timeout(STALLED):
            await caller.drained.wait()
        await asyncio.sleep(PAUSE)


def _object(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
