"""Backups of a daemon that works: what comes back from them, what is refused, and what a kill at any instant leaves."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pwd
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from isolator.backup import archive, freezer, swap
from isolator.backup.archive import Entry
from isolator.backup.take import take
from isolator.errors import IsolatorError
from isolator.paths import Paths
from tests.backup.plugins import BUSY
from tests.support.timeouts import seconds
from tests.system.daemon import ECHO, Daemon, daemon, event, wait_for, write_plugin

PASSPHRASE = "correct horse battery staple"
STATE = {"filesystem": {"state": "4M"}}
CONFIG = {"token": {"type": "string", "required": True, "secret": True, "env": "TOKEN"}}
STORE = "var/lib/isolator/plugins"
TOKEN = "a-token-that-only-the-keys-open"


@dataclass
class Source:
    """A daemon that works, and a backup that was taken of it meanwhile."""

    daemon: Daemon
    place: Path
    passphrase: Path

    def restore(self, root: Path, *words: str, place: Path | None = None) -> subprocess.CompletedProcess[str]:
        return isolator(
            "--root", str(root), "restore", str(place or self.place), "--passphrase-file", str(self.passphrase), *words
        )


def isolator(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["isolator", *words], capture_output=True, text=True, check=False, timeout=seconds(90),
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


@contextlib.contextmanager
def folder_of_root() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="isolator-backup-"))
    place.chmod(0o755)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def source() -> Iterator[Source]:
    with folder_of_root() as place, daemon(host_toml="# of the source\n") as d:
        passphrase = place / "pass"
        passphrase.write_text(f"{PASSPHRASE}\n")
        passphrase.chmod(0o600)
        for name, script in (("echo", ECHO), ("busy", BUSY)):
            folder = write_plugin(place / name, script, sandbox=STATE, config=CONFIG)
            d.cli("plugin", "add", str(folder), "--yes", "--config", f"token={TOKEN}")
        d.cli("plugin", "add", str(write_plugin(place / "later")), "--yes")
        d.cli("plugin", "disable", "later")
        deliver(d, 0)
        emitting = [d.begin("event", "emit", "deploy.completed", event(number)) for number in range(1, 9)]
        made = d.json("backup", str(place / "taken"), "--passphrase-file", str(passphrase))
        for one in emitting:
            one.communicate(timeout=seconds(60))
        assert (made["live"], made["plugins"]) == (True, 3)
        yield Source(d, place / "taken", passphrase)


@pytest.fixture(scope="module")
def empty() -> Iterator[Daemon]:
    """A root on which nothing succeeds."""
    with another_host() as d:
        for folder in ("etc/isolator", "var/lib/isolator", "var/log/isolator", "run/isolator"):
            (d.root / folder).mkdir(parents=True)
        yield d


@contextlib.contextmanager
def another_host() -> Iterator[Daemon]:
    with daemon(start=False) as d:
        yield d


def states(root: Path) -> dict[tuple[str, str], str]:
    """(event id, plugin) -> state of a daemon that does not run."""
    with contextlib.closing(sqlite3.connect(root / "var/lib/isolator/host/host.db")) as db:
        found = db.execute("SELECT e.id, d.plugin, d.state FROM deliveries d JOIN events e ON e.seq=d.seq")
        return {(event_id, plugin): state for event_id, plugin, state in found}


def tree(root: Path) -> dict[str, tuple[int, int, int, str]]:
    """Everything below a folder: mode, uid, gid and digest by name."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(status.st_mode) else ""
        found[str(path.relative_to(root))] = (status.st_mode, status.st_uid, status.st_gid, content)
    return found


def test_restored_daemon_goes_on_and_delivers_nothing_that_had_ended(source: Source) -> None:
    with another_host() as d:
        done = json.loads(source.restore(d.root, "--json").stdout)
        assert (done["plugins"], done["moved"]) == (["busy", "echo", "later"], ["busy", "echo", "later"])
        before = states(d.root)
        ended = {key for key, state in before.items() if state == "ok"}
        assert ended and all(state == "queued" for (_, plugin), state in before.items() if plugin == "later")
        d.start()
        d.cli("plugin", "enable", "later")
        left = {key for key in before if key not in ended}
        wait_for(lambda: all(shown(d, key[0])[key[1]] == "ok" for key in left))
        records = d.records()
        at = next(n for n, record in enumerate(records) if record["type"] == "backup.restored")
        assert records[at]["data"]["taken"]
        since = {(r["event_id"], r["plugin"]) for r in records[at:] if r["type"] == "event.dispatched"}
        assert since == left
        known = {r["event_id"] for r in records[:at] if r["type"] == "event.accepted"}
        assert known == {event_id for event_id, _ in before}
        assert not [r for r in records if r["type"] == "audit.gap"]
        assert "fits together" in d.cli("audit", "verify").stdout.replace("\n", " ")
        assert not (d.root / "var/lib/isolator/restored").exists()
        # The plugin has its secret, or it would not start, and its state, under another uid.
        mine, theirs = (json.loads((r / STORE / "echo/plugin.state").read_text()) for r in (d.root, source.daemon.root))
        assert mine["uid"] != theirs["uid"]
        deliver(d, "again")
        seen = d.state_of("echo") / "seen"
        assert seen.stat().st_uid == mine["uid"]
        assert {"d0", "dagain"} <= set(seen.read_text().split())
        assert d.stop() == 0


def deliver(d: Daemon, number: int | str) -> None:
    """Emit an event, and wait until echo has it; what a disabled plugin has of it waits on."""
    emitted = d.json("event", "emit", "deploy.completed", event(number))["id"]
    wait_for(lambda: shown(d, emitted)["echo"] == "ok")


def shown(d: Daemon, event_id: str) -> dict[str, str]:
    return {one["plugin"]: one["state"] for one in d.json("event", "show", event_id)["deliveries"]}


def test_backup_without_a_daemon_is_of_its_files(source: Source) -> None:
    with another_host() as first, folder_of_root() as place, another_host() as second:
        assert source.restore(first.root).returncode == 0
        first.start()
        deliver(first, "offline")
        first.stop()
        made = first.json("backup", str(place / "cold"), "--passphrase-file", str(source.passphrase))
        assert not made["live"]
        assert source.restore(second.root, place=place / "cold").returncode == 0
        assert states(second.root) == states(first.root)
        assert "fits together" in second.cli("audit", "verify").stdout.replace("\n", " ")


def test_nobody_else_can_read_a_backup_and_no_key_lies_open_in_it(source: Source) -> None:
    for path in (source.place, *source.place.rglob("*")):
        status = path.lstat()
        assert (status.st_uid, stat.S_IMODE(status.st_mode) & 0o077) == (0, 0), path
    key = (source.daemon.root / "var/lib/isolator/audit/seal.key").read_bytes()
    secrets = [key.splitlines()[1], TOKEN.encode()]
    secrets += [
        key.encode() for key in json.loads((source.daemon.root / "var/lib/isolator/host/key").read_text())["keys"]
    ]
    for path in source.place.rglob("*"):
        if path.is_file():
            assert not [secret for secret in secrets if secret in path.read_bytes()], path


# --- what is refused -----------------------------------------------------------------------------------------------


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_name(place: Path) -> None:
    manifest = place / "manifest.json"
    manifest.write_text(
        manifest.read_text().replace('"path": "host.toml"', '"path": "host.tomI"').replace('"echo/', '"ech0/')
    )


def make_newer(manifest: Path) -> None:
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))


def link_first(place: Path) -> None:
    first = sorted((place / "data").iterdir())[0]
    first.unlink()
    first.symlink_to("/etc/hostname")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file that was damaged": (lambda p: damage(p / "data/1"), "damaged"),
    "a file that is missing": (lambda p: next(iter(sorted((p / "data").iterdir()))).unlink(), "cannot be restored"),
    "a file that is a link": (link_first, "cannot be restored"),
    "a manifest that was changed": (change_name, "somebody changed"),
    "a manifest that is cut": (lambda p: os.truncate(p / "manifest.json", 100), "is damaged"),
    "keys that were changed": (lambda p: damage(p / "keys.sealed"), "isolator:"),
    "no keys": (lambda p: (p / "keys.sealed").unlink(), "is no backup"),
    "no backup": (lambda p: [shutil.rmtree(p), p.mkdir()], "is no backup"),
    "a newer one": (lambda p: make_newer(p / "manifest.json"), "newer version"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_backup_that_is_not_whole_is_refused_and_nothing_changes(source: Source, empty: Daemon, fault: str) -> None:
    change, reason = FAULTS[fault]
    with folder_of_root() as place:
        shutil.copytree(source.place, place / "copy")
        change(place / "copy")
        refused(empty, lambda: source.restore(empty.root, place=place / "copy"), reason)


def refused(d: Daemon, call: Callable[[], subprocess.CompletedProcess[str]], reason: str) -> None:
    """The call fails with one line that has the reason, and nothing below the root has changed, nor who there is."""
    before, users = tree(d.root), users_of(d)
    result = call()
    assert result.returncode in (1, 2), result
    assert reason in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert (tree(d.root), users_of(d)) == (before, users)


def users_of(d: Daemon) -> list[str]:
    """The system users of one root; other daemons come and go meanwhile."""
    return [user.pw_name for user in pwd.getpwall() if user.pw_name.endswith(f"-{Paths.of(d.root).instance}")]


def test_wrong_passphrase_is_refused(source: Source, empty: Daemon, tmp_path: Path) -> None:
    wrong = replace(source, passphrase=tmp_path / "wrong")
    wrong.passphrase.write_text("another horse, another battery")
    wrong.passphrase.chmod(0o644)
    refused(empty, lambda: wrong.restore(empty.root), "can be read by others")
    wrong.passphrase.chmod(0o600)
    refused(empty, lambda: wrong.restore(empty.root), "the passphrase is another one")


def test_data_that_are_there_are_replaced_only_on_demand_and_kept(source: Source) -> None:
    with another_host() as d:
        assert source.restore(d.root).returncode == 0
        (d.root / "etc/isolator/policies/mine.toml").write_text("# mine\n")
        refused(d, lambda: source.restore(d.root), "--replace puts them aside")
        done = json.loads(source.restore(d.root, "--replace", "--json").stdout)
        assert done["moved"] == ["busy", "echo", "later"]  # their users of before serve
        assert not (d.root / "etc/isolator/policies/mine.toml").exists()
        assert [p.read_text() for p in (d.root / "etc/isolator").glob("replaced-*/policies/mine.toml")] == ["# mine\n"]
        assert (Path(done["replaced"]) / "plugins/echo/plugin.state").exists()


def mounted(command: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run isolator behind mounts of its own, which nobody else sees."""
    script = f'{command}; exec isolator "$@"'
    return subprocess.run(
        ["unshare", "-m", "--propagation", "private", "sh", "-ec", script, "sh", *words],
        capture_output=True, text=True, check=False, timeout=seconds(90), stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_backup_names_what_is_not_in_it(source: Source) -> None:
    with another_host() as d, folder_of_root() as place:
        assert source.restore(d.root).returncode == 0
        registered = d.root / "var/lib/isolator/plugins/later/plugin.state"
        state = json.loads(registered.read_text())
        state["release"] |= {"kind": "binary", "binary_path": "/usr/local/bin/later", "binary_sha256": "0" * 64}
        registered.write_text(json.dumps(state))
        log = d.root / "var/log/isolator/plugins/echo.log"
        log.parent.mkdir(parents=True)
        log.write_text("x" * 1500)
        policies = d.root / "etc/isolator/policies"
        words = (
            "--root",
            str(d.root),
            "backup",
            str(place / "b"),
            "--passphrase-file",
            str(source.passphrase),
            "--json",
        )
        made = mounted(f"mount --bind {policies} {policies}", *words)
        assert made.returncode == 0, made.stderr
        assert json.loads(made.stdout)["left_out"] == [
            f"{policies} is a mount point: what lies there is in the backup, "
            "and a restore asks you to unmount it first",
            f"not in it: the logs of plugins, 2 KiB in {log.parent}",
            "not in it: /usr/local/bin/later, the program of later, registered by its path",
        ]


@pytest.mark.parametrize("name", ["policies", "host.toml"])
def test_mount_point_that_cannot_be_exchanged_is_refused_before_a_change(source: Source, name: str) -> None:
    with another_host() as d:
        assert source.restore(d.root).returncode == 0
        place = d.root / "etc/isolator" / name
        words = ("restore", str(source.place), "--replace", "--passphrase-file", str(source.passphrase))
        command = f"mount --bind {place} {place}"
        refused(d, lambda: mounted(command, "--root", str(d.root), *words), "is a mount point of its own")
        assert source.restore(d.root, "--replace").returncode == 0


def test_daemon_that_runs_is_not_restored_over(source: Source) -> None:
    result = source.restore(source.daemon.root, "--replace")
    assert (result.returncode, "another one is running" in result.stderr) == (1, True), result.stderr
    assert source.daemon.json("plugin", "list")


HOSTILE = ("../evil", "/etc/evil", "link/evil", "a/../../evil", "policies/./x", "nul\0")


@pytest.mark.parametrize("name", [*HOSTILE[:3], *(pytest.param(name, marks=pytest.mark.wide) for name in HOSTILE[3:])])
def test_hostile_name_leads_nowhere_even_with_the_passphrase(source: Source, empty: Daemon, name: str) -> None:
    with folder_of_root() as place:
        shutil.copytree(source.place, place / "copy")
        manifest, keys = archive.read(place / "copy", PASSPHRASE)
        number = next(n for n, entry in enumerate(manifest.entries) if entry.kind == "file")
        manifest.entries[number] = replace(manifest.entries[number], area="etc")
        object.__setattr__(manifest.entries[number], "path", name)  # none can be made so
        (place / "outside").mkdir()
        manifest.entries.insert(0, Entry("etc", "link", "link", goal=str(place / "outside")))
        text = manifest.encode()
        (place / "copy/manifest.json").write_bytes(text)
        (place / "copy/keys.sealed").write_bytes(archive.seal(PASSPHRASE, keys, text))
        data = sorted((place / "copy/data").iterdir(), key=lambda path: -int(path.name))
        for path in data:
            path.rename(path.with_name(str(int(path.name) + 1)))
        reason = "cannot be restored" if name == "link/evil" else "leads out"
        refused(empty, lambda: source.restore(empty.root, place=place / "copy"), reason)
        assert not list((place / "outside").iterdir())


@pytest.mark.parametrize("place", ["var/lib/isolator/host/host.db", "var/log/isolator/audit/audit.jsonl"])
@pytest.mark.parametrize("kind", ["link", "second name"])
def test_file_of_somebody_else_does_not_get_into_a_backup(
    source: Source, place: str, kind: str, tmp_path: Path
) -> None:
    with another_host() as d, folder_of_root() as target:
        assert source.restore(d.root).returncode == 0
        victim = d.root / "victim"
        victim.write_text("root:secret")
        planted = d.root / place
        planted.unlink()
        planted.symlink_to(victim) if kind == "link" else planted.hardlink_to(victim)
        result = d.cli("backup", str(target / "b"), "--passphrase-file", str(source.passphrase), code=1)
        assert result.stderr.count("\n") == 1
        assert not list(target.iterdir())


def test_place_that_others_could_exchange_is_refused(source: Source) -> None:
    with folder_of_root() as place:
        words = ("--passphrase-file", str(source.passphrase))
        (place / "theirs").mkdir()
        os.chown(place / "theirs", 65534, 65534)
        assert "could exchange" in source.daemon.cli("backup", str(place / "theirs/b"), *words, code=2).stderr
        assert "is there already" in source.daemon.cli("backup", str(source.place), *words, code=2).stderr
        (place / "link").symlink_to(place / "theirs")
        assert "could exchange" in source.daemon.cli("backup", str(place / "link/b"), *words, code=2).stderr
        assert not list((place / "theirs").iterdir())


def test_host_that_was_taken_over_names_no_file_but_its_copy(source: Source) -> None:
    with folder_of_root() as place:
        for name in ("key", "../audit/seal.key", "host.db"):
            with pytest.raises(IsolatorError, match="named another file"):
                take(Paths.of(source.daemon.root), place / "b", PASSPHRASE, lambda _, name=name: name)
        assert not list(place.iterdir())
        assert (source.daemon.root / "var/lib/isolator/host/host.db").exists()


# --- kills ---------------------------------------------------------------------------------------------------------


KILLED = """
import os, signal, sys
from host.cli.main import main
from isolator.backup import {module}
before = {module}.{name}
def kill(*words, **more):
    global left
    left -= 1
    if left < 0:
        os.killpg(0, signal.SIGKILL)
    return before(*words, **more)
left = {number}
{module}.{name} = kill
sys.exit(main())
"""


def killed(source: Source, module: str, name: str, number: int, *words: str) -> int:
    """Run a command that kills itself when it calls that function for the n-th time; returns its exit code."""
    code = KILLED.format(module=module, name=name, number=number)
    command = [sys.executable, "-I", "-c", code, *words, "--passphrase-file", str(source.passphrase)]
    return subprocess.run(command, check=False, capture_output=True, start_new_session=True).returncode


def test_kill_of_a_backup_leaves_no_plugin_frozen_and_no_backup(source: Source) -> None:
    d = source.daemon
    d.cli("plugin", "start", "busy", code=None)
    with folder_of_root() as place:
        target = place / "b"
        assert killed(source, "freezer", "_sync", 0, "--root", str(d.root), "backup", str(target)) == -9
        assert not target.exists()
        groups = freezer._cages(Paths.of(d.root), "busy")
        assert groups
        wait_for(lambda: all("frozen 0" in (group / "cgroup.events").read_text() for group in groups))
        deliver(d, "after")
        d.cli("backup", str(target), "--passphrase-file", str(source.passphrase))
        assert [path.name for path in place.iterdir()] == ["b"]
        assert not list((d.root / "var/lib/isolator/host").glob("snapshot-*"))


def plain(root: Path) -> dict[str, Any]:
    """Whatever of a root a restore decides on; names of times left out."""
    found = tree(root)
    return {name: one for name, one in found.items() if "replaced-" not in name and not name.startswith("run/")}


STEPS = [
    ("restore", "sync_tree", 1),
    ("swap", "sync_folder", 0),
    ("restore", "copy_sparse", 3),
    ("swap", "replace_file", 0),
    ("swap", "sync_folder", 1),
    ("swap", "remove_user", 0),
    ("swap", "replace_file", 1),
]


@pytest.mark.parametrize(
    "step", [*STEPS[:2], *(pytest.param(step, marks=pytest.mark.wide) for step in STEPS[2:])], ids=str
)
def test_kill_of_a_restore_leaves_the_old_or_the_new(source: Source, step: tuple[str, str, int]) -> None:
    with another_host() as d:
        assert source.restore(d.root).returncode == 0
        old = json.loads((d.root / "var/lib/isolator/plugins/echo/plugin.state").read_text())
        extra = d.root / "var/lib/isolator/plugins/extra"
        shutil.copytree(d.root / "var/lib/isolator/plugins/echo", extra)
        registration = json.dumps({**old, "name": "extra", "user": "nobody-of-isolator-tests", "uid": 64999})
        (extra / "plugin.state").write_text(registration)
        before = plain(d.root)
        module, name, number = step
        assert (
            killed(source, module, name, number, "--root", str(d.root), "restore", str(source.place), "--replace") == -9
        )
        decided = module == "swap" and (name, number) != ("replace_file", 0)
        swap.finish(Paths.of(d.root))  # as the next daemon's start does
        left = plain(d.root)
        assert not [found for found in left if ".restore" in found or "restore.intent" in found]
        assert extra.exists() != decided
        if not decided:
            assert left == before
        else:
            assert states(d.root) and (d.root / "var/lib/isolator/restored").exists()
            assert (d.root / "var/lib/isolator/host/key").stat().st_uid == (
                d.root / "var/lib/isolator/host"
            ).stat().st_uid
