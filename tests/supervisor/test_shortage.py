"""A host that is short of something says so; it accuses no plugin of it, and ends none that does what it should."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from isolator.cage.link import Link
from isolator.errors import ConfinementError, ExecError, UnavailableError
from isolator.ipc.messages import Origin
from isolator.layers.base import Process, mismatch
from isolator.layers.cgroup.layer import Cgroup
from isolator.layers.network import namespace as network_layer
from isolator.linux.descriptors import owning
from isolator.linux.shortage import is_shortage
from isolator.policy.model import NetworkPolicy
from isolator.supervisor import alive, ruleset_watch
from isolator.supervisor import run as run_module
from isolator.supervisor.alarms import Alarms
from isolator.supervisor.cage_spec import SOCKET
from isolator.supervisor.lifecycle.plugin import Plugin
from isolator.supervisor.preparing import origin_of
from isolator.supervisor.ruleset_watch import watched_ruleset
from isolator.supervisor.run import Run
from isolator.supervisor.sidecar_socket import SidecarSocket
from isolator.supervisor.snapshots import keep_snapshots
from tests.support.cage_fixture import cage
from tests.support.descriptors import none_free
from tests.support.timeouts import seconds


async def test_cage_that_cannot_be_looked_at_is_not_one_that_was_changed(
    shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a descriptor is free again or not by the time that an explanation is looked for."""
    confirm = Cgroup.confirm_again

    def short(self: Cgroup, process: Any) -> None:
        with none_free():
            confirm(self, process)

    async with cage(shared_dir, ["sleep", "60"]) as started:
        with none_free(), pytest.raises(OSError, match="Too many open files"):
            started.cage.detect_drift()
        with monkeypatch.context() as then:
            then.setattr(Cgroup, "confirm_again", short)
            with pytest.raises(OSError, match="Too many open files"):
                started.cage.detect_drift()
        assert started.cage.detect_drift() == ""


async def test_cage_that_cannot_be_read_back_after_a_reload_does_not_pass_for_one_that_ends(shared_dir: Path) -> None:
    async with cage(shared_dir, ["sleep", "60"]) as started:
        with none_free(), pytest.raises(ConfinementError, match="Too many open files") as raised:
            started.cage.confirm()
        assert is_shortage(raised.value)
        started.cage.confirm()


async def test_cage_whose_end_cannot_be_told_from_a_change_has_not_held(
    shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(process: Process) -> bool:
        with none_free():
            return bool(process.read("stat"))

    def differs(*_: object) -> None:
        raise mismatch("cgroup", "v2 group", "its own", "another")

    async with cage(shared_dir, ["sleep", "60"]) as started:
        monkeypatch.setattr(Process, "ending", property(short))
        monkeypatch.setattr(Cgroup, "confirm", differs)
        with pytest.raises(ConfinementError, match="Too many open files"):
            started.cage.confirm()
        monkeypatch.undo()


async def test_cage_is_killed_without_a_descriptor(shared_dir: Path) -> None:
    async with cage(shared_dir, ["sleep", "60"]) as started:
        with none_free():
            started.cage.kill()
        async with asyncio.timeout(seconds(20)):
            assert (await started.cage.wait()).signal == signal.SIGKILL


async def test_what_is_left_of_a_cage_that_cannot_be_looked_at_is_killed(shared_dir: Path) -> None:
    async with cage(shared_dir, ["sleep", "60"]) as started:
        with none_free():
            async with asyncio.timeout(seconds(20)):
                await started.cage.processes.silence()
        assert started.cage.processes.exited.is_set()


async def test_looks_that_were_not_possible_are_an_alarm_until_they_are() -> None:
    def detect_drift() -> str:
        if short:
            raise OSError(errno.EMFILE, "Too many open files", "/proc/1/stat")
        return ""

    short = True
    recorded, ended = asyncio.Event(), list[str]()
    run = SimpleNamespace(
        cage=SimpleNamespace(started=True, refresh_figures=lambda usage: None), exited=False, shown={}, usage=dict,
        use=SimpleNamespace(latest={}), detect_drift=detect_drift, terminate=lambda cause, _: ended.append(cause),
    )  # fmt: skip
    one = SimpleNamespace(
        name="one", state="running", run=run, invocations=SimpleNamespace(runs=[]),
        record_use=lambda *_: recorded.set(),
    )  # fmt: skip
    raised = asyncio.Event()
    alarms = Alarms(lambda _: raised.set())
    looking = asyncio.create_task(keep_snapshots(cast(Any, SimpleNamespace(plugins={"one": one})), None, 0.001, alarms))
    async with asyncio.timeout(seconds(10)):
        await raised.wait()
        assert alarms.lines == (
            "cages cannot be looked at (Too many open files): whoever changes one is not noticed meanwhile",
        )
        assert not alarms.ends
        short = False
        await recorded.wait()
    looking.cancel()
    assert alarms.ends and not ended
    alarms.close()


async def test_rules_that_cannot_be_read_have_not_been_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells of a change once: they are read as soon as that is possible."""
    monkeypatch.setattr(ruleset_watch, "_AGAIN", 0.01)
    policy = NetworkPolicy(mode="none")
    network = network_layer.prepare(policy)
    found: asyncio.Queue[str] = asyncio.Queue()
    looks: asyncio.Queue[bool] = asyncio.Queue()
    confirm, short = network_layer.confirm, True

    def confirmed(*arguments: Any) -> None:
        with none_free() if short else contextlib.nullcontext():
            looks.put_nowait(short)
            confirm(*arguments)

    monkeypatch.setattr(network_layer, "confirm", confirmed)
    try:
        inside = os.dup(network.netns_fd)
        with watched_ruleset(network, policy, found.put_nowait):
            async with asyncio.timeout(seconds(20)):
                await _nft(inside, "add table inet other; delete table inet other")
                assert [await looks.get() for _ in range(3)] == [True] * 3
                short = False
                while await looks.get():
                    pass
                assert found.empty()
                await _nft(inside, "add table inet other")
                assert "it was changed" in await found.get()
        os.close(inside)
    finally:
        network_layer.release(network)


async def test_rules_that_could_not_be_read_are_read_once_and_by_nobody_behind_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = NetworkPolicy(mode="none")
    network = network_layer.prepare(policy)
    loop, confirm = asyncio.get_running_loop(), network_layer.confirm
    looks: asyncio.Queue[None] = asyncio.Queue()
    later, call_later = list[asyncio.TimerHandle](), loop.call_later

    def confirmed(*arguments: Any) -> None:
        with none_free():
            looks.put_nowait(None)
            confirm(*arguments)

    def noted(_: float, call: Any) -> asyncio.TimerHandle:
        later.append(call_later(1000, call))
        return later[-1]

    monkeypatch.setattr(network_layer, "confirm", confirmed)
    monkeypatch.setattr(loop, "call_later", noted)
    try:
        inside = os.dup(network.netns_fd)
        with watched_ruleset(network, policy, lambda _: None):
            for _ in range(3):
                await _nft(inside, "add table inet other; delete table inet other")
                await looks.get()
            assert len(later) >= 3 and [one.cancelled() for one in later].count(False) == 1
        os.close(inside)
        assert all(one.cancelled() for one in later)
    finally:
        network_layer.release(network)


async def _nft(network: int, commands: str) -> None:
    enter = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{network}", "nft", commands]
    await asyncio.to_thread(subprocess.run, enter, check=True)


@pytest.fixture
def run(shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    made = object.__new__(Run)
    made.streams, made.port, made.socket_there, made._unseen = [], None, asyncio.Event(), None
    absent: Any = None
    made.unix_socket = SidecarSocket("plugin", "run", absent, (0, 0), absent)

    @contextlib.contextmanager
    def folder() -> Iterator[int]:
        with owning(os.open(shared_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as found:
            yield found

    monkeypatch.setattr(made.unix_socket, "folder", folder)
    monkeypatch.setattr(run_module, "UNSEEN_SECONDS", 0.01)
    return made


async def test_socket_that_could_not_be_looked_for_is_looked_for_again(run: Run, shared_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(shared_dir / SOCKET))
        with none_free():
            run._check_socket()
            first = run._again
            run._check_socket()  # as at each change of its folder
            assert first is not None and first.cancelled()
            assert run._unseen is not None and not run.socket_there.is_set()
        async with asyncio.timeout(seconds(20)):
            await run.socket_there.wait()
        assert run._unseen is None


async def test_process_whose_progress_cannot_be_read_is_not_one_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alive, "TICK", seconds(0.02))
    work = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    with subprocess.Popen(work, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None and other.stdout.readline()
            with none_free(), pytest.raises(UnavailableError, match="is busy and does not answer"):
                await alive.answered(asyncio.Event().wait(), other.pid, "other", ticks=2 * alive.STILL_TICKS)
        finally:
            other.kill()


@pytest.mark.parametrize(
    ("number", "origin"),
    [(errno.ENOENT, Origin.PLUGIN), (errno.ENOEXEC, Origin.PLUGIN), (errno.ENFILE, Origin.DAEMON),
     (errno.ENOMEM, Origin.DAEMON), (errno.EIO, Origin.DAEMON), (errno.EAGAIN, Origin.DAEMON)],
)  # fmt: skip
def test_program_is_to_blame_for_a_failed_exec_only_if_it_is_the_reason(number: int, origin: Origin) -> None:
    failure = Link(cast(Any, None), "one").failure({"step": "exec", "errno": number, "detail": os.strerror(number)})
    assert origin_of(failure) == origin and isinstance(failure, ExecError) == (origin == Origin.PLUGIN)


def test_path_of_which_nothing_can_be_told_was_not_replaced(shared_dir: Path) -> None:
    """As by a file system that has gone away; here one whose name is too long for any."""
    made = object.__new__(Run)
    loop = shared_dir / "loop"
    loop.symlink_to(loop)
    there, other = os.lstat(shared_dir), (1, 1)
    made.shown = {
        str(shared_dir): (there.st_dev, there.st_ino), "/" + "x" * 300: other, str(shared_dir / "none"): other,
        str(loop / "below"): other, "/etc": other,
    }  # fmt: skip
    assert made.replaced() == (str(shared_dir / "none"), str(loop / "below"), "/etc")


async def test_paths_that_hang_take_no_thread_from_others() -> None:
    """One for each plugin waits, for as long as the file system hangs."""
    read, write = os.pipe()
    plugins = []
    for _ in range(40):
        one = Plugin.__new__(Plugin)
        one.outdated, one.run = "", cast(Any, SimpleNamespace(shown={"/x": (1, 1)}, replaced=lambda: os.read(read, 1)))
        plugins.append(one)
    comparing = [asyncio.create_task(one.compare_files()) for one in plugins]
    try:
        await asyncio.sleep(0)
        async with asyncio.timeout(seconds(20)):
            await asyncio.to_thread(os.getpid)
    finally:
        for one in plugins:
            one.run = None
        os.close(write)
        await asyncio.wait(comparing)
        os.close(read)
