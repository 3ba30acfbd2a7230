"""``isolator gc`` after ``isolator run`` was killed: everything it left is shown, then gone; what runs stays."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolator.layers.user import LOCKS
from isolator.paths import Paths
from tests.support.cage_fixture import COMMAND, caged, isolator, leaves
from tests.support.processes import children

_WAITING = ("sh", "-c", "echo ready; exec sleep 300")


@pytest.fixture(autouse=True)
def _cleared(shared_dir: Path) -> Iterator[None]:
    """Also what a test that failed has left."""
    yield
    _gc(shared_dir)


@contextlib.contextmanager
def _run(root: Path) -> Iterator[tuple[subprocess.Popen[str], int, int]]:
    """A running ``isolator run``, the pid of its launcher, and the uid of its cage; killed at the end."""
    process = subprocess.Popen(
        [*COMMAND, "--root", str(root), "run", "--", *_WAITING], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        uid = next(os.stat(f"/proc/{pid}").st_uid for pid in caged(root) if os.stat(f"/proc/{pid}").st_uid)
        launcher = next(pid for pid in children(process.pid) if pid not in caged(root))
        yield process, launcher, uid
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _left(root: Path) -> list[str]:
    """Every trace of a root's runs: journals and groups."""
    return sorted(map(str, [*Paths.of(root).run.glob("run-*"), *leaves(root)]))


def _gc(root: Path, *words: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(isolator(root, "gc", "--json", *words).stdout)
    # Another test run on this machine may leave a uid's lock at the same moment; a root's runs are its own.
    return [one for one in found if one["kind"] != "uid lock"]


def _is_free(lock: Path, number: int) -> bool:
    """Whether the dead run's lock is gone, or in the hands of whoever else runs something on this machine."""
    try:
        with lock.open() as file:
            if os.fstat(file.fileno()).st_ino != number:
                return True
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (FileNotFoundError, BlockingIOError):
        return True
    return not lock.exists()


@pytest.mark.parametrize("victims", ["command", "launcher and command", "command, launcher stopped"])
def test_what_a_killed_run_left_is_shown_then_removed(shared_dir: Path, victims: str) -> None:
    with _run(shared_dir) as (process, launcher, uid):
        lock = Path(LOCKS, str(uid))
        before = lock.stat().st_ino
        if victims == "launcher and command":
            os.kill(process.pid, 19)  # so that it cannot take the cage down in an orderly way
            os.kill(launcher, 9)
        stopped = victims.endswith("stopped")
        if stopped:
            os.kill(launcher, 19)  # nothing ends the cage but gc (its own pid 1 may)
        process.kill()
        process.wait()
        try:
            left = _left(shared_dir)
            assert any("run-" in path and path.endswith(".journal") for path in left)
            assert any("/isolator-" in path for path in left)
            (shown,) = _gc(shared_dir, "--dry-run")
            assert shown["kind"] == "run"
            assert _left(shared_dir) == left, "a dry run changed something"
            (removed,) = _gc(shared_dir)
            assert removed["name"] == shown["name"]
            assert _left(shared_dir) == []
            assert _gc(shared_dir) == []
            assert not Paths.of(shared_dir).run.exists()
        finally:
            if stopped:
                os.kill(launcher, 9)
    assert _is_free(lock, before)


def test_a_running_one_is_not_touched(shared_dir: Path) -> None:
    with _run(shared_dir) as (process, _, uid):
        before = _left(shared_dir), caged(shared_dir)
        assert _gc(shared_dir) == []
        assert (_left(shared_dir), caged(shared_dir)) == before
        assert process.poll() is None
        assert Path(LOCKS, str(uid)).exists()


def test_a_dead_one_beside_a_running_one(shared_dir: Path) -> None:
    with _run(shared_dir) as (dead, _, _):
        dead.kill()
        dead.wait()
        left = _left(shared_dir)
        with _run(shared_dir) as (alive, _, _):
            assert len(_gc(shared_dir)) == 1
            assert alive.poll() is None
            assert not set(left) & set(_left(shared_dir))
            assert len(caged(shared_dir)) == 2  # its pid 1 and sleep


def test_groups_without_a_journal(shared_dir: Path) -> None:
    """A clearing that was itself killed, or somebody who deleted the journal: the name of the group is enough."""
    with _run(shared_dir) as (process, _, _):
        for journal in Paths.of(shared_dir).run.glob("run-*.journal"):
            journal.unlink()
        assert _gc(shared_dir) == [], "it runs: whose it is cannot be told"
        process.kill()
        process.wait()
        pids = caged(shared_dir)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.close(_wait_gone(os.pidfd_open(pid)))
        assert [one["kind"] for one in _gc(shared_dir)] == ["run"]
        assert _left(shared_dir) == []


def _wait_gone(pidfd: int) -> int:
    import select

    assert select.select([pidfd], [], [], 10)[0]
    return pidfd


def test_a_link_or_a_stranger_in_the_run_folder_is_left_alone(shared_dir: Path) -> None:
    run = Paths.of(shared_dir).run
    run.mkdir(parents=True)
    target = shared_dir / "precious"
    target.write_text("kept")
    (run / "run-0123456789.journal").symlink_to(target)
    (run / "run-xyz.journal").write_text("not ours")
    os.mkfifo(run / "run-9876543210.journal")
    assert _gc(shared_dir) == []
    assert target.read_text() == "kept"
    assert (run / "run-xyz.journal").exists()


_HOLD = """
import asyncio, os, sys
from isolator.standalone.session import StandaloneSession
from isolator.paths import Paths
from isolator.volume.volume import Volume
async def main():
    async with StandaloneSession(Paths.of(sys.argv[1])) as session:
        state = Volume(session.paths.lib / "prove-0123456789", "echo", session.runtime.journal)
        os.close(state.open(size=2 << 20, inodes=64, uid=70000, gid=70000))
        print("ready", flush=True)
        await asyncio.sleep(300)
asyncio.run(main())
"""


def test_a_state_that_a_killed_prove_left_mounted(shared_dir: Path) -> None:
    command = [sys.executable, "-I", "-c", _HOLD, str(shared_dir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.wait()
    process.stdout.close()
    place = Paths.of(shared_dir).lib / "prove-0123456789"
    assert f" {place}/" in Path("/proc/self/mountinfo").read_text()
    assert {"kind": "folder", "name": str(place), "detail": ""} in _gc(shared_dir, "--dry-run")
    assert place.exists()
    _gc(shared_dir)
    assert not place.exists()
    assert _gc(shared_dir) == []
