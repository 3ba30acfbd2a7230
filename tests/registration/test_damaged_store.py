"""Strangers' files and damaged ones in the plugins folder: the daemon names each in a line and goes on."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from isolator.errors import IsolatorError
from isolator.registration import policy_files
from isolator.registration.store import Intent, Registration, Release, Store

GOOD = Registration("good", "plugin-good", 60001, Release("a" * 64, "1.0.0"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "plugins")
    made.save(GOOD)
    return made


def test_what_no_daemon_made_stays(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    base = store.base
    (base / "lost+found").mkdir()
    (base / "notes.txt").write_text("mine")
    (base / ".staging-file").write_text("mine")
    (base / "link").symlink_to("/nowhere")
    (base / "backup").mkdir()
    (base / "backup/precious").write_text("mine")
    before = sorted(base.rglob("*"))
    with caplog.at_level(logging.WARNING):
        store.prune_all()
    assert sorted(base.rglob("*")) == before
    for name in ("lost+found", "notes.txt", "link", "backup"):
        assert f"{base / name} is nothing of the daemon's" in caplog.text


def test_remains_of_a_killed_daemon_go(store: Store) -> None:
    base = store.base
    for folder in (".staging-12", "gone", f"gone/{'b' * 64}", "empty"):
        (base / folder).mkdir()
    (base / f"gone/{'b' * 64}/main").write_text("x")
    (base / "good/.plugin.state").write_text("{")
    store.prune_all()
    assert sorted(path.name for path in base.iterdir()) == ["good"]
    assert [path.name for path in (base / "good").iterdir()] == ["plugin.state"]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "nested": lambda path: path.write_bytes(b"[" * 100_000),
    "no UTF-8": lambda path: path.write_bytes(b'{"name": "\xff\xfe"}'),
    "a list": lambda path: path.write_bytes(b"[1]"),
    "a number": lambda path: path.write_bytes(b"7"),
    "another shape": lambda path: path.write_bytes(b'{"name": "good"}'),
    "a FIFO": os.mkfifo,
    "a folder": os.mkdir,
    "a link": lambda path: path.symlink_to("/etc/passwd"),
    "sparse": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
    "another type": lambda path: path.write_text(json.dumps({**asdict(GOOD), "uid": "60001"})),
    "another plugin": lambda path: path.write_text(json.dumps({**asdict(GOOD), "name": "other"})),
    "a way out": lambda path: path.write_text(
        json.dumps({**asdict(GOOD), "release": {"digest": "../x", "version": "1"}})
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_state_is_one_plugin_s_fault_in_one_line(store: Store, kind: str) -> None:
    path = store.base / "good/plugin.state"
    path.unlink()
    DAMAGE[kind](path)
    with pytest.raises(IsolatorError) as refused:
        store.load("good")
    assert str(refused.value).startswith(f"{path}: cannot be read: ")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400
    store.prune_all()
    assert store.names() == ["good"] and os.path.lexists(path)


@pytest.mark.parametrize("file", ["plugin.intent", "plugin.removed", "plugin.trial"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_mark_stops_nobody(store: Store, kind: str, file: str, caplog: pytest.LogCaptureFixture) -> None:
    store.begin(Intent("other", 1, user="plugin-other"))
    path = store.base / "good" / file
    DAMAGE[kind](path)
    assert [intent.name for intent in store.intents()] == ["other"]
    assert store.removed() == [] and store.trial("good") is None
    if file == "plugin.intent" or (file == "plugin.removed" and kind != "another plugin"):
        assert str(path) in caplog.text
    assert store.load("good") == GOOD


_FAILING_DISK = """
import os, pathlib, subprocess, sys
from isolator.errors import IsolatorError
from isolator.registration.staging import Staged
from isolator.registration.store import Store

outer, place = (pathlib.Path(sys.argv[1], name) for name in ("outer", "place"))
outer.mkdir()
place.mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", outer], check=True)
with (outer / "image").open("wb") as image:
    image.truncate(32 << 20)
subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", outer / "image"], check=True)
subprocess.run(["mount", "-o", "loop", outer / "image", place], check=True)
store, digest = Store(place / "plugins"), "d" * 64
folder = store.base / ".staging-1"
folder.mkdir()
(folder / "main").write_bytes(os.urandom(8 << 20))
try:
    store.keep(Staged("1", "good", digest, folder, b"", synthesised=False))
except IsolatorError as error:
    print(error)
    print("kept" if (store.base / "good" / digest).exists() else "not kept")
"""


def test_failed_write_of_a_copy_is_noticed_before_anything_refers_to_it(tmp_path: Path) -> None:
    """On an ext4 whose image lies on a full disk: what is written to it fails on its way there.

    In mounts of its own: a cage that another test starts meanwhile would hold a copy of the disk's.
    """
    run = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", _FAILING_DISK, tmp_path],
        check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    error, kept = run.stdout.splitlines()
    assert error.startswith(f"{tmp_path}/place/plugins/.staging-1: ") and kept == "not kept"


@pytest.mark.parametrize("kind", ["folder", "fifo", "link", "large"])
def test_policy_file_of_no_use_is_named_and_hangs_nobody(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "p.toml"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/etc/passwd")
    else:
        path.write_bytes(b"#" * (2 << 20))
    with pytest.raises(IsolatorError, match=re.escape(str(path))):
        policy_files.read(path)


def test_folder_with_the_name_of_an_unfinished_policy_keeps_no_daemon_from_its_start(tmp_path: Path) -> None:
    (tmp_path / ".p.toml.being-written").mkdir()
    (tmp_path / ".q.toml.being-written").write_text("")
    policy_files.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".p.toml.being-written"]
