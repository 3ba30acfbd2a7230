"""The disk below the trail of a whole daemon fails: nothing more is done unrecorded, it is told, nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from host.client.client import Client
from isolator.audit import files
from isolator.audit.record import parse
from tests.support.disks import ext4_image, run, shut_down
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon, event, wait_for, write_plugin


@contextlib.contextmanager
def stopped_daemon(host_toml: str = "") -> Iterator[tuple[Daemon, Path]]:
    """A daemon that is not started yet, and the folder of its trail."""
    with daemon(host_toml=host_toml, start=False) as d:
        folder = d.root / "var/log/isolator/audit"
        folder.mkdir(parents=True)
        try:
            yield d, folder
        finally:
            if d.process is not None:
                d.stop()
            while os.path.ismount(folder):
                run("umount", "-l", str(folder))


@contextlib.contextmanager
def disk(size: int) -> Iterator[str]:
    """A loop device with an ext4; one for all its mounts, as a new one could find the old one's still there."""
    with ext4_image(size) as image:
        found = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True, check=True)
        try:
            yield found.stdout.strip()
        finally:
            run("losetup", "--detach", found.stdout.strip())


def mount_again(*arguments: str) -> None:
    """Mount a disk in another mode, once nobody has it mounted: another test may have made a namespace meanwhile."""
    command = ["mount", *arguments]
    wait_for(lambda: subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0, what="is held")


def prepare(d: Daemon, tmp_path: Path) -> None:
    """One plugin that runs, one that never did, and nothing that waits."""
    for name in ("echo", "late"):
        write_plugin(tmp_path / name, hooks=["deploy.completed"] if name == "echo" else ["deploy.failed"])
        d.cli("plugin", "add", str(tmp_path / name), "--yes")
    d.cli("event", "emit", "deploy.completed", event("before"), "--wait")


def metric(d: Daemon, name: str = "isolator_audit_blocked") -> str:
    text = subprocess.run(
        ["curl", "-s", "--unix-socket", str(d.root / "run/isolator/metrics.sock"), "http://isolator/metrics"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    assert found
    return found[1]


def is_durable(d: Daemon, folder: Path) -> bool:
    """Whether the trail has all that ``prepare`` has done: a disk that dies in a sync may say that it went well."""
    live = folder / files.LIVE
    seq = files.seq_of(files.last_line(live) or b"")
    return b'"type":"event.response"' in live.read_bytes() and metric(d, "isolator_audit_seq") == f"{float(seq or 0)}"


def ask(d: Daemon, method: str, **params: Any) -> dict[str, Any]:
    with Client(d.root) as client:
        return client.call(method, **params)


def blocked(d: Daemon) -> bool:
    """Whether the daemon has noticed; something is recorded, as otherwise it could not."""
    ask(d, "plugin.stop", name="late")
    return bool(ask(d, "status")["alarms"])


def alarm_is_given(d: Daemon, why: str, then: str) -> None:
    """Everywhere an operator looks."""
    for words, code in ((("plugin", "list"), 0), (("check",), 1)):
        told = d.cli(*words, code=code).stderr
        assert told.startswith("ALARM: the audit trail cannot be written: ") and why in told and then in told
    assert metric(d) == "1.0"
    log = wait_for(lambda: [line for line in d.log.read_text().splitlines() if "ALARM" in line])
    assert why in log[-1] and then in log[-1]


def emit(d: Daemon, *numbers: int) -> set[str]:
    for number in numbers:
        ask(d, "event.emit", name="deploy.completed", payload=json.loads(event(number)))
    return {f"d{number}" for number in numbers}


def nothing_moves(d: Daemon) -> None:
    """No event is handed on and nothing is started, though both are asked for."""
    before = d.noted("echo")
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(str(d.root / "run/isolator/control.sock"))
        asking.sendall(b'{"jsonrpc":"2.0","id":1,"method":"plugin.start","params":{"name":"late"}}\n')
        wait_for(lambda: ask(d, "plugin.show", name="late")["state"] == "starting")
        time.sleep(1)
        assert d.noted("echo") == before
        assert ask(d, "plugin.show", name="late")["state"] == "starting"
        assert ask(d, "plugin.show", name="echo")["state"] == "running"


def all_is_well_again(d: Daemon, wanted: set[str]) -> None:
    """Without a restart: everything accepted was delivered, everything is recorded, no alarm is left."""
    wait_for(lambda: wanted <= set(d.noted("echo")), what="an accepted event was lost")
    wait_for(lambda: ask(d, "plugin.show", name="late")["state"] == "running", what="what was asked for did not start")
    wait_for(lambda: not ask(d, "status")["alarms"])
    assert d.cli("plugin", "list").stderr == ""
    assert d.cli("check").stderr == "" and metric(d) == "0.0"
    assert "can be written again" in d.log.read_text()
    assert d.stop() == 0
    d.cli("audit", "verify")
    lines = [line for path in files.trail(d.root / "var/log/isolator/audit") for line in path.read_bytes().splitlines()]
    records = [record for line in lines if (record := parse(line)) is not None]
    assert len([r for r in records if r.type == "event.accepted"]) == len(wanted)
    assert len([r for r in records if r.type == "event.response"]) >= len(wanted)
    assert not [r.data for r in records if r.type == "audit.gap" and r.data["count"]]


def fill(folder: Path) -> Path:
    """Leave no room; returns what to delete to make some."""
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return ballast


def test_a_full_disk(tmp_path: Path) -> None:
    with stopped_daemon() as (d, folder):
        run("mount", "-t", "tmpfs", "-o", "size=2M", "none", str(folder))
        d.start()
        prepare(d, tmp_path)
        ballast = fill(folder)
        wait_for(lambda: blocked(d))
        alarm_is_given(d, "No space left on device", "nothing is started or dispatched")
        wanted = {"dbefore"} | emit(d, 1, 2, 3)
        nothing_moves(d)
        ballast.unlink()
        all_is_well_again(d, wanted)


def test_a_full_disk_that_may_be_gone_on_without(tmp_path: Path) -> None:
    with stopped_daemon('[audit]\ndisk_full = "continue"\n') as (d, folder):
        run("mount", "-t", "tmpfs", "-o", "size=2M", "none", str(folder))
        d.start()
        prepare(d, tmp_path)
        ballast = fill(folder)
        wait_for(lambda: blocked(d))
        alarm_is_given(d, "No space left on device", "goes on without it")
        wanted = {"dbefore"} | emit(d, 1, 2, 3)
        wait_for(lambda: wanted <= set(d.noted("echo")), what="it did not go on")
        d.cli("plugin", "start", "late")
        assert "ALARM" in d.cli("plugin", "list").stderr, "it was not full any more"
        ballast.unlink()
        all_is_well_again(d, wanted)


def test_a_disk_that_dies_comes_back_read_only_and_is_repaired(tmp_path: Path) -> None:
    with disk(16 << 20) as device, stopped_daemon() as (d, folder):
        run("mount", device, str(folder))
        d.start()
        # A follower through the daemon must not keep the disk from being unmounted.
        following = Client(d.root)
        first = following.call("audit.follow")["after"] + 1
        prepare(d, tmp_path)
        wait_for(lambda: is_durable(d, folder))
        shut_down(folder)
        wait_for(lambda: blocked(d))
        alarm_is_given(d, "Input/output error", "nothing is started or dispatched")
        wanted = {"dbefore"} | emit(d, 1, 2)
        nothing_moves(d)
        run("umount", str(folder))  # not lazily: nothing of the daemon's holds it
        subprocess.run(["e2fsck", "-p", device], check=False, stdout=subprocess.DEVNULL)
        mount_again("-o", "ro", device, str(folder))
        wait_for(lambda: "Read-only file system" in str(ask(d, "status")["alarms"]))
        wanted |= emit(d, 3)
        assert d.noted("echo") == ["dbefore"]
        run("umount", str(folder))
        mount_again(device, str(folder))
        wait_for(lambda: not ask(d, "status")["alarms"])
        lines: list[str] = []
        arriving = following.notifications()
        while sum('"type":"event.accepted"' in line for line in lines) < len(wanted):
            lines += next(arriving)["lines"]
        assert [json.loads(line)["seq"] for line in lines] == list(range(first, first + len(lines)))
        all_is_well_again(d, wanted)


def refused_start(d: Daemon) -> str:
    """The one line with which a start is refused."""
    done = subprocess.run(d.command(), capture_output=True, text=True, timeout=seconds(60), check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("place", ["var/log/isolator/audit", "var/lib/isolator/audit", "var/lib/isolator/host"])
def test_link_in_the_place_of_a_folder_is_not_followed(place: str, tmp_path: Path) -> None:
    """Its target keeps its owner and its mode."""
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o700)
    os.chown(victim, 64009, 64009)
    with daemon(start=False) as d:
        link = d.root / place
        link.parent.mkdir(parents=True)
        link.symlink_to(victim)
        message = refused_start(d)
        assert str(link) in message and "mount --bind" in message
        status = victim.stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (64009, 64009, 0o700)
        link.unlink()
        d.start()


FILES, KEYS = "var/log/isolator/audit", "var/lib/isolator/audit"


@pytest.mark.parametrize("gone", [(FILES, KEYS), (FILES,), (KEYS,)], ids=["both", "files", "keys"])
def test_trail_that_is_gone_is_not_begun_anew_in_silence(gone: tuple[str, ...]) -> None:
    with daemon() as d:
        d.stop()
        folders = [d.root / folder for folder in gone]
        for folder in folders:
            shutil.rmtree(folder)
        message = refused_start(d)
        marker = d.root / "var/lib/isolator/trail.begun"
        assert all(str(folder) in message for folder in folders) and str(marker) in message
        marker.unlink()  # what the message offers
        if gone == (KEYS,):
            assert f"move the files in {d.root / FILES} away" in message
            for file in (d.root / FILES).iterdir():
                file.unlink()
        d.start()
        began_anew = gone != (FILES,)  # else the keys know of records that are not there
        assert (d.cli("audit", "verify", code=None).returncode == 0) == began_anew and marker.exists()


def test_keys_without_their_folder_are_missed_although_the_marker_is_gone_too() -> None:
    """All of /var/lib/isolator may be on a disk that is not mounted."""
    with daemon() as d:
        d.stop()
        shutil.rmtree(d.root / "var/lib/isolator")
        assert str(d.root / KEYS) in refused_start(d)


@pytest.mark.parametrize("place", ["var/lib/isolator/state", "var/lib/isolator/plugins", "etc/isolator"])
def test_link_in_the_place_of_a_folder_of_roots_is_not_followed(place: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o750)
    with daemon(start=False) as d:
        link = d.root / place
        link.parent.mkdir(parents=True)
        link.symlink_to(victim)
        message = refused_start(d)
        assert str(link) in message and "mount --bind" in message
        assert victim.stat().st_mode & 0o7777 == 0o750
        link.unlink()
