"""Faults that leave the daemon to help itself: kill, freeze, starve of descriptors or memory, fill a disk."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from isolator.paths import Paths
from tests.chaos import ledger
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon

PROCESSES = {
    "audit": "isolator.audit.service",
    "broker": "isolator.broker.service",
    "host": "host.service",
    "launcher": "isolator.launcher",
}
_HANGS = 24.0
"""Seconds after which a process that stands still is replaced, and a little more."""


class Faults:
    """What goes wrong with one daemon; ``random`` decides, so a seed tells the order."""

    def __init__(
        self, d: Daemon, source: Path, disks: dict[str, Path], states: Callable[[], Path], random: random.Random
    ) -> None:
        self.done: Counter[str] = Counter()
        self.boundary = 0
        """Number of the last event that an earlier ``renewed`` might have had to be given."""
        self.wrong: list[str] = []
        self._d, self._source, self._disks, self._states, self._random = d, source, disks, states, random
        self._numbered: Callable[[], int] = lambda: 0
        self._kinds = {
            "kill": (40, self._kill), "kill plugin": (16, self._kill_plugin), "freeze": (16, self._freeze),
            "hang": (1, self._hang), "freeze plugin": (6, self._freeze_plugin), "descriptors": (8, self._descriptors),
            "memory": (4, self._memory), "fill": (6, self._fill), "supervisor": (5, self._supervisor),
            "renew": (3, self._renew),
        }  # fmt: skip

    def one(self, number: Callable[[], int]) -> str:
        """Do one thing to the daemon; returns what it was. ``number``: that of the last event that was emitted."""
        self._numbered = number
        kind = ledger.choice(self._random, {kind: weight for kind, (weight, _) in self._kinds.items()})
        what = self._kinds[kind][1]()
        if what:
            self.done[what.split(":")[0]] += 1
        return what

    def _process(self, *, supervisor: bool = True) -> tuple[str, int]:
        """A process of the daemon by its name; 0 while it is being replaced."""
        names = [*PROCESSES, *(["supervisor"] if supervisor else [])]
        name = self._random.choice(names)
        if name == "supervisor":
            assert self._d.process is not None
            return name, self._d.process.pid
        return name, self._d.service_pid(PROCESSES[name], missing_ok=True)

    def _plugin(self) -> tuple[str, int]:
        name = self._random.choice([*ledger.PLUGINS])
        group = Paths.of(self._d.root).named("isolator").encode()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                environment = (entry / "environ").read_bytes().split(b"\0")
                if f"PLUGIN_NAME={name}".encode() in environment and group in (entry / "cgroup").read_bytes():
                    return name, int(entry.name)
        return name, 0

    def _kill(self) -> str:
        name, pid = self._process(supervisor=False)
        return f"kill {name}" if _sent(pid, signal.SIGKILL) else ""

    def _kill_plugin(self) -> str:
        name, pid = self._plugin()
        return f"kill plugin: {name}" if _sent(pid, signal.SIGKILL) else ""

    def _supervisor(self) -> str:
        self._d.kill()
        self._d.start(seconds(90))
        return "kill supervisor"

    def _freeze(self) -> str:
        name, pid = self._process()
        return f"freeze {name}" if self._stopped(pid, self._random.uniform(0.1, 2.0)) else ""

    def _hang(self) -> str:
        """Stand still until it is replaced."""
        name, pid = self._process(supervisor=False)
        return f"hang {name}" if self._stopped(pid, _HANGS) else ""

    def _freeze_plugin(self) -> str:
        name, pid = self._plugin()
        return f"freeze plugin: {name}" if self._stopped(pid, self._random.uniform(0.1, 2.0)) else ""

    def _stopped(self, pid: int, length: float) -> bool:
        if not _sent(pid, signal.SIGSTOP):
            return False
        time.sleep(length)
        _sent(pid, signal.SIGCONT)
        return True

    def _descriptors(self) -> str:
        name, pid = self._process()
        with contextlib.suppress(OSError):
            room = len(os.listdir(f"/proc/{pid}/fd")) + self._random.randrange(3)
            return f"descriptors of {name}" if self._limited(pid, resource.RLIMIT_NOFILE, room) else ""
        return ""

    def _memory(self) -> str:
        """Leave it the address space that it has, and half a megabyte."""
        name, pid = self._process(supervisor=False)
        with contextlib.suppress(OSError):
            size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize() + (1 << 19)
            return f"memory of {name}" if self._limited(pid, resource.RLIMIT_AS, size) else ""
        return ""

    def _limited(self, pid: int, kind: int, most: int) -> bool:
        before = _limit(pid, kind, most) if pid else None
        if before is None:
            return False
        time.sleep(self._random.uniform(0.2, 1.5))
        _limit(pid, kind, before)
        return True

    def _fill(self) -> str:
        name = self._random.choice([*self._disks])
        filler = self._disks[name] / "filler"
        try:
            with filler.open("wb") as file:
                for size in (1 << 20, 1 << 12):
                    with contextlib.suppress(OSError):
                        while True:
                            os.write(file.fileno(), bytes(size))
            time.sleep(self._random.uniform(0.2, 2.0))
        finally:
            filler.unlink(missing_ok=True)
        return f"fill {name}"

    def _renew(self) -> str:
        """Remove a plugin, and give its name to another, which must be given nothing that came before it."""
        self.check_renewed()
        before = self._numbered()
        if self._d.cli("plugin", "remove", "renewed", "--yes", code=None).returncode not in (0, 4):
            return ""  # whether it is gone is not known: what it has seen counts with the next one
        ledger.add(self._d, self._source, "renewed")
        self.boundary = before
        return "renew"

    def check_renewed(self) -> None:
        """Note what ``renewed`` was given of the time before its registration."""
        early = [note.number for note in ledger.seen(self._states(), "renewed") if note.number <= self.boundary]
        if early:
            self.wrong.append(f"renewed was given d{early[0]}, and begins after d{self.boundary}")


_LIMIT = """
import resource, sys
pid, kind, soft = map(int, sys.argv[1:])
before = resource.prlimit(pid, kind)
resource.prlimit(pid, kind, (soft, before[1]))
print(before[0])
"""


def _limit(pid: int, kind: int, soft: int) -> int | None:
    """Set a limit of a process, as its own user, for another one's root lacks a capability in many containers.

    Returns the limit before; None if there is no such process.
    """
    try:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except OSError:
        return None
    uid, gid = (int(status[name].split()[0]) for name in ("Uid", "Gid"))
    words = [sys.executable, "-I", "-c", _LIMIT, *map(str, (pid, kind, soft))]
    done = subprocess.run(words, user=uid, group=gid, extra_groups=[], capture_output=True, text=True, check=False)
    if done.returncode and "ProcessLookupError" not in done.stderr:
        raise AssertionError(done.stderr)
    return None if done.returncode else int(done.stdout)


def _sent(pid: int, number: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        if pid:
            os.kill(pid, number)
            return True
    return False
