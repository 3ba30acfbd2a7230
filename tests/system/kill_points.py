"""``isolator serve`` with a hand on it: kills a process of this daemon, or itself, at a named step of a plugin's life.

Run by ``SteppedDaemon`` in place of the command. What to do stands in the file ``kill-at`` below the root, a line
``STEP:VICTIM`` each, and is done once. The steps are those that the code under test already tells apart: the stopwatch
of a start, and the calls of which a stop consists.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isolator.cage import cage
from isolator.launcher.client import Launcher
from isolator.layers.cgroup.layer import Cgroup
from isolator.recovery.journal import Journal
from isolator.supervisor import service
from isolator.supervisor.broker_link import BrokerLink
from isolator.supervisor.lifecycle.life import Life
from isolator.supervisor.run import Run
from tests.system.daemon import Daemon

PLUGIN = "echo"
START = (
    "spare", "clocks", "journal", "birth", "prepare cgroup", "prepare filesystem", "prepare proc", "send", "clone",
    "confirm groups", "view", "confirm view", "enter", "network", "confirm", "exec", "told",
)  # fmt: skip
STOP = ("ended", "recorded", "release", "groups gone", "journal gone", "network gone", "all gone")
STEPS = (*STOP, *START)
"""In the order in which a restart takes them."""


class SteppedDaemon(Daemon):
    """A daemon that can be told to kill one of its processes at a step."""

    def command(self) -> list[str]:
        return [sys.executable, "-I", __file__, str(self.root)]

    def kill_at(self, victims: dict[str, str]) -> None:
        """The next time that the plugin comes to a step of ``victims``, the process that stands there is killed."""
        _write(self.root / "kill-at", victims)

    @property
    def done(self) -> bool:
        """Whether all of them have been killed."""
        return not _read(self.root / "kill-at")


def _read(order: Path) -> dict[str, str]:
    return dict(line.split(":") for line in order.read_text().splitlines()) if order.exists() else {}


def _write(order: Path, victims: dict[str, str]) -> None:
    new = order.with_suffix(".new")
    new.write_text("".join(f"{step}:{victim}\n" for step, victim in victims.items()))
    new.rename(order)


def main() -> None:
    root = Path(sys.argv[1])
    order = root / "kill-at"
    processes: dict[str, Any] = {}
    """The launcher and the services, by name, as they were made last."""

    def reached(step: str) -> None:
        victims = _read(order)
        victim = victims.pop(step, "")
        if not victim:
            return
        _write(order, victims)
        if victim == "supervisor":
            signal.raise_signal(signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(processes[victim].pid, signal.SIGKILL)

    def wrap(owner: type, name: str, *, before: str = "", after: str = "", when: Callable[..., bool] | None = None):
        whole = getattr(owner, name)

        def tell(step: str, arguments: tuple[Any, ...]) -> None:
            if step and (when is None or when(*arguments)):
                reached(step)

        @functools.wraps(whole)
        def call(*arguments: Any, **further: Any) -> Any:
            tell(before, arguments)
            result = whole(*arguments, **further)
            tell(after, arguments)
            return result

        @functools.wraps(whole)
        async def call_async(*arguments: Any, **further: Any) -> Any:
            tell(before, arguments)
            result = await whole(*arguments, **further)
            tell(after, arguments)
            return result

        setattr(owner, name, call_async if inspect.iscoroutinefunction(whole) else call)

    class Ticking(cage.Stopwatch):
        def __call__(self, step: str) -> None:
            super().__call__(step)
            reached(step)

    cage.Stopwatch = Ticking  # type: ignore[misc]

    def remember(owner: type, name: Callable[[Any], str]) -> None:
        made = owner.__init__

        def init(self: Any, *arguments: Any, **further: Any) -> None:
            made(self, *arguments, **further)
            processes[name(self)] = self

        owner.__init__ = init

    remember(Launcher, lambda _: "launcher")
    remember(service.ChildProcess, lambda process: process.spec.name)
    wrap(Life, "_started", after="told")
    wrap(Life, "_record_end", before="ended", after="recorded")
    wrap(cage.Cage, "release", before="release")
    wrap(Cgroup, "release", after="groups gone")
    wrap(Journal, "forget", after="journal gone", when=lambda _, name: name.startswith(f"{PLUGIN}."))
    wrap(BrokerLink, "detach", after="network gone")
    wrap(Run, "take_down", after="all gone")
    # Services that die one after the other all day: only the pause between their starts is shortened.
    service._BACKOFF_LAST = service._LONGEST_AWAY = service._BACKOFF_FIRST  # type: ignore[misc]

    from host.cli.main import main as command_line

    sys.argv = ["isolator", "--root", str(root), "serve"]
    sys.exit(command_line())


if __name__ == "__main__":
    main()
