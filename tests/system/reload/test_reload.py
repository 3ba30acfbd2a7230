"""A reload of the whole daemon: the program changes, and the sidecars, their events and their records go on."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from host.client.client import Client
from isolator.errors import IsolatorError
from isolator.layers.cgroup.subtree import find_hierarchies
from tests.support.cage_fixture import leaves
from tests.support.processes import start_time
from tests.support.sidecars import stream
from tests.support.timeouts import seconds
from tests.system.daemon import ECHO, Daemon, alive, daemon, wait_for, write_plugin

STATE = {"filesystem": {"state": "4M"}}
SLOW = ECHO.replace("        params = request", "        time.sleep(0.4)\n        params = request").replace(
    "import json", "import time, json"
)
STREAM = stream(
    """
if "deployment_id" in (params or {}):
    with open(os.environ["PLUGIN_STATE_DIR"] + "/seen", "a") as seen:
        seen.write(params["deployment_id"] + "\\n")
if id is not None:
    send(id=id, result={"status": "ok"})
"""
)


MODULES = ("audit.service", "broker.service", "host.service", "isolator.launcher.server")
OTHER_THREADS = 2
"""The main thread, and the one that answers denied calls."""
EXECUTOR_THREADS = min(32, (os.cpu_count() or 1) + 4)
"""The most of a `ThreadPoolExecutor`."""


def running(d: Daemon) -> dict[str, tuple[int, str]]:
    """Pid and time of birth of each sidecar's pid 1, by plugin."""
    return {one["name"]: (one["pid"], start_time(one["pid"])) for one in d.json("plugin", "list") if one["pid"]}


def held(d: Daemon) -> tuple[int, int]:
    """Descriptors and threads of the supervisor."""
    assert d.process is not None
    place = Path(f"/proc/{d.process.pid}")
    return len(os.listdir(place / "fd")), len(os.listdir(place / "task"))


def kinds(d: Daemon) -> Counter[str]:
    """Descriptors of the supervisor and of its services, by process and by what they are of."""
    assert d.process is not None
    found = {"supervisor": links_of(d.process.pid)}
    for module in MODULES:  # of one that has just been exchanged, the process before may be found, and end
        found[module] = wait_for(lambda module=module: links_of(d.service_pid(module)), what=module)
    return Counter(
        f"{of}: {re.sub('[0-9a-f]*[0-9][0-9a-f]*', 'N', link)}" for of, links in found.items() for link in links
    )


def links_of(pid: int) -> list[str]:
    """What each descriptor of a process is of; empty when the process has ended, as one that is exchanged may."""
    found, place = [], Path(f"/proc/{pid}/fd")
    with contextlib.suppress(OSError):
        for name in os.listdir(place):
            with contextlib.suppress(OSError):  # it has been closed
                found.append(os.readlink(place / name))
    return found


def more_and_more(looks: Sequence[Counter[str]]) -> dict[str, list[int]]:
    """The kinds of which there were more at each of the last three looks than at any of the first three."""
    numbers = {kind: [look[kind] for look in looks] for kind in set().union(*looks)}
    return {kind: found for kind, found in numbers.items() if min(found[-3:]) > max(found[:3])}


def wait_until_parked(d: Daemon) -> None:
    """Return once there is the parked process, which is made when all is quiet, and has descriptors, too."""
    if find_hierarchies().v1:
        wait_for(lambda: any(any(group.glob("_spare.*")) for group in leaves(d.root)), what="no process is parked")


def used(d: Daemon) -> list[int]:
    """What the supervisor and its services have together: KiB of memory of their own, threads."""
    assert d.process is not None
    found = [used_by(d.process.pid)]
    for module in MODULES:  # of one that has just been exchanged, the process before may be found, and end
        found.append(wait_for(lambda module=module: used_by(d.service_pid(module)), what=module))
    return list(map(sum, zip(*found, strict=True)))


def used_by(pid: int) -> tuple[int, ...]:
    """The same of one process; empty when it has ended."""
    place = Path(f"/proc/{pid}")
    with contextlib.suppress(OSError):
        lines = (place / "smaps_rollup").read_text().splitlines()[1:]
        own = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
        return own, len(os.listdir(place / "task"))
    return ()


def seen(d: Daemon, plugin: str) -> Counter[str]:
    """How often each event reached a plugin."""
    return Counter(d.noted(plugin))


class Emitter:
    """Emits events all the time while somebody else waits for their outcomes, and counts what was refused."""

    def __init__(self, d: Daemon, pause: float) -> None:
        self.sent: list[str] = []
        self.refused: list[str] = []
        self.slowest = 0.0
        self._stopped = threading.Event()
        self._newest = ""
        self._threads = [
            threading.Thread(target=self._emit, args=(d, pause)),
            threading.Thread(target=self._watch, args=(d,)),
        ]

    def _emit(self, d: Daemon, pause: float) -> None:
        with Client(d.root) as client:
            while not self._stopped.wait(pause):
                name = f"n{len(self.sent)}"
                payload = {"project_id": name, "deployment_id": name, "url": "https://x.example/", "duration_ms": 1}
                began = time.monotonic()
                try:
                    self._newest = client.call("event.emit", name="deploy.completed", payload=payload)["id"]
                except IsolatorError as error:
                    self.refused.append(str(error))
                self.slowest = max(self.slowest, time.monotonic() - began)
                self.sent.append(name)

    def _watch(self, d: Daemon) -> None:
        with Client(d.root) as client:
            while not self._stopped.wait(0.01):
                try:
                    if self._newest:
                        client.call("event.wait", id=self._newest, timeout=2)
                except IsolatorError as error:
                    self.refused.append(str(error))

    def __enter__(self) -> Emitter:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()


@contextlib.contextmanager
def loaded_daemon(folder: Path, kind: type[Daemon] | None = None) -> Iterator[Daemon]:
    """A daemon with a one-shot plugin, a slow one, and a stream plugin, all running."""
    with daemon(kind=kind) as d:
        for name, script, more in (
            ("quick", ECHO, {}),
            ("slow", SLOW, {}),
            ("streams", STREAM, {"transport": {"mode": "stream"}}),
        ):
            d.cli("plugin", "add", str(write_plugin(folder / name, script, sandbox=STATE, **more)), "--yes")
            d.cli("plugin", "start", name)
        yield d


def reload_once(d: Daemon, _: int) -> None:
    """The program that is installed, once more."""
    d.cli("reload")


def reload_under_events(
    d: Daemon, times: int, pause: float, reload: Callable[[Daemon, int], None] = reload_once
) -> None:
    """Reload while events come all the time: sidecars stay, and each event reaches each of them once."""
    before = running(d)
    assert set(before) == {"quick", "slow", "streams"}
    _, threads = held(d)
    looks = []
    with Emitter(d, pause) as emitter:
        for number in range(times):
            reload(d, number)
            looks.append(kinds(d))
    assert not emitter.refused
    with Client(d.root) as client:
        wait_for(lambda: not any(client.call("status")["queue"].values()), seconds(120), "events are left in the queue")
    for name in before:
        counts = seen(d, name)
        assert set(counts) == set(emitter.sent), name
        assert set(counts.values()) == {1}, name
    records = d.records()
    ended = [one for one in records if one["type"] in ("plugin.crashed", "plugin.stopped")]
    assert not ended, (ended, d.log.read_text())
    assert running(d) == before
    # Threads of the executor come as they are needed, and stay: so many at the most, however often it is reloaded.
    most = max(threads, OTHER_THREADS + EXECUTOR_THREADS)
    wait_for(lambda: held(d)[1] <= most, what=f"more than {most} threads")
    assert not (grown := more_and_more(looks)), grown
    types = Counter(record["type"] for record in records)
    assert types["daemon.reloaded"] == times
    assert types["plugin.started"] == 3
    assert not types["audit.gap"] and not types["plugin.crashed"] and not types["service.ended"]
    assert all(one["data"]["adopted"] == 3 for one in records if one["type"] == "daemon.reloaded")
    d.cli("audit", "verify")


def test_sidecars_and_their_events_go_on_over_reloads(shared_dir: Path) -> None:
    with loaded_daemon(shared_dir) as d:
        reload_under_events(d, 6, 0.25)
        stopped = running(d)["quick"][0]
        d.cli("plugin", "restart", "quick")
        assert not alive(stopped) and alive(running(d)["quick"][0])
        assert d.stop() == 0
        assert d.json("gc", "--dry-run") == []


@pytest.mark.wide
@pytest.mark.timeout(seconds(1800))
def test_nothing_grows_over_many_reloads(shared_dir: Path) -> None:
    sizes: list[list[int]] = []

    def reload_and_measure(d: Daemon, number: int) -> None:
        reload_once(d, number)
        sizes.append(used(d))

    with loaded_daemon(shared_dir) as d:
        reload_under_events(d, 100, 1.0, reload_and_measure)
    for kind in zip(*sizes, strict=True):
        assert max(kind[-20:]) <= 1.1 * max(kind[:20]), kind


def test_killed_supervisor_takes_its_adopted_cages_along(shared_dir: Path) -> None:
    with daemon() as d:
        d.cli("plugin", "add", str(write_plugin(shared_dir / "echo", sandbox=STATE)), "--yes")
        d.cli("plugin", "start", "echo")
        d.cli("reload")
        pid = running(d)["echo"][0]
        services = [d.service_pid(f"{name}.service") for name in ("audit", "broker", "host")]
        launcher = d.service_pid("isolator.launcher.server")
        d.kill()
        wait_for(lambda: not any(map(alive, (pid, launcher, *services))), what="a process outlived its supervisor")
        d.start()
        assert "cleared what an earlier daemon left: cage echo" in d.log.read_text()
        assert d.stop() == 0
        assert d.json("gc", "--dry-run") == []


def test_waiting_plugin_waits_on_over_a_reload(shared_dir: Path) -> None:
    script = "#!/usr/bin/python3\nimport sys\nsys.exit(3)\n"
    with daemon(host_toml='[restart]\nbackoff_min = "10m"\nbackoff_max = "10m"\n') as d:
        d.cli("plugin", "add", str(write_plugin(shared_dir / "broken", script)), "--yes")
        d.cli("plugin", "start", "broken", code=None)
        shown = wait_for(lambda: [one for one in d.json("plugin", "list") if one["state"] == "backoff"])
        d.cli("reload")
        keys = ("state", "restarts", "error")
        assert [{key: one[key] for key in keys} for one in d.json("plugin", "list")] == [
            {key: one[key] for key in keys} for one in shown
        ]
