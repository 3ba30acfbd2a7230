"""``isolator serve`` with a hand on its reloads: kills itself at a named step of one, or does something at the exec.

Run by ``FaultyDaemon`` in place of the command, and again by each exec. What to do stands in files below the root, and
is done once: in ``kill-at`` a step, in ``at-exec`` words, see ``_at_exec``. ``state.json`` has the state of the last
exec.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from isolator.cage.cage import Cage
from isolator.errors import UnavailableError
from isolator.ipc.handover import CageState
from isolator.linux.memfd import make_sealed, read_sealed
from isolator.paths import Paths
from isolator.recovery import daemon as recovery
from isolator.supervisor import services, supervisor
from isolator.supervisor.lifecycle.plugin import Plugin
from isolator.supervisor.reload import adopt, adoption, formats, reloader, trial
from isolator.supervisor.service import ChildProcess
from tests.system.daemon import Daemon

BEFORE_EXEC = ("asked", "tried", "at rest", "exec")
AFTER_EXEC = ("read", "children", "launchers", "services", "adopted", "kept", "exchanged")
STEPS = (*BEFORE_EXEC, *AFTER_EXEC)


class FaultyDaemon(Daemon):
    """A daemon whose next reload goes as it is told."""

    def command(self) -> list[str]:
        return [sys.executable, "-I", __file__, str(self.root)]

    def kill_at(self, step: str) -> None:
        """The next reload kills the supervisor there."""
        (self.root / "kill-at").write_text(step)

    def at_exec(self, *words: str) -> None:
        """The next exec does these first."""
        (self.root / "at-exec").write_text("\n".join(words))

    def at_rest(self, *words: str) -> None:
        """The next reload does these in the moment in which nothing is under way any more."""
        (self.root / "at-rest").write_text("\n".join(words))

    def keep_service(self, name: str) -> None:
        """The next exchange of this service fails before anything is done."""
        (self.root / "keep-service").write_text(name)

    def hang_at(self, step: str) -> None:
        """The next reload hangs there."""
        (self.root / "kill-at").write_text(f"{step} and hang")

    def fail_for(self, plugin: str) -> None:
        """The next image finds a fault of its own when it has read the layers of this plugin's cages back."""
        (self.root / "fail-for").write_text(plugin)

    def hand_over_with(self, path: Sequence[str | int], value: Any) -> None:
        """The next exec hands over a state with ``value`` in the place that keys and indexes lead to."""
        (self.root / "with").write_text(json.dumps([path, value]))

    @property
    def handed_over(self) -> Any:
        """The state of the last exec, as JSON, without what ``hand_over_with`` has put there."""
        return json.loads((self.root / "state.json").read_text())

    def hand_over_without(self, layer: str) -> None:
        """The next reload comes from a version whose cages have no such layer."""
        (self.root / "without").write_text(layer)


def _take(path: Path) -> str:
    text = path.read_text() if path.exists() else ""
    path.unlink(missing_ok=True)
    return text


def _at_exec(root: Path, words: str) -> None:
    """``fail``: as if the program were gone; ``term``, ``hup``: a signal comes; ``kill PID``; ``pause SECONDS``;
    ``leak``: a descriptor, a child and a zombie that nobody names; ``loosen PLUGIN``: its cap on tasks is lifted;
    ``spoil``: host.toml is half written; ``run COMMAND``: of a shell; ``another thread``: not the main one executes;
    ``unlink KEY``: the other end of the socket that the state has there is told its end."""
    for line in words.splitlines():
        word, _, value = line.partition(" ")
        if word == "fail":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if word in ("term", "hup"):
            os.kill(os.getpid(), {"term": signal.SIGTERM, "hup": signal.SIGHUP}[word])
        if word == "kill":
            os.kill(int(value), signal.SIGKILL)
            os.waitid(os.P_PID, int(value), os.WEXITED | os.WNOWAIT)
        if word == "loosen":
            for folder in recovery.subtree_folders(Paths.of(root)):
                for cap in folder.glob(f"{value}.*/pids.max"):
                    cap.write_text("max")
        if word == "unlink":
            mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            other.close()
            os.dup2(mine.fileno(), json.loads((root / "state.json").read_text())[value], inheritable=True)
        if word == "spoil":
            Paths.of(root).host_toml.write_text("[roles\n")
        if word == "run":
            subprocess.run(value, shell=True, check=True)  # a line of shell that the test itself has written
        if word == "pause":
            time.sleep(float(value))
        if word == "leak":
            os.set_inheritable(os.open("/dev/full", os.O_RDONLY), True)
            subprocess.Popen(["sleep", "1000"])
            zombie = os.posix_spawn("/bin/true", ["true"], os.environ)  # a Popen that is dropped would reap it
            os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT)


def main() -> None:
    root = Path(sys.argv[1])
    order = root / "kill-at"

    def reached(step: str) -> None:
        if not step or not order.exists():
            return
        if order.read_text() == step:
            order.unlink()
            signal.raise_signal(signal.SIGKILL)
        if order.read_text() == f"{step} and hang":
            order.unlink()
            (root / "hangs").touch()
            threading.Event().wait()

    def wrap(owner: Any, name: str, *, before: str = "", after: str = "") -> None:
        whole: Callable[..., Any] = getattr(owner, name)

        def call(*arguments: Any, **further: Any) -> Any:
            reached(before)
            result = whole(*arguments, **further)
            if not hasattr(result, "__await__"):
                reached(after)
                return result

            async def awaited() -> Any:
                value = await result
                reached(after)
                return value

            return awaited()

        setattr(owner, name, call)

    wrap(trial, "try_out", before="asked", after="tried")
    wrap(reloader, "_come_to_rest", after="at rest")
    wrap(adopt, "take_over", after="read")
    wrap(adopt, "end_unnamed_children", after="children")
    wrap(supervisor, "CageRuntime", after="launchers")
    wrap(supervisor.Services, "start", after="services")
    wrap(Plugin, "take_over", after="adopted")
    wrap(Cage, "be_kept_by", after="kept")
    wrap(adoption.Adoption, "change_launchers", after="exchanged")
    confirm = Cage.confirm

    def confirm_or_fail(cage: Cage) -> None:
        confirm(cage)
        if (fails := root / "fail-for").exists() and fails.read_text() == cage.spec.name:
            raise RuntimeError("a fault of this image")

    Cage.confirm = confirm_or_fail  # type: ignore[method-assign]
    write, execute_state = formats.write, reloader.execute

    def write_changed(*arguments: Any) -> int:
        fd = write(*arguments)
        body = json.loads(read_sealed(fd, 1 << 30))
        (root / "state.json").write_text(json.dumps(body["state"]))
        if not (changed := _take(root / "with")):
            return fd
        os.close(fd)
        (*path, key), value = json.loads(changed)
        place = body["state"]
        for one in path:
            place = place[one]
        place[key] = value
        return make_sealed(json.dumps(body).encode())

    def execute_with_changed(*arguments: Any, **further: Any) -> None:
        formats.write = write_changed
        try:
            execute_state(*arguments, **further)
        finally:
            formats.write = write

    reloader.execute = execute_with_changed
    hand_over = Cage.hand_over

    def hand_over_as_an_older_version(cage: Cage) -> CageState:
        state = hand_over(cage)
        without = root / "without"
        missing = without.read_text() if without.exists() else ""
        return replace(state, layers=tuple(layer for layer in state.layers if layer.name != missing))

    Cage.hand_over = hand_over_as_an_older_version  # type: ignore[method-assign]
    exchange = services.exchange

    async def exchange_unless_kept(process: ChildProcess) -> None:
        kept = root / "keep-service"
        if kept.exists() and kept.read_text() == process.spec.name:
            kept.unlink()
            raise UnavailableError(process.spec.name, "is busy", "try again")
        await exchange(process)

    services.exchange = exchange_unless_kept  # type: ignore[assignment]
    until_idle = reloader._until_idle

    async def idle(*arguments: Any, threads: bool = False) -> None:
        await until_idle(*arguments, threads=threads)
        if threads:
            _at_exec(root, _take(root / "at-rest"))

    reloader._until_idle = idle  # type: ignore[assignment]
    execve = os.execve

    def execute(*arguments: Any) -> None:
        reached("exec")
        words = _take(root / "at-exec")
        _at_exec(root, words)
        if words == "another thread":
            thread = threading.Thread(target=execve, args=arguments)
            thread.start()
            thread.join()
        execve(*arguments)

    os.execve = execute  # type: ignore[assignment]

    from host.cli.main import main as command_line

    sys.argv = ["isolator", "--root", str(root), "serve", *sys.argv[2:]]
    sys.exit(command_line())


if __name__ == "__main__":
    main()
