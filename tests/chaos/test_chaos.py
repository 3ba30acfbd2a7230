"""Faults at random under load: nothing that was acknowledged is lost, and nothing is left.

Not part of the default suite: ``sudo ./dev test tests/chaos --kills 1000 -s`` (about two seconds each). The seed is
printed; with ``--seed`` the faults come in the same order, at moments that are never quite the same.
"""

from __future__ import annotations

import contextlib
import grp
import json
import os
import pwd
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from host.client.client import Client
from isolator.errors import IsolatorError
from isolator.paths import Paths
from tests.chaos import ledger
from tests.chaos.faults import PROCESSES, Faults
from tests.support.cage_fixture import leaves
from tests.support.disks import run
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon, wait_for
from tests.system.test_killed_host import Impatient

HOST_TOML = """
[defaults]
state = "8M"
state_inodes = 64
delivery_attempts = 100
[restart]
backoff_min = "0.1s"
backoff_max = "1s"
crashes = 1000
"""
RATE = 25
"""Events a second."""
CALM = 50
"""Faults between two looks at everything."""
SIZES = {"trail": "192m", "store": "192m"}
_REPLACED = "; it is replaced ("
"""In the alarm that a process which hung leaves for an hour after it was replaced, as a person has to see it."""
ROOM_FDS, ROOM_MEMORY = 24, 48 << 20
"""Descriptors and bytes by which a process of the last calm may exceed the one of the first."""


class SmallDisks(Impatient):
    """A daemon whose trail, and whose queue, is on a small disk of its own; the plugins' ledger is on none.

    In mounts of its own: another program that copies the host's meanwhile (a container, a build) would hold the state
    of a plugin whose daemon was killed, and the plugin would have to wait for that program.
    """

    disks: dict[str, Path]

    def __init__(self, *arguments: Any, **further: Any) -> None:
        super().__init__(*arguments, **further)
        self._enter = ["unshare", "--net", "--mount"]

    @property
    def states(self) -> Path:
        """The folder of the plugins' states, as the daemon sees it."""
        pid = self.process.pid if self.process is not None else 0
        return Path(f"/proc/{pid}/root{self.root}/var/lib/isolator/state")

    def mount(self) -> None:
        """Before the first start."""
        self.disks = {"trail": self.root / "var/log/isolator", "store": self.root / "var/lib/isolator/host"}
        for name, folder in self.disks.items():
            folder.mkdir(parents=True)
            run("mount", "-t", "tmpfs", "-o", f"size={SIZES[name]},mode=0755", "none", str(folder))

    def purge(self) -> None:
        """Remove every trace, from the large disk: nobody can delete what another one is mounted on."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stop()
        if self.process is not None:
            self.kill()
        for name, folder in self.disks.items():
            run("cp", "-a", f"{folder}/.", str(self.root / name))
            run("umount", "-l", str(folder))
            folder.rmdir()
            (self.root / name).rename(folder)
        super().purge()

    def left(self) -> list[str]:
        """What a removed daemon has left on the host."""
        name = Paths.of(self.root).instance
        accounts = [entry.pw_name for entry in pwd.getpwall()] + [entry.gr_name for entry in grp.getgrall()]
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        loops = [path.read_text().strip() for path in Path("/sys/block").glob("loop*/loop/backing_file")]
        return [
            *(account for account in accounts if account.endswith(f"-{name}")),
            *(f"/proc/{pid}" for pid in psutil.pids() if str(self.root) in _words(pid)),
            *(path for path in [*mounts, *loops] if path.startswith(str(self.root))),
            *map(str, leaves(self.root)),
            *([str(self.root)] if self.root.exists() else []),
        ]


def _words(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    return ""


def _connected(d: Daemon) -> Client | None:
    with contextlib.suppress(IsolatorError):
        client = Client(d.root, timeout=seconds(100))
        if all(_REPLACED in line for line in client.call("status")["alarms"]):
            return client
        client.close()
    return None


def _resources(d: Daemon) -> dict[str, tuple[int, int]]:
    """Descriptors and resident bytes of each process of the daemon."""
    assert d.process is not None
    pids = {name: wait_for(lambda module=module: d.service_pid(module, missing_ok=True), seconds(60))
            for name, module in PROCESSES.items()}  # fmt: skip
    pids["supervisor"] = d.process.pid
    pages = {name: int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for name, pid in pids.items()}
    return {name: (len(os.listdir(f"/proc/{pid}/fd")), pages[name] * os.sysconf("SC_PAGE_SIZE"))
            for name, pid in pids.items()}  # fmt: skip


class Calm:
    """A look at everything now and then, with the outcome of every event that was acknowledged before it."""

    def __init__(self, d: Daemon, sender: ledger.Sender) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self._d, self._sender, self._settled = d, sender, 0

    def wait(self) -> dict[str, tuple[int, int]]:
        """Wait for the outcomes, and for a daemon that is well; returns what its processes take."""
        new = self._sender.acknowledged[self._settled :]
        with self._connection() as client:
            ledger.settle(client, new)
            # Who kills a plugin twice on one event has it set aside.
            dead = {one["event_id"] for one in client.call("event.dead", limit=100_000)["deliveries"]
                    if one["plugin"] in ledger.LASTING}  # fmt: skip
            for event in dead & {event for event, _ in new}:
                client.call("event.replay", id=event)
            self.rows |= ledger.settle(client, new)
        self._settled += len(new)
        self._d.cli("audit", "verify")
        return _resources(self._d)

    def _connection(self) -> Client:
        try:
            return cast(Client, wait_for(lambda: _connected(self._d), seconds(120)))
        except AssertionError:
            status = self._d.cli("status", code=None)
            found = f"{status.stdout}{status.stderr}{self._d.log.read_text()[-6000:]}"
            raise AssertionError(f"no daemon that is well: {found}") from None


@pytest.mark.timeout(0)
def test_nothing_is_lost_whatever_goes_wrong(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    kills, seed = request.config.getoption("kills"), request.config.getoption("seed")
    seed = seed if seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"\nchaos: --kills {kills} --seed {seed}", flush=True)
    minutes = request.config.getoption("minutes")
    began, wrong = time.monotonic(), []
    with daemon(host_toml=HOST_TOML, start=False, kind=SmallDisks) as made:
        d = cast(SmallDisks, made)
        d.mount()
        d.start()
        for name in ledger.PLUGINS:
            ledger.add(d, tmp_path, name)
        faults = Faults(d, tmp_path, d.disks, lambda: d.states, random.Random(seed))
        with ledger.Sender(d.root, RATE) as sender:
            wait_for(lambda: len(sender.acknowledged) > RATE)
            calm = Calm(d, sender)
            at_first = calm.wait()
            while (done := faults.done.total()) < kills and time.monotonic() - began < minutes * 60:
                what = faults.one(lambda: sender.number)
                if not what:
                    time.sleep(0.1)
                    continue
                print(f"{time.monotonic() - began:8.1f} s {done + 1:5} {what} ({len(sender.acknowledged)})", flush=True)
                time.sleep(faults._random.uniform(0.0, 1.2))
                if (done + 1) % CALM == 0:
                    print(f"{time.monotonic() - began:8.1f} s calm: {calm.wait()}", flush=True)
        at_last = calm.wait()
        faults.check_renewed()
        wrong += faults.wrong
        given = {name: ledger.seen(d.states, name) for name in ledger.LASTING}
        gaps = json.loads(d.cli("audit", "verify", "--json").stdout)
        recorded = ledger.Recorded.read(_trail(d))
        for name in ledger.LASTING:
            wrong += ledger.check_plugin(name, calm.rows, sender.acknowledged, given[name], recorded)
        for name, (fds, memory) in at_last.items():
            before = at_first[name]
            if fds > before[0] + ROOM_FDS or memory > before[1] + ROOM_MEMORY:
                wrong.append(f"{name} has grown from {before} to {(fds, memory)} (descriptors, bytes)")
        tracebacks = d.log.read_text().count("Traceback")
        print(f"{len(sender.acknowledged)} acknowledged, {dict(faults.done)}, {time.monotonic() - began:.0f} s,"
              f" {tracebacks} tracebacks, trail: {len(gaps['gaps'])} gaps,"
              f" {gaps['lost']} lost", flush=True)  # fmt: skip
        if wrong or tracebacks:
            kept = Path(f"/tmp/isolator-chaos-{seed}.log")
            kept.write_text(d.log.read_text() + "\n".join(wrong))
            print(f"the daemon's log: {kept}", file=sys.stderr)
        assert d.stop() == 0
    assert not wrong, "\n".join(wrong[:40])
    assert not d.left()


def _trail(d: Daemon) -> Iterator[dict[str, Any]]:
    for file in sorted((d.root / "var/log/isolator/audit").glob("audit*.jsonl")):
        for line in file.read_bytes().splitlines():
            yield json.loads(line)
