"""What people and disks do to the host's database and key: told in one line, made no worse, mended by undoing it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon, event, kill_9, wait_for, write_plugin


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that has stopped, with a plugin, a secret and an event that still waits."""
    folder = tmp_path_factory.mktemp("damaged")
    plugin = write_plugin(folder / "echo", config_schema={"token": {"type": "string", "secret": True}})
    with daemon(start=False) as d:
        d.start()
        d.cli("plugin", "add", str(plugin), "--yes", "--config", "token=some-secret")
        d.cli("event", "emit", "deploy.completed", event(0), "--wait")
        d.cli("plugin", "disable", "echo")
        d.cli("event", "emit", "deploy.completed", event(1))
        d.stop()
        yield d


@contextlib.contextmanager
def kept(d: Daemon) -> Iterator[Path]:
    """The host's folder, put back in the end as it was."""
    folder = d.root / "var/lib/isolator/host"
    copy = d.root / "copy"
    _copy(folder, copy)
    d.log.write_text("")
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
        _copy(copy, folder)
        shutil.rmtree(copy)


def _copy(source: Path, target: Path) -> None:
    """Copy with owners."""
    shutil.copytree(source, target)
    for made in (target, *target.iterdir()):
        status = (source if made == target else source / made.name).stat()
        os.chown(made, status.st_uid, status.st_gid)


def _damage(folder: Path) -> None:
    with (folder / "host.db").open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(8192))


def _newer(folder: Path) -> None:
    with contextlib.closing(sqlite3.connect(folder / "host.db")) as db:
        db.execute("PRAGMA user_version=99")
        db.commit()


def _link(folder: Path) -> None:
    (folder / "host.db").rename(folder / "elsewhere")
    (folder / "host.db").symlink_to("elsewhere")


def _folder(folder: Path) -> None:
    (folder / "host.db").unlink()
    (folder / "host.db").mkdir()


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "damaged": (_damage, "is damaged: "),
    "another file": (lambda f: (f / "host.db").write_bytes(b"no database" * 1000), "file is not a database"),
    "newer": (_newer, "was written by a newer version"),
    "a link": (_link, "is a symbolic link"),
    "a folder": (_folder, "is not a plain file"),
    "of another user": (lambda f: os.chown(f / "host.db", 0, 0), "belongs to uid 0; chown "),
    "unreadable": (lambda f: (f / "host.db").chmod(0o200), "has the mode 200; chmod 600 "),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_database_of_no_use_is_told_and_left_alone(stopped: Daemon, kind: str) -> None:
    change, why = BAD[kind]
    with kept(stopped) as folder:
        change(folder)
        before = [p.lstat() for p in sorted(folder.iterdir()) if p.name != "host.db-reserve"]
        line = stopped.cli("serve", code=1).stderr
        assert line.count("\n") == 1 and line.startswith(f"isolator: {folder / 'host.db'}: ") and why in line, line
        after = [p.lstat() for p in sorted(folder.iterdir()) if not p.name.endswith(("-wal", "-shm", "-reserve"))]
        assert [(s.st_size, s.st_mode, s.st_uid) for s in after] == [(s.st_size, s.st_mode, s.st_uid) for s in before]


def test_put_back_everything_is_there(stopped: Daemon) -> None:
    stopped.start()
    try:
        stopped.cli("plugin", "enable", "echo")
        wait_for(lambda: "d1" in stopped.noted("echo"), what="the event that waited was lost")
        assert stopped.json("plugin", "config", "echo")[0]["is_set"]
    finally:
        stopped.stop()


@pytest.mark.parametrize("gone", ["host.db*", "*", ""], ids=["database", "all files", "folder"])
def test_database_that_is_gone_is_not_begun_anew_in_silence(stopped: Daemon, gone: str) -> None:
    marker = stopped.root / "var/lib/isolator/database.begun"
    with kept(stopped) as folder:
        for path in folder.glob(gone) if gone else ():
            path.unlink()
        if not gone:
            shutil.rmtree(folder)
        line = stopped.cli("serve", code=1).stderr
        assert line.count("\n") == 1 and "mount it, or restore a backup" in line and str(marker) in line, line
        assert not (folder / "host.db").exists()
        marker.unlink()  # what the message offers
        for path in folder.glob("*"):
            path.unlink()
        stopped.start()
        try:
            assert marker.exists()
            stopped.cli("event", "emit", "deploy.completed", event(2), "--wait")
        finally:
            stopped.stop()


def test_host_that_dies_with_its_database_comes_back_with_it() -> None:
    with daemon() as d:
        host, pid = d.root / "var/lib/isolator/host", d.service_pid("host.service")
        os.kill(pid, signal.SIGSTOP)
        host.rename(d.root / "away")
        kill_9(pid)
        wait_for(lambda: "ALARM: host does not start: " in d.log.read_text())
        assert "mount it, or restore a backup" in d.log.read_text()
        with contextlib.suppress(FileNotFoundError):
            host.rmdir()
        (d.root / "away").rename(host)
        wait_for(lambda: d.cli("event", "list", code=None).returncode == 0)
        (ended,) = [r["data"] for r in d.records() if r["type"] == "service.ended"]
        assert ended == {"service": "host", "why": "killed by SIGKILL", "hung": False}


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        pytest.param("missing", "is missing", marks=pytest.mark.wide),
        ("readable", "must be a plain file of uid"),
    ],
)
def test_without_its_key_a_plugin_with_secrets_waits_and_says_why(stopped: Daemon, kind: str, why: str) -> None:
    with kept(stopped) as folder:
        key = folder / "key"
        if kind == "missing":
            key.unlink()
        else:
            key.chmod(0o644)
        stopped.start()
        try:
            assert why in stopped.log.read_text()
            emitted = stopped.json("event", "emit", "deploy.completed", event(3))["id"]
            wait_for(
                lambda: (
                    why in (stopped.json("event", "show", emitted)["deliveries"][0]["holding"] or "")
                    or why in (stopped.json("plugin", "show", "echo")["error"] or "")
                )
            )
            assert any(why in alarm for alarm in stopped.json("check", code=1)["alarms"])
            assert not key.exists() or key.stat().st_mode & 0o777 == 0o644, "a bad key was replaced"
        finally:
            stopped.stop()


def test_a_database_that_somebody_locks(stopped: Daemon) -> None:
    """Emitting is refused with one line after a few seconds; what was accepted is delivered; nothing else stops."""
    stopped.start()
    try:
        path = stopped.root / "var/lib/isolator/host/host.db"
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            result = stopped.cli("event", "emit", "deploy.completed", event(4), code=1)
            assert "database is locked" in result.stderr and result.stderr.count("\n") == 1
            stopped.cli("plugin", "list")
            db.execute("ROLLBACK")
        wait_for(
            lambda: stopped.cli("event", "emit", "deploy.completed", event(5), "--wait", code=None).returncode == 0,
            seconds(30),
        )
    finally:
        stopped.stop()


def test_log_that_is_removed_in_use_costs_no_event(tmp_path: Path) -> None:
    with daemon() as d:
        d.cli("plugin", "add", str(write_plugin(tmp_path / "echo")), "--yes")
        d.cli("plugin", "disable", "echo")
        accepted = [d.json("event", "emit", "deploy.completed", event(number))["id"] for number in range(5)]
        pid = d.service_pid("host.service")
        (d.root / "var/lib/isolator/host/host.db-wal").unlink()
        d.cli("event", "emit", "deploy.completed", event("unanswered"), code=None)
        wait_for(lambda: d.service_pid("host.service", missing_ok=True) not in (0, pid))
        alarms = wait_for(lambda: d.json("check", code=None)["alarms"])
        assert "host.db-wal was removed while in use; all of its content was saved" in alarms[0]
        (record,) = [r["data"] for r in d.records() if r["type"] == "database.damaged"]
        assert record["why"] in alarms[0]
        kept = [row["id"] for row in d.json("event", "list")]
        assert set(accepted) <= set(kept)


def test_accepted_events_that_a_killed_host_could_not_save_are_told(tmp_path: Path) -> None:
    with daemon() as d:
        d.cli("plugin", "add", str(write_plugin(tmp_path / "echo")), "--yes")
        d.cli("plugin", "disable", "echo")
        accepted = [d.json("event", "emit", "deploy.completed", event(number))["id"] for number in range(5)]
        pid = d.service_pid("host.service")
        wait_for(lambda: accepted[-1] in [r["event_id"] for r in d.records()])
        os.kill(pid, signal.SIGSTOP)
        (d.root / "var/lib/isolator/host/host.db-wal").unlink()
        kill_9(pid)
        alarms = wait_for(lambda: d.json("check", code=None)["alarms"])
        assert f"5 accepted events are on the trail and not in {d.root / 'var/lib/isolator/host/host.db'}" in alarms[0]
        (record,) = [r["data"] for r in d.records() if r["type"] == "database.damaged"]
        assert (record["missing"], record["last"]) == (5, accepted[-1])
        d.cli("event", "emit", "deploy.completed", event("next"))
        numbers = [r["data"]["number"] for r in d.records() if r["type"] == "event.accepted"]
        assert numbers == sorted(set(numbers))
        d.stop()
        d.start()
        assert d.json("check")["alarms"] == []


def test_plugins_that_find_no_room_on_the_disk_leave_no_descriptor_open(tmp_path: Path) -> None:
    """Whatever the size at which the disk is full: at the first file, in the middle of one, at the manifest."""
    with daemon() as d:
        assert d.process is not None
        place = d.root / "var/lib/isolator/plugins"
        plugin = write_plugin(tmp_path / "big")
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k,mode=755", "none", place], check=True)
        try:
            pids = (d.process.pid, d.service_pid("host.service"))
            for size in (1, 200 << 10, 255 << 10, 4 << 20):
                (plugin / "data").write_bytes(os.urandom(size))
                d.cli("plugin", "add", str(plugin), "--yes", code=None)
                d.cli("plugin", "remove", "big", "--yes", code=None)
            before = [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]
            for _ in range(5):
                refused = d.cli("plugin", "add", str(plugin), "--yes", code=1).stderr
                assert "No space left on device" in refused and refused.count("\n") == 1, refused
            wait_for(lambda: [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids] == before, what="descriptors leak")
        finally:
            subprocess.run(["umount", place], check=True)
