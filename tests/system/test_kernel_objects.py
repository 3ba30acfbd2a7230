"""Somebody else's hand in what a plugin is made of: its groups, its user. It is noticed, and mended or refused."""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isolator.layers.user import user_name
from isolator.paths import Paths
from isolator.recovery import daemon as recovery
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, alive, daemon, event, wait_for, write_plugin

HOST_TOML = """
uid_range = [74300, 74320]  # a deleted user's uid must not be taken by another daemon meanwhile
[restart]
backoff_min = "0.1s"
crashes = 5  # a noticed change counts as one, and is noticed at most once a second
window = "3s"
[audit]
snapshot_interval = "1s"
[defaults]
stop_grace = "1s"
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with daemon(host_toml=HOST_TOML) as d:
        folder = write_plugin(tmp_path_factory.mktemp("plugins") / "echo")
        d.cli("plugin", "add", str(folder), "--yes")
        yield d


def _show(d: Daemon) -> dict[str, Any]:
    """The plugin, running."""
    d.cli("plugin", "start", "echo")
    return wait_for(lambda: (e := d.json("plugin", "show", "echo"))["state"] == "running" and e)


def _groups(d: Daemon, run: str) -> list[Path]:
    tops = recovery.subtree_folders(Paths.of(d.root))
    return [top / f"echo.{run}" for top in tops if (top / f"echo.{run}").exists()]


def _another_run(d: Daemon, run: str) -> dict[str, Any]:
    def another() -> dict[str, Any] | None:
        entry: dict[str, Any] = d.json("plugin", "show", "echo")
        if entry["state"] != "running":
            return None
        assert entry["run"], "it is called running, and has no run"
        return entry if entry["run"] != run else None

    return wait_for(another, what=lambda: f"nobody noticed: {d.log.read_text()}")


def _cause(d: Daemon, run: str) -> str:
    (end,) = [r for r in d.records() if r["run"] == run and r["type"] in ("plugin.crashed", "plugin.stopped")]
    return str(end["data"]["cause"])


WRONG = {
    "pids.max": "500", "memory.max": str(100 << 20), "memory.limit_in_bytes": str(100 << 20),
    "cpu.cfs_quota_us": "9000", "cpu.max": "9000 10000",
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_limit_that_was_changed(running: Daemon, name: str) -> None:
    before = _show(running)
    found = [folder / name for folder in _groups(running, before["run"]) if (folder / name).exists()]
    if not found:
        pytest.skip("the controller is in the other hierarchy here")
    right = found[0].read_text()
    found[0].write_text(WRONG[name])
    after = _another_run(running, before["run"])
    now = [folder / name for folder in _groups(running, after["run"]) if (folder / name).exists()]
    assert now, f"the run after it has ended, too: {running.log.read_text()}"
    assert now[0].read_text() == right
    assert _cause(running, before["run"]) == "its control groups were changed"


def _init(d: Daemon, run: str) -> int:
    """Pid 1 of the cage."""
    return min(int(pid) for pid in (_groups(d, run)[0] / "cgroup.procs").read_text().split())


def test_an_entry_of_proc_that_is_not_covered_any_more(running: Daemon) -> None:
    before = _show(running)
    pid = str(_init(running, before["run"]))
    subprocess.run(["nsenter", "--mount", "--pid", "--target", pid, "umount", "/proc/interrupts"], check=True)
    after = _another_run(running, before["run"])
    assert _cause(running, before["run"]) == "its /proc was changed"
    assert Path(f"/proc/{_init(running, after['run'])}/root/proc/interrupts").read_text() == ""


def test_figures_follow_a_plugin_at_snapshots(running: Daemon) -> None:
    meminfo = Path(f"/proc/{_init(running, _show(running)['run'])}/root/proc/meminfo")

    def free() -> bool:
        sizes = {line.split()[0]: int(line.split()[1]) for line in meminfo.read_text().splitlines()}
        return 0 < sizes["MemFree:"] < sizes["MemTotal:"]

    wait_for(free)


def test_processes_that_were_moved_out_of_their_group(running: Daemon) -> None:
    before = _show(running)
    groups = _groups(running, before["run"])
    pids = [int(pid) for pid in (groups[0] / "cgroup.procs").read_text().split()]
    assert len(pids) == 2
    elsewhere = groups[0].parent.parent / f"moved-{os.getpid()}"
    elsewhere.mkdir()
    try:
        for pid in pids:
            (elsewhere / "cgroup.procs").write_text(str(pid))
        _another_run(running, before["run"])
        wait_for(lambda: not any(map(alive, pids)), what="a process outlived its cage outside of its group")
        assert not _groups(running, before["run"])
    finally:
        wait_for(lambda: not (elsewhere / "cgroup.procs").read_text())
        elsewhere.rmdir()


def test_processes_that_were_moved_can_be_stopped(running: Daemon, tmp_path: Path) -> None:
    """At once, before anybody has noticed, and a sidecar that does not listen to SIGTERM."""
    deaf = write_plugin(
        tmp_path / "deaf",
        "#!/usr/bin/python3\nimport os, signal, socket\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "s = socket.socket(socket.AF_UNIX)\ns.bind(os.environ['PLUGIN_SOCKET'])\ns.listen()\nsignal.pause()\n",
    )
    running.cli("plugin", "add", str(deaf), "--yes")
    running.cli("plugin", "start", "deaf")
    run = wait_for(lambda: (e := running.json("plugin", "show", "deaf"))["state"] == "running" and e["run"])
    group = recovery.subtree_folders(Paths.of(running.root))[0] / f"deaf.{run}"
    elsewhere = group.parent.parent / f"moved-{os.getpid()}"
    elsewhere.mkdir()
    try:
        for pid in (group / "cgroup.procs").read_text().split():
            (elsewhere / "cgroup.procs").write_text(pid)
        running.cli("plugin", "stop", "deaf")
        assert not (elsewhere / "cgroup.procs").read_text()
    finally:
        elsewhere.rmdir()
        running.cli("plugin", "remove", "deaf", "--yes")


def test_a_frozen_cage_can_be_stopped(running: Daemon) -> None:
    before = _show(running)
    (_groups(running, before["run"])[0] / "cgroup.freeze").write_text("1")
    running.cli("plugin", "stop", "echo")
    assert not _groups(running, before["run"])
    assert _show(running)["run"] != before["run"]
    running.cli("event", "emit", "deploy.completed", event("thawed"), "--wait")


def _user(d: Daemon, plugin: str = "echo") -> str:
    return user_name(plugin, Paths.of(d.root).instance)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=seconds(30))


def test_a_user_that_was_deleted(running: Daemon) -> None:
    name = _user(running)
    uid = pwd.getpwnam(name).pw_uid
    running.cli("plugin", "stop", "echo")
    _run("userdel", name)
    try:
        refused = running.cli("plugin", "start", "echo", code=None)
        assert refused.returncode != 0
        shown = wait_for(lambda: (e := running.json("plugin", "show", "echo"))["error"] and e)
        assert f"system user {name}: is gone" in shown["error"] and f"--uid {uid} {name}" in shown["error"]
    finally:
        running.cli("plugin", "stop", "echo")
        _run("useradd", "--system", "--user-group", "--no-create-home", "--uid", str(uid), name)
    _show(running)


def test_a_uid_that_somebody_else_has_too(running: Daemon) -> None:
    name, other = _user(running), f"iso-test-{os.getpid()}"
    uid = pwd.getpwnam(name).pw_uid
    running.cli("plugin", "stop", "echo")
    _run("useradd", "--system", "--no-create-home", "--non-unique", "--uid", str(uid), other)
    try:
        assert running.cli("plugin", "start", "echo", code=None).returncode != 0
        shown = wait_for(lambda: (e := running.json("plugin", "show", "echo"))["error"] and e)
        assert f"is not alone with uid {uid}" in shown["error"]
    finally:
        running.cli("plugin", "stop", "echo")
        _run("userdel", other)
    _show(running)


def test_a_user_that_is_there_already_is_nobody_s_to_take(running: Daemon, tmp_path: Path) -> None:
    name = _user(running, "taken")
    _run("useradd", "--system", "--no-create-home", name)
    try:
        refused = running.cli("plugin", "add", str(write_plugin(tmp_path / "taken")), "--yes", code=None)
        assert refused.returncode != 0 and refused.stderr.count("\n") == 1
        assert f"system user {name}: exists already" in refused.stderr
        assert pwd.getpwnam(name), "the stranger's user was removed with what was undone"
        assert not (running.root / "var/lib/isolator/plugins/taken").exists()
        assert not (running.root / "etc/isolator/policies/taken.toml").exists()
    finally:
        _run("userdel", name)
