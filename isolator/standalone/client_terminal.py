"""``isolator run --tty`` of who is not root: the daemon makes the terminal, this process copies keys and screen."""

from __future__ import annotations

import asyncio
import functools
import signal
from typing import TYPE_CHECKING

from isolator.linux.readable import readable
from isolator.standalone.streams import SILENT_ENDS
from isolator.standalone.terminal import CageTerminal

if TYPE_CHECKING:
    from isolator.standalone.client import Run


def wait_with_terminal(run: Run) -> dict[str, str]:
    """The daemon's last word; keys and output are copied meanwhile. Raises IsolatorError."""
    return asyncio.run(_wait(run))


async def _wait(run: Run) -> dict[str, str]:
    end = None
    resized = functools.partial(asyncio.get_running_loop().add_signal_handler, signal.SIGWINCH)
    resized(lambda: None)  # from here on every signal ends the loop's wait, and is passed on at once
    while end is None and run.terminal < 0:
        end = await _hear(run)
    if end is not None:
        return end
    terminal = CageTerminal(run.terminal)
    try:
        resized(terminal.resize)
        terminal.join()
        while end is None:
            end = await _hear(run)
        await terminal.finish()
        return end
    finally:
        if end is None or end["end"] not in SILENT_ENDS:
            terminal.end_line()
        terminal.close()


async def _hear(run: Run) -> dict[str, str] | None:
    await readable(run.sock.fileno())
    return run.hear()
