"""A watch over the hosts' trails and over cages that are frozen, while things go wrong."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.ledger import COURIER

LOOK = 0.3
"""Seconds between two looks at a cage."""
WOKEN = 150
"""Microseconds that the kernel may take to put a frozen task that a signal has woken back: of 3 000 times, beside other
work on two cores, it took 5 (p50), 26 (p99) and 98 at most. A plugin that is not frozen has three pulses between two
looks, each of which takes it 68 at least and 104 at the median, without its calls of the host API."""


@dataclass
class Trail:
    """The records of a host's trail, each once, as they come."""

    path: Path
    problems: dict[str, str] = field(default_factory=dict)
    """Problems with the cluster that the host has had: the newest line of each kind, and when."""
    counts: dict[str, int] = field(default_factory=dict)
    """Records about the plugin, by type."""
    group: Path | None = None
    """The group of the plugin's newest run."""
    _at: int = 0

    @property
    def thaws(self) -> int:
        """How often the plugin's cages were thawed."""
        return self.counts.get("plugin.thawed", 0)

    def read_on(self) -> None:
        """Take what is new."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._at)
                data = file.read()
        except OSError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        for line in whole.splitlines():
            self._take(json.loads(line))

    def _take(self, record: dict[str, Any]) -> None:
        if record["type"] == "cluster.problem" and record["data"]["why"]:
            self.problems[record["data"]["kind"]] = f"{record['time']}: {record['data']['why']}"
        elif record.get("plugin") == COURIER.name and record["type"].startswith("plugin."):
            self.counts[record["type"]] = self.counts.get(record["type"], 0) + 1
            if record["type"] == "plugin.started":
                self.group = Path(record["data"]["cgroup"])


class Watch:
    """A look at the plugin's cages now and then: one that is frozen uses no time of a processor."""

    def __init__(self, roots: dict[str, Path]) -> None:
        self.wrong: list[str] = []
        self.looks = 0
        """How often a cage was seen frozen twice in a row."""
        self.trails = {name: Trail(root / "var/log/isolator/audit/audit.jsonl") for name, root in roots.items()}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        before: dict[str, tuple[Path, int, int]] = {}
        while not self._stop.wait(LOOK):
            for name, trail in self.trails.items():
                trail.read_on()
                used, thaws = _frozen_use(trail.group), trail.thaws
                if trail.group is None or used is None:
                    before.pop(name, None)
                    continue
                known = before.get(name)
                before[name] = (trail.group, used, thaws)
                if known is None or known[0] != trail.group:
                    continue
                self.looks += 1
                # A cage that is killed uses some time to end; one that is not stands still.
                if used - known[1] > WOKEN and not self._stop.wait(2 * LOOK) and _frozen_use(trail.group) is not None:
                    trail.read_on()
                    if trail.thaws == known[2]:  # or it was thawed, and frozen once more, meanwhile
                        spent = f"{used - known[1]} µs in {LOOK} s, {time.strftime('%H:%M:%S')}"
                        self.wrong.append(f"the frozen cage on {name} has used {spent}")


@contextlib.contextmanager
def watch(roots: dict[str, Path]) -> Iterator[Watch]:
    """A watch over the daemons with these roots, by their names."""
    made = Watch(roots)
    try:
        yield made
    finally:
        made.close()


def _frozen_use(group: Path | None) -> int | None:
    """Microseconds of processors that a frozen group has used; None if it is not frozen, or empty."""
    with contextlib.suppress(OSError):
        if group is not None:
            before = (group / "cgroup.events").read_text()
            used = int((group / "cpu.stat").read_text().split()[1])
            if "frozen 1" in before and "populated 1" in before:
                return used
    return None
