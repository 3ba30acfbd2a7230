"""``isolator serve`` in which each piece of lasting work fails once.

The faults stand for those that nobody has thought of; each is raised where such work would raise it.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from pathlib import Path
from typing import Any

WORK = (
    "watch over the launcher",
    "watch over audit",
    "watch over broker",
    "watch over host",
    "extension of the start",
    "watchdog",
    "making of a spare",
    "snapshots",
    "discovery",
    "answers to denied calls",
    "announcement of plugin echo",
    "life of plugin echo",
)
"""What fails, in the daemon's words."""


class Fault(Exception):
    """What is raised."""


def _fail_once(owner: Any, attribute: str, *, once_for: int | None = None, at: str = "", after: bool = False) -> None:
    """Let the first call of a function fail, or the first with each value of an argument.

    Not before the file ``at`` is there, if one is named; ``after``: it has done everything by then.
    """
    real, failed = getattr(owner, attribute), set()

    def due(arguments: tuple[Any, ...]) -> bool:
        key = arguments[once_for] if once_for is not None else ""
        if key in failed or (at and not Path(at).exists()):
            return False
        failed.add(key)
        return True

    @functools.wraps(real)
    def call(*arguments: Any, **keywords: Any) -> Any:
        if not due(arguments):
            return real(*arguments, **keywords)
        if after:
            real(*arguments, **keywords)
        raise Fault(attribute)

    @functools.wraps(real)
    async def wait(*arguments: Any, **keywords: Any) -> Any:
        if not due(arguments):
            return await real(*arguments, **keywords)
        if after:
            await real(*arguments, **keywords)
        raise Fault(attribute)

    setattr(owner, attribute, wait if inspect.iscoroutinefunction(real) else call)


def main() -> int:
    """Put the faults in place and serve."""
    from host.cli.main import main as command_line
    from isolator.cage.warm_pool import WarmPool
    from isolator.cli import daemon
    from isolator.layers.seccomp.notifier import SeccompNotifier
    from isolator.registration.discovery import Discovery
    from isolator.supervisor import alive
    from isolator.supervisor.plugins import PluginTable
    from isolator.supervisor.run import Run

    later = os.environ["FAULTS_AT"]
    _fail_once(alive, "until_silent", once_for=3)
    _fail_once(daemon, "_extend_timeout")
    _fail_once(daemon, "_watchdog")
    _fail_once(WarmPool, "_make")
    _fail_once(Run, "detect_drift", at=later)
    _fail_once(Discovery, "_scan", at=later)
    _fail_once(SeccompNotifier, "_busy", at=later)
    _fail_once(PluginTable, "announce", at=later)
    _fail_once(Run, "take_down", at=later, after=True)
    return command_line()


if __name__ == "__main__":
    sys.exit(main())
