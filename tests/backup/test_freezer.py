"""The state of a plugin is copied while nothing writes to it: its cage is frozen, and what else writes is noticed."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from isolator.backup import freezer
from isolator.backup.take import take
from isolator.errors import IsolatorError
from isolator.layers.cgroup.subtree import find_hierarchies
from isolator.paths import Paths
from tests.backup.plugins import BUSY
from tests.system.daemon import Daemon, daemon, wait_for, write_plugin

T = TypeVar("T")


@pytest.fixture
def writing(shared_dir: Path) -> Iterator[Daemon]:
    """A daemon with a plugin that writes to its state all the time."""
    with daemon() as d:
        folder = write_plugin(shared_dir / "busy", BUSY, sandbox={"filesystem": {"state": "4M"}})
        d.cli("plugin", "add", str(folder), "--yes")
        d.cli("plugin", "start", "busy")
        yield d


def snapshot(d: Daemon) -> Callable[[str], str]:
    from host.client.client import Client

    def call(backup_id: str) -> str:
        with Client(d.root) as client:
            return str(client.call("daemon.snapshot", id=backup_id)["file"])

    return call


def test_state_is_copied_only_while_its_plugin_is_frozen(
    writing: Daemon, shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ablation: of a plugin that writes on there is no copy. A copy takes until it has written, unless it rests."""
    paths, passphrase = Paths.of(writing.root), "correct horse battery staple"
    image = paths.state / "busy/image"
    rested = []

    def frozen() -> bool:
        return all("frozen 1" in (group / "cgroup.events").read_text() for group in freezer._cages(paths, "busy"))

    def copy_slowly(paths: Paths, name: str, pid: int | None, copy: Callable[[], T]) -> T:
        def slowly() -> T:
            assert freezer._cages(paths, name)
            before = image.read_bytes()
            made = copy()
            rested.append(wait_for(lambda: frozen() or (image.read_bytes() != before and "wrote")))
            return made

        return freezer.copy_state(paths, name, pid, slowly)

    monkeypatch.setattr("isolator.backup.take.copy_state", copy_slowly)
    (shared_dir / "taken").mkdir()
    take(paths, shared_dir / "taken/frozen", passphrase, snapshot(writing))
    assert set(rested) == {True}
    rested.clear()
    monkeypatch.setattr(freezer, "_frozen", lambda groups: contextlib.nullcontext())
    with pytest.raises(IsolatorError, match="changed each time"):
        take(paths, shared_dir / "taken/writing", passphrase, snapshot(writing))
    assert set(rested) == {"wrote"}
    assert [path.name for path in (shared_dir / "taken").iterdir()] == ["frozen"]


def test_write_right_after_another_is_noticed_whatever_the_clock_of_the_file_system(
    shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system may stamp writes with the tick of the clock in which they happen: two can bear one time."""
    subprocess.run(["mount", "-t", "ramfs", "none", str(shared_dir)], check=True)  # which does so on every kernel
    try:
        paths = Paths.of(shared_dir)
        paths.journal.parent.mkdir(parents=True)
        paths.journal.touch()
        image = paths.state / "busy/image"
        image.parent.mkdir(parents=True)

        def write() -> None:
            with image.open("r+b") as file:
                file.write(os.urandom(16))

        image.write_bytes(bytes(16))
        monkeypatch.setattr(freezer, "_sync", lambda folder: write())  # what is flushed is written just before
        with pytest.raises(IsolatorError, match="changed each time"):
            freezer.copy_state(paths, "busy", os.getpid(), write)
    finally:
        subprocess.run(["umount", str(shared_dir)], check=True)


def test_cage_that_ends_as_it_is_to_be_frozen_is_no_failure(shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its group is open by then, and each call answers that there is no such device."""
    own = find_hierarchies().unified
    assert own is not None
    group = own / f"isolator-test-{os.getpid()}"
    group.mkdir()
    start_thawer, copies = freezer._start_thawer, list[str]()

    def after_its_end(*arguments: Any) -> int:
        pid = start_thawer(*arguments)
        group.rmdir()
        return pid

    monkeypatch.setattr(freezer, "_cages", lambda *_: [group] if group.exists() else [])
    monkeypatch.setattr(freezer, "_start_thawer", after_its_end)
    try:
        freezer.copy_state(Paths.of(shared_dir), "echo", os.getpid(), lambda: copies.append("made"))
        assert copies == ["made"]
    finally:
        if group.exists():
            group.rmdir()
