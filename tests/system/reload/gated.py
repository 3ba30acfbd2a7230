"""``isolator serve`` with gates: an exchange waits at a named place for what a test does meanwhile, and takes notes.

Run by ``GatedDaemon`` in place of the command, and again by each exec. The file ``gate`` below the root names the place
of the next wait; ``notes`` has a line for each thing that the supervisor did, in their order.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isolator.ipc.channel import ALIVE, Channel
from isolator.ipc.messages import ConnectRun, Leave
from isolator.ipc.succession import Passage
from isolator.registration.registrar import Registrar
from isolator.registration.store import Registration
from isolator.supervisor import services
from isolator.supervisor.reload import exchange as exchanging
from isolator.supervisor.rest import Rest
from isolator.supervisor.service import ChildProcess, Generation
from tests.system.daemon import Daemon

BEFORE, LOADED, NOTED, ANSWERED, PARTING = "before", "loaded", "noted", "answered", "parting"
ADDING = "adding"
"""Before an exchange, until a reload waits for it or comes to rest; when the new host has loaded and the old one serves
still, until ``go`` is there; when note was taken of all that the old one knows, and it serves still, until ``go`` is
there; when the new one has answered its hello, until ``go`` is there and it has had turns of its event loop; when the
old one hands over, until no connect of it is open; and, until ``go`` is there, when a plugin is registered, for which
no exchange waits then."""
_LOOK = 0.005
_TURNS = 50


class GatedDaemon(Daemon):
    """A daemon whose next exchange waits where it is told to."""

    def command(self) -> list[str]:
        return [sys.executable, "-I", __file__, str(self.root)]

    def wait_at(self, place: str) -> None:
        """Have the next exchange that comes there wait."""
        (self.root / "notes").write_text("")
        (self.root / "gate").write_text(place)

    def go(self) -> None:
        """Let it go on."""
        (self.root / "go").touch()

    @property
    def notes(self) -> list[str]:
        """What was noted since ``wait_at``."""
        return (self.root / "notes").read_text().splitlines()


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that has no event."""
    while not condition():  # noqa: ASYNC110 # see above
        await asyncio.sleep(_LOOK)


def main() -> None:
    root = Path(sys.argv[1])
    gate, go = root / "gate", root / "go"
    present: dict[str, Any] = {}
    """The lock of exchanges, whether there was a rest, and the service that is exchanged with its old process."""

    def note(text: str) -> None:
        with (root / "notes").open("a") as notes:
            notes.write(f"{text}\n")

    def waits_at(place: str) -> bool:
        waits = gate.exists() and gate.read_text() == place
        if waits:
            gate.unlink()
            note(place)
        return waits

    class Watched(asyncio.Lock):
        waiting = 0

        async def acquire(self) -> bool:  # type: ignore[override]
            self.waiting += 1
            try:
                return await super().acquire()
            finally:
                self.waiting -= 1

    make_services, come, handed_over = services.Services.__init__, Rest.come, exchanging._hand_over
    exchanged, first_answer, part, tell = services.exchange, ChildProcess.first_answer, Passage.part, ChildProcess.tell
    ask, add = Channel.ask, Registrar.add

    def made(self: services.Services, *arguments: Any) -> None:
        make_services(self, *arguments)
        self.exchanging = present["lock"] = Watched()

    def comes(self: Rest) -> None:
        note("at rest")
        present["rest"] = True
        come(self)

    async def hand_over(process: ChildProcess, *arguments: Any) -> None:
        served = sorted(str(one.fields["op"]) for one in present["old"].channel._tasks.values())
        note(f"{process.spec.name} leaves and serves {', '.join(served)}")
        if process.spec.name == "host" and waits_at(LOADED):
            await until(go.exists)
            go.unlink()
        await handed_over(process, *arguments)

    async def exchange_one(process: ChildProcess) -> None:
        if waits_at(BEFORE):
            await until(lambda: present["lock"].waiting or "rest" in present)
        present.update(name=process.spec.name, old=process.current)
        await exchanged(process)
        note(f"exchanged {process.spec.name}")

    async def answered(self: ChildProcess, work: Any, generation: Generation | None = None) -> Any:
        result = await first_answer(self, work, generation)
        if generation is not None and self._waiting is not None and self.spec.name == "host" and waits_at(ANSWERED):
            await until(go.exists)
            go.unlink()
            for _ in range(_TURNS):
                await generation.channel.call(ALIVE)
        return result

    async def asks(self: Channel, request: Any, **further: Any) -> Any:
        if isinstance(request, Leave) and self.name == "host" and waits_at(NOTED):
            await until(go.exists)
            go.unlink()
        return await ask(self, request, **further)

    async def passed(self: Passage, *arguments: Any) -> None:
        if present["name"] == "host" and waits_at(PARTING):
            await until(go.exists)
            go.unlink()
            served = present["old"].channel._tasks
            await until(lambda: not any(one.fields["op"] == ConnectRun.op for one in served.values()))
        await part(self, *arguments)

    def told(self: ChildProcess, request: Any, **further: Any) -> None:
        if self._waiting is not None:
            note(f"held {request.op}")
        tell(self, request, **further)

    def added(self: Registrar, token: str) -> Registration:
        registration = add(self, token)
        if waits_at(ADDING):
            patience, exchanging.CHANGES = exchanging.CHANGES, 0.0
            while not go.exists():
                time.sleep(_LOOK)
            go.unlink()
            exchanging.CHANGES = patience
        return registration

    services.Services.__init__ = made  # type: ignore[method-assign,assignment]
    services.exchange = exchange_one  # type: ignore[assignment]
    exchanging._hand_over = hand_over  # type: ignore[assignment]
    Rest.come, Passage.part = comes, passed  # type: ignore[method-assign,assignment]
    ChildProcess.first_answer, ChildProcess.tell = answered, told  # type: ignore[method-assign,assignment]
    Channel.ask, Registrar.add = asks, added  # type: ignore[method-assign,assignment]

    from host.cli.main import main as command_line

    sys.argv = ["isolator", "--root", str(root), "serve", *sys.argv[2:]]
    sys.exit(command_line())


if __name__ == "__main__":
    main()
