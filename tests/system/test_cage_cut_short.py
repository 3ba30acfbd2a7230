"""A supervisor that is killed at any step of a cage's start or stop: what it made is found, named and removed.

The steps are not chosen by hand. A child process starts and stops one plugin with the daemon's own code: everything
but the three services. Each of its calls that is about to change something outside the process is counted
(``sys.addaudithook`` for files, folders, programs and messages; wrappers for what goes by system calls of its own), and
the child kills itself before the n-th, for every n until it comes through. Then this process does what a daemon's
start does, and looks for anything that is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isolator.cage.runtime import CageRuntime
from isolator.ipc.messages import Environment
from isolator.launcher.client import Launcher
from isolator.layers.cgroup.subtree import open_subtree
from isolator.layers.seccomp import layer as seccomp
from isolator.linux import loop, mount, netns, nftables
from isolator.paths import Paths
from isolator.policy.host import HostConfig
from isolator.recovery import daemon as recovery
from isolator.recovery import journal as journal_module
from isolator.recovery.journal import Entry, Journal
from isolator.registration.registrar import Registrar
from isolator.registration.staging import Source
from isolator.supervisor.fences import Fences
from isolator.supervisor.lifecycle.plugin import Plugin
from isolator.supervisor.rest import Rest
from isolator.supervisor.run import RunContext
from isolator.supervisor.socket_watch import SocketWatch
from isolator.volume.volume import Volume
from tests.registration.test_cut_short import EFFECTS, WRITES
from tests.support.offers import offered
from tests.support.sidecars import raw
from tests.support.timeouts import seconds
from tests.system.daemon import alive, wait_for, write_plugin

NAME = "cut-cage"
MESSAGES = frozenset({"socket.sendmsg", "os.posix_spawn", "os.kill"})
HIDDEN: tuple[tuple[Any, str], ...] = (
    (Journal, "_append"), (mount, "attach"), (mount, "unmount"), (mount, "new_filesystem"), (mount, "clone_tree"),
    (loop, "attach"), (netns, "unshare_network"), (signal, "pidfd_send_signal"), (os, "waitid"),
)  # fmt: skip
"""What changes something and raises no audit event."""


class _NoAudit:
    """In place of the audit client and of the seccomp notifier: their records are tested with the whole daemon."""

    def record(self, *_: Any, **__: Any) -> None: ...

    def watch(self, listener: int, _: Any) -> None:
        os.close(listener)


class _NoBroker:
    """In place of the link to the broker."""

    async def attach(self, *_: Any) -> None: ...

    async def detach(self, run: str) -> None: ...


class _NoHost:
    """In place of the link to the host."""

    async def environment(self, name: str) -> Environment:
        return Environment(env={"KEY": "value"}, files={"secret": "text"})

    def listen(self, *_: Any) -> socket.socket:
        return socket.socket(socket.AF_UNIX)

    def run_started(self, *_: Any) -> None: ...

    async def drain(self, name: str, run: str, reason: str) -> None: ...

    async def stderr_tail(self, name: str, run: str) -> tuple[str, ...]:
        return ()

    def run_ended(self, *_: Any, **__: Any) -> None: ...


class _World:
    def __init__(self, root: Path) -> None:
        self.paths = Paths.of(root / "root")
        for folder in (self.paths.policies, self.paths.plugins, self.paths.state, self.paths.run, self.paths.cache):
            folder.mkdir(parents=True, exist_ok=True)
        sandbox = {"network": {"egress": []}, "filesystem": {"state": "2M"}}
        self.folder = write_plugin(root / "plugins" / NAME, raw("connection.close()"), sandbox=sandbox)
        self.registrar = Registrar(self.paths, HostConfig())
        self.registrar.add(self.registrar.stage(Source(path=str(self.folder)), offered(self.folder)).staged.token)
        self.uid = self.registrar.store.load(NAME).uid
        # What a process does once is no step of a start: the children have it from here.
        seccomp.compiled("default", self.paths.cache)
        with nftables.Nftables():
            pass

    async def live(self, tell: Callable[[int], None], begin: Callable[[], None], end: Callable[[], None]) -> None:
        """One daemon's worth: bring up what a cage needs, start the plugin, stop it, take everything down."""
        journal = Journal(self.paths.journal)
        subtree = open_subtree(self.paths.named("isolator"))
        journal.record(Entry("subtree", "subtree", tuple(map(str, subtree.folders()))))
        launcher = Launcher()
        tell(launcher.pid)
        context: Any = RunContext(
            self.paths, CageRuntime(launcher, journal, subtree), audit := _NoAudit(), host := _NoHost(),
            broker := _NoBroker(), SocketWatch(), _NoAudit(), wait_for_trail=False, rest=Rest(),
            fences=(fences := Fences(audit, broker, host)),
        )  # fmt: skip
        plugin = Plugin(context, self.registrar.load(NAME), lambda _: None)
        begin()
        plugin.start("operator")
        await plugin.wait_running()
        await plugin.stop("asked")
        Volume(self.paths.state, NAME, journal).close()
        end()
        assert not plugin.error, plugin.error
        fences.close()
        launcher.close()
        subtree.remove()
        journal.forget("subtree")
        journal.close()

    # --- what is there ---------------------------------------------------------------------------------------

    def outside(self) -> set[str]:
        """Everything of this root that exists outside a process, by the name under which it has to be reported."""
        found = {place for place in recovery.mounts_below(self.paths.state)}
        for top in recovery.subtree_folders(self.paths):
            with contextlib.suppress(FileNotFoundError):
                found |= {child.name for child in top.iterdir() if child.is_dir()}
        return found

    def loops(self) -> list[str]:
        listed = subprocess.run(["losetup", "-nO", "BACK-FILE"], capture_output=True, text=True, check=True).stdout
        return [line for line in listed.splitlines() if str(self.paths.root) in line]

    def caged(self) -> list[int]:
        """Processes of the plugin's user."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and entry.stat().st_uid == self.uid and alive(int(entry.name)):
                    found.append(int(entry.name))
        return found


@pytest.fixture
def world(shared_dir: Path) -> Iterator[_World]:
    made = _World(shared_dir)
    try:
        yield made
    finally:
        with contextlib.closing(Journal(made.paths.journal)) as journal:
            recovery.clear(made.paths, journal)
            recovery.remove_subtree(made.paths)
        made.registrar.remove(made.registrar.store.load(NAME), lambda _: None)


def _killed_before(step: int, world: _World) -> str | None:
    """Let a child live until just before its ``step``-th effect; which that was, or None when it came through.

    Every other time its launcher, which would end its cage, is killed with it.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            _arm(step, write, world)
            os._exit(0)
        except BaseException as error:  # whatever it is must not run on in the copy of the test process
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    os.close(write)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    launcher, _, at = os.read(read, 400).decode().partition("\n")
    os.close(read)
    assert code in (0, -signal.SIGKILL), f"step {step}: the start or stop failed by itself"
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(int(launcher))
        if step % 2:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert select.select([pidfd], [], [], seconds(10))[0], f"the launcher outlived a kill before {at}"
        os.close(pidfd)
    return at if code else None


def _arm(step: int, tell: int, world: _World) -> None:
    left, counting = step, False

    def effect(name: str) -> None:
        nonlocal left
        if not counting:
            return
        left -= 1
        if left == 0:
            os.write(tell, name.encode())
            signal.raise_signal(signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EFFECTS or event in MESSAGES:
            effect(f"{event} {arguments[:1]}"[:150])
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
            effect(f"open {arguments[0]}"[:150])

    def counted(owner: Any, name: str) -> None:
        whole = getattr(owner, name)

        def call(*arguments: Any, **further: Any) -> Any:
            effect(name)
            return whole(*arguments, **further)

        setattr(owner, name, call)

    def write_pid(pid: int) -> None:
        os.write(tell, f"{pid}\n".encode())

    def count(on: bool) -> None:
        nonlocal counting
        counting = on

    sys.addaudithook(hook)
    for owner, name in HIDDEN:
        counted(owner, name)
    asyncio.run(world.live(write_pid, lambda: count(True), lambda: count(False)))


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.wide)])
def test_nothing_is_left_whichever_step_it_dies_at(world: _World, stride: int) -> None:
    steps: list[str] = []
    reported = 0
    for step in range(1, 1000, stride):
        shutil.rmtree(world.paths.state)  # so that each start makes the image as well
        world.paths.state.mkdir(mode=0o700)
        at = _killed_before(step, world)
        if at is None:
            break
        steps.append(at)
        left = world.outside()
        shown = recovery.find(world.paths, journal_module.read_unlocked(world.paths.journal) or {})
        with contextlib.closing(Journal(world.paths.journal)) as journal:
            said = recovery.clear(world.paths, journal)
            assert {(one.kind, one.name) for one in said} == {(one.kind, one.name) for one in shown}, at
            assert left <= {Path(one.name).name if one.kind == "group" else one.name for one in said}, (at, left, said)
            assert set(journal.open) == set(), at
        reported += bool(left)
        assert not world.outside(), f"left after a kill before {at}"
        assert not world.caged(), f"a process outlived a kill before {at}"
        wait_for(lambda: not world.loops(), seconds(60), f"a loop device is left after a kill before {at}")
    else:
        raise AssertionError("it never came through")
    assert len(steps) > 60 // stride, steps
    assert reported > len(steps) // 2, "hardly a kill left anything: what is tested here?"
    assert not world.outside() and not world.caged() and not world.loops()
    assert pwd.getpwuid(world.uid)


def test_plugin_is_stopped_although_its_drain_fails(world: _World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*_: Any) -> None:
        raise RuntimeError("whatever it was")

    monkeypatch.setattr(_NoHost, "drain", fails)
    life = world.live(lambda _: None, lambda: None, lambda: None)
    asyncio.run(asyncio.wait_for(life, seconds(8)))
    assert not world.outside() and not world.caged()
