"""``isolator serve`` whose exchanges of services kill the old process, the new one or both at a named step.

Run by ``SteppedDaemon`` in place of the command. What to do stands in the file ``kill-at`` below the root:
STEP:SERVICE:VICTIM; it is done once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

from isolator.ipc.succession import Passage
from isolator.supervisor import service
from isolator.supervisor.service import ChildProcess, Generation
from isolator.supervisor.zygote import Zygote
from tests.system.daemon import Daemon

STEPS = ("loading", "held", "part", "left", "went on")
"""The new process loads; the old one is about to be asked to leave; hands over; has left; the new one serves."""
VICTIMS = ("old", "new", "both")


class SteppedDaemon(Daemon):
    """A daemon that can be told to kill a process in the next exchange."""

    def command(self) -> list[str]:
        return [sys.executable, "-I", __file__, str(self.root)]

    def kill_at(self, step: str, service: str, victim: str) -> None:
        """In the next exchange of the service, kill ``old``, ``new`` or ``both`` at that step."""
        order = self.root / "kill-at"
        new = order.with_suffix(".new")
        new.write_text(f"{step}:{service}:{victim}")
        new.rename(order)

    @property
    def done(self) -> bool:
        """Whether that has been done."""
        return not (self.root / "kill-at").exists()


def main() -> None:
    root = Path(sys.argv[1])
    order = root / "kill-at"
    present: dict[str, Any] = {}
    """The service that is exchanged, and its processes, as they are now."""

    def reached(step: str) -> None:
        name = present["service"].spec.name
        if not order.exists() or not order.read_text().startswith(f"{step}:{name}:"):
            return
        victim = order.read_text().rpartition(":")[2]
        order.unlink()
        for which in ("old", "new"):
            if victim in (which, "both"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(present[which].process.pid, signal.SIGKILL)

    spawn, hold, go_on, part = ChildProcess.spawn, ChildProcess.hold, ChildProcess.go_on, Passage.part
    first_answer = ChildProcess.first_answer

    async def spawned(self: ChildProcess, zygote: Zygote, inherited: dict[str, int]) -> Generation:
        exchanged = self.changing.locked()
        made = await spawn(self, zygote, inherited)
        if exchanged:
            present.update(service=self, old=self.current, new=made)
            reached("loading")
        return made

    def held(self: ChildProcess) -> None:
        hold(self)
        reached("held")

    async def passed(self: Passage, *arguments: Any) -> None:
        reached("part")
        await part(self, *arguments)

    async def answered(self: ChildProcess, work: Any, generation: Generation | None = None) -> Any:
        if generation is not None and self._waiting is not None:
            reached("left")
        return await first_answer(self, work, generation)

    def went_on(self: ChildProcess, generation: Generation | None) -> None:
        go_on(self, generation)
        if generation is present["new"]:
            reached("went on")

    ChildProcess.spawn, ChildProcess.hold, ChildProcess.go_on = spawned, held, went_on  # type: ignore[method-assign]
    ChildProcess.first_answer, Passage.part = answered, passed  # type: ignore[method-assign,assignment]
    # Services that die all the time: only the pause between their starts is shortened.
    service._BACKOFF_LAST = service._LONGEST_AWAY = service._BACKOFF_FIRST  # type: ignore[misc]

    from host.cli.main import main as command_line

    sys.argv = ["isolator", "--root", str(root), "serve"]
    sys.exit(command_line())


if __name__ == "__main__":
    main()
