"""Each process of a whole daemon killed at each step of a plugin's stop and start; after every kill the six checks.

(1) it converges: the plugin runs again with all its protections, and commands are answered; (2) nothing leaks; (3) no
process of the plugin's user is outside its cage; (4) no accepted event is lost; (5) the trail verifies and each start
has its end; (6) meanwhile nothing got out: the plugin tries all the time, and what it tries to reach counts.

What the supervisor itself leaves behind is tested call by call, without services, in ``test_cage_cut_short.py``; here
it is killed where more than that is at stake: records, events, the broker's share, the host's.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from host.client.client import Client
from isolator.errors import IsolatorError
from isolator.linux import netns
from isolator.paths import Paths
from isolator.recovery import daemon as recovery
from tests.support.processes import children
from tests.support.timeouts import seconds
from tests.system.daemon import ECHO, alive, event, wait_for, write_plugin
from tests.system.kill_points import PLUGIN, START, STEPS, STOP, SteppedDaemon

FOR_THE_SUPERVISOR = ("recorded", "journal gone", "clone", "network", "told")
PLACE, PORT = "10.99.0.1", 4444
"""An address of the daemon's own network, which no policy lets a plugin reach."""

TRYING = """
    import threading, time
    def forever():
        while True:
            try:
                socket.create_connection(("PLACE", PORT), 1).close()
            except OSError:
                pass
            time.sleep(0.01)
    threading.Thread(target=forever, daemon=True).start()
""".replace("PLACE", PLACE).replace("PORT", str(PORT))


class Scene:
    """A daemon, its one plugin, and a listener that nobody may reach."""

    def __init__(self, daemon: SteppedDaemon, listener: socket.socket) -> None:
        self.daemon = daemon
        self.paths = Paths.of(daemon.root)
        self.sent = 0
        self.open_files = 0
        self._listener = listener

    def ask(self, method: str, **fields: Any) -> dict[str, Any] | None:
        """What the daemon answers; None when it does not, or refuses."""
        try:
            with Client(self.daemon.root, timeout=seconds(30)) as client:
                return client.call(method, **fields)
        except (IsolatorError, OSError):
            return None

    def emit(self) -> None:
        """One more event that is accepted for sure."""
        self.sent += 1
        payload = json.loads(event(self.sent))
        wait_for(lambda: self.ask("event.emit", name="deploy.completed", payload=payload), what="no event is accepted")

    def check(self, what: str) -> None:
        """The checks that can be made while it runs; ``what``: the fault that came before."""
        self.emit()
        seen = self.paths.state / PLUGIN / "mnt/state/seen"
        wanted = {f"d{number}" for number in range(1, self.sent + 1)}
        wait_for(lambda: seen.exists() and wanted <= set(seen.read_text().split()), what=f"{what}: an event is lost")
        entry = wait_for(
            lambda: (e := self.ask("plugin.show", name=PLUGIN)) and e["state"] == "running" and e,
            what=f"{what}: it does not run",
        )
        wait_for(self._as_it_should_be, what=lambda: f"{what}: {self._extent()}")
        inside = {int(pid) for pid in self._leaf(entry["run"]).joinpath("cgroup.procs").read_text().split()}
        assert entry["pid"] in inside, what
        for pid in self._of_the_plugin():
            assert pid in inside, f"{what}: process {pid} is outside its cage"
            status = Path(f"/proc/{pid}/status").read_text()
            assert "Seccomp:\t2" in status and "NoNewPrivs:\t1" in status, (what, status)
            assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink(f"/proc/{self._pid}/ns/net"), what
        self.nothing_got_out(what)

    def nothing_got_out(self, what: str) -> None:
        with contextlib.suppress(BlockingIOError):
            self._listener.accept()
            raise AssertionError(f"{what}: the plugin reached {PLACE}")

    @property
    def _pid(self) -> int:
        assert self.daemon.process is not None
        return self.daemon.process.pid

    def _leaf(self, run: str) -> Path:
        return recovery.subtree_folders(self.paths)[0] / f"{PLUGIN}.{run}"

    def _of_the_plugin(self) -> list[int]:
        uid = pwd.getpwnam(f"plugin-{PLUGIN}-{self.paths.instance}").pw_uid
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and entry.stat().st_uid == uid and alive(int(entry.name)):
                    found.append(int(entry.name))
        return found

    def _extent(self) -> dict[str, list[str]]:
        """Everything of this daemon outside its process, and its own descriptors and children."""
        groups = []
        for top in recovery.subtree_folders(self.paths):
            with contextlib.suppress(FileNotFoundError):
                groups.append(",".join(sorted(c.name.partition(".")[0] for c in top.iterdir() if c.is_dir())))
        loops = subprocess.run(["losetup", "-nO", "BACK-FILE"], capture_output=True, text=True, check=True).stdout
        return {
            "groups": groups,
            "mounts": recovery.mounts_below(self.paths.state),
            "loops": [line for line in loops.splitlines() if str(self.daemon.root) in line],
            "children": children(self._pid),
            "files": os.listdir(f"/proc/{self._pid}/fd"),
        }

    def _as_it_should_be(self) -> bool:
        found = self._extent()
        whole = (
            found["groups"][0] == f"{PLUGIN},service,service,service"
            and set(found["groups"][1:]) <= {f"_spare,{PLUGIN}", ""}  # of v1, on hybrid hosts
            and len(found["mounts"]) == len(found["loops"]) == 1
            and len(found["children"])
            == 6  # three services, the launcher, pid 1 of the cage, what the next start needs
        )
        if whole and not self.open_files:
            self.open_files = len(found["files"])
        return whole and len(found["files"]) <= self.open_files

    def check_trail(self) -> None:
        """Each start has its end; the chain holds.

        A supervisor that is killed between the record of an end and the last trace removed finds the cage dead at its
        next start, and says so as well.
        """
        now = self.ask("plugin.show", name=PLUGIN)
        assert now is not None
        self.daemon.cli("audit", "verify")
        records = self.daemon.records()
        started = [r["run"] for r in records if r["type"] == "plugin.started" and r["run"] != now["run"]]
        ends = [r for r in records if r["type"] in ("plugin.stopped", "plugin.crashed")]
        found_dead = [r["run"] for r in ends if r["data"]["cause"].startswith("found dead")]
        ended = [r["run"] for r in ends if not r["data"]["cause"].startswith("found dead")]
        assert len(set(started)) == len(started) > 5
        assert set(started) <= {*ended, *found_dead}, f"no end is told of {set(started) - {*ended, *found_dead}}"
        assert len(set(ended)) == len(ended) and len(set(found_dead)) == len(found_dead)


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    def furnish() -> tuple[int, socket.socket]:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        subprocess.run(["ip", "addr", "add", f"{PLACE}/32", "dev", "lo"], check=True)
        return netns.current_network(), socket.create_server((PLACE, PORT))

    network, listener = netns.in_new_network(furnish)
    root = Path(tempfile.mkdtemp(prefix="isolator-system-"))
    root.chmod(0o755)
    toml = '[restart]\nbackoff_min = "0.1s"\nbackoff_max = "0.1s"\ncrashes = 1000\n'
    daemon = SteppedDaemon(root, host_toml=toml, network=network)
    try:
        with listener:
            netns.in_network(network, lambda: socket.create_connection((PLACE, PORT)).close())
            listener.accept()[0].close()  # it can be reached, and would tell
            listener.setblocking(False)
            daemon.start()
            folder = write_plugin(
                root / "plugins" / PLUGIN, ECHO.replace("\n    server = ", f"{TRYING}    server = ", 1),
                sandbox={"network": {"egress": [{"host": "hooks.example.com"}]}},
            )  # fmt: skip
            daemon.cli("plugin", "add", str(folder), "--yes")
            made = Scene(daemon, listener)
            made.check("nothing")
            yield made
    finally:
        daemon.purge()
        os.close(network)
        shutil.rmtree(root, ignore_errors=True)


@pytest.mark.slow
def test_the_launcher(scene: Scene) -> None:
    """With it go the cages that it cloned; they come back under a new one."""
    d = scene.daemon
    for step in STEPS:
        d.kill_at({step: "launcher"})
        scene.emit()
        scene.ask("plugin.restart", name=PLUGIN)
        wait_for(lambda: d.done, what=f"it never came to '{step}'")
        scene.check(f"launcher killed at '{step}'")
    scene.check_trail()


@pytest.mark.slow
def test_the_services(scene: Scene) -> None:
    """Audit, broker and host, each at every step: in one restart each of them, a third of the way from each other."""
    d = scene.daemon
    third = len(STEPS) // 3
    for number in range(len(STEPS)):
        victims = {
            STEPS[(number + place * third) % len(STEPS)]: victim
            for place, victim in enumerate(("audit", "broker", "host"))
        }
        d.kill_at(victims)
        scene.emit()
        scene.ask("plugin.restart", name=PLUGIN)
        wait_for(lambda: d.done, what=f"it never came to all of {victims}")
        scene.check(f"killed: {victims}")
    scene.check_trail()


@pytest.mark.slow
def test_the_supervisor(scene: Scene) -> None:
    d = scene.daemon
    for step in FOR_THE_SUPERVISOR:
        what = f"supervisor killed at '{step}'"
        d.kill_at({step: "supervisor"})
        scene.emit()
        scene.ask("plugin.restart", name=PLUGIN)  # answered by the end of the connection
        assert d.process is not None
        d.process.wait(seconds(30))
        assert d.done, what
        scene.nothing_got_out(what)
        d.kill()
        d.start()
        assert "cleared what an earlier daemon left" in d.log.read_text().rpartition("ready")[2]
        scene.check(what)
    scene.check_trail()


def test_every_step_of_a_start_is_one_to_be_killed_at(scene: Scene) -> None:
    """A step that is added to the start comes to this list, or it is among those that make nothing outside."""
    (started, *_) = [r for r in scene.daemon.records() if r["type"] == "plugin.started"]
    inside = {"namespaces", "rlimits", "user", "capabilities", "no_new_privs", "landlock", "seccomp", "network"}
    steps = {step for step in started["data"]["milliseconds"] if not step.startswith("enter ")}
    assert steps == {*START, *(f"prepare {layer}" for layer in inside)} - {"told"}
    assert set(STOP) <= set(STEPS)
