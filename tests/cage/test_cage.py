"""The life of one cage: how it starts, how it ends, what is said about it, and that nothing of it is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest

from isolator.cage import cage as cage_module
from isolator.cage.cage import Cage
from isolator.errors import ConfinementError, UnavailableError
from isolator.layers.base import CageSpec
from isolator.layers.cgroup.leaf import IDLE, read_file
from isolator.layers.plan import Plan
from isolator.linux.inotify import IN_MODIFY, Inotify
from isolator.linux.priority import SLICE, Attributes
from isolator.policy.model import ResourcePolicy
from tests.support.cage_fixture import StartedCage, cage, leaves, policy
from tests.support.descriptors import open_descriptors
from tests.system.daemon import wait_for

MIB = 1 << 20


async def _end(root: Path, *argv: str, **fields: object) -> tuple[int, str, str]:
    """(return code, cause, output) of one command."""
    async with cage(root, list(argv), policy(**fields)) as one:
        end = await one.cage.wait()
        return end.returncode, end.cause, one.text()


# --- starting ------------------------------------------------------------------------------------------------


async def test_a_program_that_is_not_there(shared_dir: Path) -> None:
    with pytest.raises(ConfinementError, match=r"/nothing: No such file or directory; check the name"):
        await _end(shared_dir, "/nothing")
    assert not leaves(shared_dir)


async def test_a_name_that_is_nowhere_on_the_path(shared_dir: Path) -> None:
    with pytest.raises(ConfinementError, match="no-such-program: No such file or directory"):
        await _end(shared_dir, "no-such-program")


async def test_an_argument_that_the_kernel_refuses(shared_dir: Path) -> None:
    with pytest.raises(ConfinementError, match="Argument list too long; the kernel takes 2 MiB"):
        await _end(shared_dir, "true", "x" * 200_000)


@pytest.mark.parametrize(
    ("content", "mode", "complaint"),
    [
        ("#!/bin/sh\n", 0o644, "Permission denied; make it executable"),
        ("nonsense\n", 0o755, "Exec format error; it is neither a program of this architecture nor a script"),
        ("#!/no/such/interpreter\n", 0o755, "No such file or directory"),
    ],
)
async def test_a_file_that_cannot_be_executed(shared_dir: Path, content: str, mode: int, complaint: str) -> None:
    folder = shared_dir / "files"
    folder.mkdir()
    (folder / "program").write_text(content)
    (folder / "program").chmod(mode)
    fs = policy().filesystem.model_copy(update={"read": (str(folder),)})
    with pytest.raises(ConfinementError, match=complaint):
        await _end(shared_dir, f"{folder}/program", filesystem=fs)


async def test_a_cage_that_is_not_built_in_time(shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cage_module, "_SET_UP_SECONDS", 0.3)

    class Stuck(Cage):
        def _born(self, *args: object) -> None:
            super()._born(*args)
            os.kill(self.pid, signal.SIGSTOP)

    with pytest.raises(ConfinementError, match="not built in"):
        async with cage(shared_dir, ["true"], cage_type=Stuck):
            pass
    assert not leaves(shared_dir)


async def test_child_that_failed_and_ended_before_it_was_looked_at_tells_its_own_reason(shared_dir: Path) -> None:
    """It is in no group any more by then."""

    class Late(Cage):
        def _confirm_birth(self, *args: object) -> None:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            super()._confirm_birth(*args)

    def change(spec: CageSpec) -> None:
        spec.cwd = "/nowhere"

    with pytest.raises(ConfinementError, match="working directory: /nowhere: No such file or directory"):
        async with cage(shared_dir, ["true"], cage_type=Late, change=change):
            pass


async def test_a_child_that_dies_while_it_is_built(shared_dir: Path) -> None:
    class Dying(Cage):
        def _born(self, *args: object) -> None:
            super()._born(*args)
            os.kill(self.pid, signal.SIGKILL)

    # It may have entered all its layers by the time it dies: then it is an end like any other.
    with contextlib.suppress(ConfinementError, OSError):
        async with cage(shared_dir, ["sleep", "300"], cage_type=Dying) as one:
            end = await one.cage.wait()
            assert (end.signal, end.cause) == (signal.SIGKILL, "signal")
    assert not leaves(shared_dir)


@pytest.mark.vm
async def test_what_is_not_confirmed_never_runs(shared_dir: Path) -> None:
    """The read-back sees a limit that somebody changed between writing it and exec."""

    class Tampered(Cage):
        async def _confirmed(self, *args: object) -> None:
            for path in self.leaf.values(self.spec.policy.resources):
                if path.endswith("/pids.max"):
                    Path(path).write_text("max")
            await super()._confirmed(*args)

    with pytest.raises(ConfinementError, match=r"pids\.max is max"):
        async with cage(shared_dir, ["sh", "-c", "echo ran"], cage_type=Tampered):
            pass
    assert (shared_dir / "out").read_text() == ""
    assert not leaves(shared_dir)


@pytest.mark.vm
async def test_a_lost_layer_is_noticed(shared_dir: Path) -> None:
    """A plan without the user section would leave root: the user layer's read-back refuses."""

    class Lost(Cage):
        def __init__(self, *args: object, **others: object) -> None:
            super().__init__(*args, **others)
            user = next(layer for layer in self._layers if layer.name == "user")
            prepare = user.prepare

            def forget(spec: CageSpec, plan: Plan) -> None:
                prepare(spec, plan)
                del plan.sections["user"]

            user.prepare = forget

    with pytest.raises(ConfinementError, match="layer user: Uid is"):
        async with cage(shared_dir, ["true"], cage_type=Lost):
            pass


async def test_pid_1_is_root_s_to_look_into_and_holds_nothing_of_the_launcher(shared_dir: Path) -> None:
    """The plugin has its uid: were it dumpable, its memory and its descriptors would be the plugin's too."""
    async with cage(shared_dir, ["sleep", "300"]) as one:
        process = Path(f"/proc/{one.cage.pid}")
        # It closes the last ones when the sidecar runs.
        await asyncio.to_thread(wait_for, lambda: len(os.listdir(process / "fd")) == 1, what="it holds more than one")
        assert [(process / name).stat().st_uid for name in ("environ", "mem", "fd")] == [0, 0, 0]
        # The pipe of its report on the sidecar's end.
        assert [os.readlink(fd).split(":")[0] for fd in (process / "fd").iterdir()] == ["pipe"]


# --- ending --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 42, 125, 255])
async def test_an_exit_code(shared_dir: Path, code: int) -> None:
    assert await _end(shared_dir, "sh", "-c", f"exit {code}") == (code, "exit", "")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL", "SIGSEGV", "SIGABRT", "SIGHUP"])
async def test_a_death_by_signal(shared_dir: Path, name: str) -> None:
    number = signal.Signals[name]
    assert (await _end(shared_dir, "sh", "-c", f"kill -{number} $$"))[:2] == (128 + number, "signal")


@pytest.mark.vm
async def test_out_of_memory(shared_dir: Path) -> None:
    small = ResourcePolicy(memory=32 * MIB, memory_high=28 * MIB)
    code, cause, _ = await _end(shared_dir, "python3", "-c", "x = bytearray(200 << 20)", resources=small)
    assert (code, cause) == (128 + signal.SIGKILL, "out of memory")


@pytest.mark.vm
async def test_out_of_memory_in_a_child_ends_the_whole_cage(shared_dir: Path) -> None:
    small = ResourcePolicy(memory=32 * MIB, memory_high=28 * MIB)
    script = "python3 -c 'x = bytearray(200 << 20)' & wait; echo survived; sleep 60"
    code, cause, _ = await _end(shared_dir, "sh", "-c", script, resources=small)
    assert (code, cause) == (128 + signal.SIGKILL, "out of memory")


@pytest.mark.vm
async def test_the_task_limit(shared_dir: Path) -> None:
    few = ResourcePolicy(tasks=4)
    script = "for i in 1 2 3 4 5 6 7 8; do sleep 5 & done; exit 7"
    code, cause, _ = await _end(shared_dir, "bash", "-c", script, resources=few)
    assert cause == "task limit"
    assert code != 0


async def _ready(one: StartedCage) -> None:
    """Wait until it has written "ready"; inotify tells of each write."""
    with contextlib.closing(Inotify()) as watch:
        watch.watch(str(one.out), IN_MODIFY)
        loop, written = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(watch.fileno(), lambda: (watch.read(), written.set()))
        try:
            async with asyncio.timeout(20):
                while "ready" not in one.text():
                    await written.wait()
                    written.clear()
        finally:
            loop.remove_reader(watch.fileno())


async def test_a_stop_asks_first(shared_dir: Path) -> None:
    script = "trap 'echo asked; exit 3' TERM; echo ready; while :; do sleep 0.05; done"
    async with cage(shared_dir, ["bash", "-c", script]) as one:
        await _ready(one)
        await one.cage.stop(10)
        end = await one.cage.wait()
        assert (end.exit_code, end.cause) == (3, "stopped")
        assert one.text().startswith("ready\n") and one.text().endswith("asked\n"), one.text()


async def test_a_stop_does_not_ask_twice(shared_dir: Path) -> None:
    script = "trap '' TERM; echo ready; while :; do sleep 0.05; done"
    async with cage(shared_dir, ["bash", "-c", script]) as one:
        await _ready(one)
        await one.cage.stop(0.2)
        end = await one.cage.wait()
        assert (end.signal, end.cause) == (signal.SIGKILL, "stopped")


@pytest.mark.vm
async def test_what_it_started_ends_with_it(shared_dir: Path) -> None:
    async with cage(shared_dir, ["bash", "-c", "setsid sleep 300 & setsid nohup sleep 300 & exit 0"]) as one:
        leaf = one.cage.leaf
        await one.cage.wait()
        assert leaf.wait_empty(5)


async def test_nothing_of_it_runs_once_it_is_silent(shared_dir: Path) -> None:
    """Pid 1 may still be on its way out then: the kernel takes its namespaces down."""
    script = "echo ready; while :; do echo x; done & while :; do echo y; done"
    async with cage(shared_dir, ["sh", "-c", script]) as started:
        await _ready(started)
        await started.cage.processes.silence()
        assert {*started.cage.leaf.processes()} <= {started.cage.pid}
        written = started.out.stat().st_size
    assert started.out.stat().st_size == written


_SUCCESSORS = """
import os, sys
if os.fork() == 0:
    os.setsid()
    while True:
        if os.fork():
            os._exit(0)
"""


async def test_silence_ends_processes_that_fork_and_end_all_the_time(shared_dir: Path) -> None:
    """Pid 1 ends as the first does: until then, none may be passed by that makes way for the next."""
    for _ in range(5):
        async with cage(shared_dir, ["python3", "-c", _SUCCESSORS]) as one:
            assert (await one.cage.wait()).exit_code == 0
            await one.cage.processes.silence()
            assert {*one.cage.leaf.processes()} <= {one.cage.pid}


async def test_pid_1_of_the_cage_is_killed(shared_dir: Path) -> None:
    async with cage(shared_dir, ["sleep", "300"]) as one:
        leaf = one.cage.leaf
        os.kill(one.cage.pid, signal.SIGKILL)
        end = await one.cage.wait()
        assert (end.signal, end.cause) == (signal.SIGKILL, "signal")
        assert leaf.wait_empty(5)


async def test_orphans_are_reaped(shared_dir: Path) -> None:
    script = "for i in $(seq 50); do (sleep 0.01 &) ; done; sleep 1; ls /proc | grep -c '^[0-9]'"
    _, _, text = await _end(shared_dir, "bash", "-c", script)
    assert int(text) < 10


# --- what is left --------------------------------------------------------------------------------------------


@pytest.mark.vm
async def test_nothing_is_left(shared_dir: Path) -> None:
    def here() -> tuple[set[str], list[str], list[Path]]:
        fds = {f"{n} {os.readlink(f'/proc/self/fd/{n}')}" for n in open_descriptors() if _is_open(n)}
        mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(shared_dir) in line]
        return {fd for fd in fds if "/proc/" not in fd}, mounts, leaves(shared_dir)

    await _end(shared_dir, "true")  # what is loaded once is loaded now
    before = here()
    for argv in (["true"], ["sh", "-c", "sleep 300 & kill -9 $$"], ["/nothing"]):
        with contextlib.suppress(ConfinementError):
            await _end(shared_dir, *argv)
    assert here() == before
    assert not list((shared_dir / "run/isolator").glob("run-*"))


def _is_open(number: str) -> bool:
    with contextlib.suppress(OSError):
        os.fstat(int(number))
        return True
    return False


async def test_a_cage_of_a_plugin_in_the_background_is_there_from_its_first_program_on(shared_dir: Path) -> None:
    class Behind(Cage):
        async def start(self, stop: asyncio.Event | None = None) -> bool:
            self._runtime.subtree.behind.add(self.spec.name)
            return await super().start(stop)

    for cage_type, state in ((Cage, "0"), (Behind, "1")):
        async with cage(shared_dir, ["sleep", "300"], cage_type=cage_type) as one:
            leaf = one.cage.leaf
            assert read_file(f"{leaf.v1.get('cpu', leaf.unified)}/{IDLE}").strip() == state


@pytest.mark.skipif(not Attributes.of(0).runtime, reason="the kernel has one slice for all threads (before Linux 6.12)")
async def test_everything_in_a_cage_is_interrupted_by_who_is_woken(shared_dir: Path) -> None:
    async with cage(shared_dir, ["sh", "-c", "sleep 300 & wait"]) as one:
        leaf = one.cage.leaf
        await asyncio.to_thread(wait_for, lambda: len(leaf.processes()) == 3)
        assert {Attributes.of(pid).runtime for pid in leaf.processes()} == {SLICE}


async def test_releasing_twice_is_harmless(shared_dir: Path) -> None:
    async with cage(shared_dir, ["sleep", "300"]) as one:
        await one.cage.release()
        await one.cage.release()
        assert one.cage.started is False


async def test_a_dead_launcher_takes_no_cage_with_it(shared_dir: Path) -> None:
    """The cages are the supervisor's children: it still sees their end, and is told that no new one can start."""
    async with cage(shared_dir, ["sleep", "300"]) as one:
        launcher = one.session.runtime.launcher
        os.kill(launcher.pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            await launcher.closed.wait()
        one.cage.signal(signal.SIGTERM)
        end = await one.cage.wait()
        assert end.signal == signal.SIGTERM
        with pytest.raises(UnavailableError, match="launcher"):
            await launcher.park(-1, -1, layers=frozenset())
    assert not leaves(shared_dir)
