"""A new image that finds a fault while it takes over: what is wrong with one part of the state is its own matter."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from isolator.paths import Paths
from isolator.recovery.daemon import subtree_folders
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, alive, daemon, event, wait_for, write_plugin
from tests.system.reload.faulty import FaultyDaemon
from tests.system.reload.test_reload import STATE, running
from tests.system.test_exec import PROGRAM

FAILED = {"error_code": "holds", "project_id": "p1", "deployment_id": "d1"}
ALWAYS = (
    ("audit", "client", "socket"),
    ("services", 2, "channel", "socket"),
    ("tickets", "listener"),
    ("plugins", 0, "run", "cage", "pidfd"),
    ("plugins", 0, "run", "id"),
    ("plugins", 1, "wanted"),
    ("services", 0, "starts"),
    ("services", 1, "leaf"),
    ("plugins", 0, "run", "stdout"),
    ("plugins", 1, "run", "started_at"),
    ("plugins", 1, "run", "directory"),
    ("launcher_pid",),
)
"""Parts of a state that the default run spoils."""
PARTS = 8
"""Tests that spoil all of it between them."""


def loaded(d: Daemon, folder: Path) -> None:
    """Two sidecars, and an invocation that holds."""
    for name in ("fine", "other"):
        d.cli("plugin", "add", str(write_plugin(folder / name, sandbox=STATE)), "--yes")
        d.cli("plugin", "start", name)
    program = write_plugin(
        folder / "program", PROGRAM, sandbox=STATE, hooks=["deploy.failed"], transport={"mode": "exec"},
    )  # fmt: skip
    d.cli("plugin", "add", str(program), "--yes")
    d.cli("event", "emit", "deploy.failed", json.dumps(FAILED))
    wait_for(lambda: held(d), what="the invocation")


def held(d: Daemon) -> bool:
    """Whether an invocation runs."""
    return any(name.startswith("program.") for name in cages(d))


def cages(d: Daemon) -> dict[str, list[int]]:
    """The processes of each cage, by PLUGIN.RUN: the v2 hierarchy has them all."""
    unified, *_ = subtree_folders(Paths.of(d.root))
    found = {}
    for group in unified.glob("*.*/cgroup.procs"):
        name = group.parent.name
        if not name.startswith(("service.", "_spare.", "supervisor")):
            try:
                pids = [int(pid) for pid in group.read_text().split()]
            except OSError:
                continue
            found.update({name: pids} if pids else {})
    return found


def known(d: Daemon) -> set[str]:
    """The cages that the daemon knows, of sidecars."""
    return {f"{one['name']}.{one['run']}" for one in d.json("plugin", "list") if one.get("run")}


def only_known(d: Daemon) -> bool:
    """Whether there is no cage of a sidecar that the daemon does not know."""
    return {name for name in cages(d) if not name.startswith("program.")} <= known(d)


def test_fault_with_one_plugin_ends_its_runs_alone_on_record(shared_dir: Path) -> None:
    with daemon(kind=FaultyDaemon) as made:
        d = cast(FaultyDaemon, made)
        loaded(d, shared_dir)
        before, first = running(d), cages(d)
        d.fail_for("other")
        d.cli("reload")
        (d.root / "fail-for").unlink()
        again = wait_for(lambda: (now := running(d)).keys() == before.keys() and now, what="it is not started again")
        assert again["fine"] == before["fine"] and again["other"] != before["other"]
        assert not any(map(alive, first[f"other.{run_of(d, 'plugin.crashed')}"]))
        wait_for(lambda: only_known(d))
        (crashed,) = [one for one in d.records() if one["type"] == "plugin.crashed"]
        assert crashed["plugin"] == "other"
        assert crashed["data"]["cause"] == "not taken over when the daemon was reloaded"
        assert crashed["data"]["origin"] == "daemon"
        assert "a fault of this image" in crashed["data"]["reason"]
        (reloaded,) = [one for one in d.records() if one["type"] == "daemon.reloaded"]
        assert reloaded["data"]["adopted"] == 2
        assert "a fault of this image" in " ".join(d.json("status", code=None)["alarms"])
        d.cli("event", "emit", "deploy.completed", event(1), "--wait")

        d.fail_for("program")
        d.cli("reload")
        (d.root / "fail-for").unlink()
        ended = wait_for(lambda: [one for one in d.records() if one["type"] == "exec.ended"])
        assert ended[0]["data"]["origin"] == "daemon" and "a fault of this image" in ended[0]["data"]["reason"]
        assert running(d) == again
        lost = f"program.{ended[0]['run']}"
        wait_for(lambda: lost not in cages(d) and held(d), what="it is not repeated")
        (d.state_of("program") / "go-on").touch()
        wait_for(lambda: not any(d.json("status", code=None)["queue"].values()), what="the event is lost")
        d.cli("audit", "verify")
        assert d.stop() == 0
        assert d.json("gc", "--dry-run") == []


def run_of(d: Daemon, kind: str) -> str:
    """The run of the only record of its type."""
    (found,) = [one["run"] for one in d.records() if one["type"] == kind]
    return str(found)


def scalars(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Each value of a state that is no list and no object, with its place."""
    inner = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else None
    if inner is None:
        yield path, value
        return
    for key, one in inner:
        yield from scalars(one, (*path, key))


def spoiled(value: Any, chance: random.Random) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return chance.choice([-1, 1 << 40, value + 500])
    if isinstance(value, float):
        return chance.choice([-1.0, 0.0, 1e300])
    return chance.choice(["", "x", "../..", "\0"])


def survives(d: FaultyDaemon, path: tuple[str | int, ...], value: Any) -> None:
    """Reload with a spoiled state: the daemon goes on and knows every cage, or it has ended, and every cage with it."""
    assert d.process is not None
    if not held(d):  # it may be about to be repeated
        d.cli("event", "emit", "deploy.failed", json.dumps(FAILED))
    born = [pid for pids in cages(d).values() for pid in pids]
    where = f"{'.'.join(map(str, path))} = {value!r}"
    log = d.log.stat().st_size
    d.hand_over_with(path, value)
    d.cli("reload", "--timeout", "30", code=None)
    try:
        process = d.process
        wait_for(lambda: process.poll() is not None or not d.cli("plugin", "list", code=None).returncode)
        if process.poll() is not None:
            d.kill()
            wait_for(lambda: not any(map(alive, born)), what="a cage outlived its daemon")
            d.start()
        wait_for(lambda: only_known(d), what="a cage that nobody knows")
        d.cli("event", "emit", "deploy.completed", event(1), "--wait", "--timeout", "60")
        d.cli("reload")
    except AssertionError as error:
        raise AssertionError(f"{where}: {error}: {d.log.read_text()[log:]}") from None


@pytest.mark.parametrize("part", [None, *(pytest.param(part, marks=pytest.mark.wide) for part in range(PARTS))])
@pytest.mark.timeout(seconds(1800))
def test_state_with_a_wrong_value_leaves_no_cage_that_nobody_knows(shared_dir: Path, part: int | None) -> None:
    chance = random.Random(15)
    with daemon(kind=FaultyDaemon, host_toml='[restart]\nbackoff_min = "0.1s"\n') as made:
        d = cast(FaultyDaemon, made)
        loaded(d, shared_dir)
        d.cli("reload")
        places = dict(scalars(d.handed_over))
        for path in ALWAYS if part is None else list(places)[part::PARTS]:
            survives(d, path, spoiled(places[path], chance))
        d.cli("audit", "verify")
