"""Whoever changes a running cage, by whatever way, is noticed at the next look; nothing else is taken for a change."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest

from isolator.cage.cage import Cage
from isolator.errors import ConfinementError
from isolator.layers.base import Process
from isolator.layers.cgroup.layer import Cgroup
from isolator.layers.network.layer import Network
from isolator.layers.proc import drift, layer
from isolator.linux import aio, mount_watch
from isolator.linux.mount_watch import MountWatch
from isolator.policy.model import ResourcePolicy
from tests.support.cage_fixture import StartedCage, cage, policy
from tests.support.descriptors import none_free
from tests.support.disks import ext4_image
from tests.support.timeouts import seconds

T = TypeVar("T")
MEMORY = 200 << 20
HOSTS = "/proc/interrupts of the host is there"
OTHER = "/proc/ has other mounts than it was made with"
MOUNTS = {
    "a cover is taken away": (["umount", "/proc/interrupts"], HOSTS),
    "another is mounted over a cover": (["mount", "--bind", "/proc/cpuinfo", "/proc/devices"], OTHER),
    "a cover is moved": (["mount", "--move", "/proc/interrupts", "/proc/consoles"], HOSTS),
    "a cover can be written": (["mount", "-o", "remount,bind,rw", "/proc/meminfo"], OTHER),
    "another /proc is mounted over it": (["mount", "-t", "proc", "proc", "/proc"], "/proc/"),
}
IN_A_NAMESPACE = """
echo $$ > "$1/cgroup.procs"
exec unshare --cgroup --mount sh -c 'mount -t cgroup -o memory none /mnt && echo 104857600 > "/mnt/$0"' "$2"
"""


async def _with_cage(root: Path, look: Callable[[StartedCage], Coroutine[None, None, T]]) -> T:
    effective = policy(resources=ResourcePolicy(memory=MEMORY, memory_high=MEMORY))
    async with cage(root, ["sleep", "60"], effective) as started:
        return await look(started)


async def _enter(started: StartedCage, *command: str) -> None:
    """Run a command as root of the host in the cage's mount namespace: nobody in the cage could."""
    enter = ["nsenter", "--mount", "--pid", "--target", str(started.cage.pid)]
    await asyncio.to_thread(subprocess.run, [*enter, *command], check=False, capture_output=True)


async def _until_changed(started: StartedCage) -> str:
    async with asyncio.timeout(seconds(20)):
        while not (found := started.cage.detect_drift()):  # noqa: ASYNC110 # the kernel's event is under way
            await asyncio.sleep(0.01)
    return found


@pytest.mark.parametrize("change", MOUNTS)
@pytest.mark.parametrize("events", [True, False], ids=["events", "no events"])
def test_change_of_the_mounts_in_its_proc_is_noticed(
    shared_dir: Path, change: str, events: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, wanted = MOUNTS[change]
    if not events:
        monkeypatch.setattr(aio, "_NUMBERS", {})

    async def look(started: StartedCage) -> list[str]:
        before = [started.cage.detect_drift() for _ in range(3)]
        await _enter(started, *command)
        return [*before, await _until_changed(started)]

    *before, found = asyncio.run(_with_cage(shared_dir, look))
    assert before == ["", "", ""]
    assert found.startswith(wanted)


def test_change_that_could_not_be_looked_at_is_noticed_at_the_next_look(
    shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells of it once."""

    async def look(started: StartedCage) -> list[str]:
        def short(process: Process) -> frozenset[str]:
            with none_free():
                return layer.names_in(process)

        before = started.cage.detect_drift()
        await _enter(started, "mount", "--bind", "/proc/cpuinfo", "/proc/devices")
        with monkeypatch.context() as meanwhile:
            meanwhile.setattr(drift, "names_in", short)
            with pytest.raises(OSError, match="Too many open files"):
                await _until_changed(started)
        return [before, await _until_changed(started)]

    assert asyncio.run(_with_cage(shared_dir, look)) == ["", OTHER]


def test_mounts_elsewhere_in_the_cage_are_no_change_of_its_proc(shared_dir: Path) -> None:
    async def look(started: StartedCage) -> list[str]:
        before = started.cage.detect_drift()
        await _enter(started, "mount", "-t", "tmpfs", "none", "/tmp")
        await _enter(started, "umount", "/tmp")
        looks = [started.cage.detect_drift() for _ in range(2)]
        await _enter(started, "umount", "/proc/interrupts")
        return [before, *looks, await _until_changed(started)]

    assert asyncio.run(_with_cage(shared_dir, look)) == ["", "", "", HOSTS]


def test_entry_of_proc_that_appears_later_is_noticed(shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a module is loaded: here one that is shown is taken for it."""

    async def look(started: StartedCage) -> list[str]:
        before = [started.cage.detect_drift() for _ in range(2)]
        monkeypatch.setattr(layer, "SHOWN", layer.SHOWN - {"version"})
        return [*before, await _until_changed(started)]

    assert asyncio.run(_with_cage(shared_dir, look)) == ["", "", "/proc/version of the host is there"]


def test_change_of_each_limit_is_noticed_and_its_mending_too(shared_dir: Path) -> None:
    """Each file that the cage's groups are limited by, one after the other."""

    async def look(started: StartedCage) -> dict[str, list[str]]:
        found = {}
        for name, right in started.cage._cgroup._caps.items():
            file = Path(name)
            wrong = "4096 10000" if file.name == "cpu.max" else str(int(right) // 2) if right.isdigit() else "1"
            if not file.exists() or right == "0" or file.name == "memory.high":
                continue
            looks = [started.cage.detect_drift()]
            try:
                file.write_text(wrong)
            except OSError:
                continue  # the kernel refuses it in this order
            looks.append(started.cage.detect_drift())
            looks.append(started.cage.detect_drift())
            file.write_text(right)
            found[file.name] = [*looks, started.cage.detect_drift()]
        return found

    found = asyncio.run(_with_cage(shared_dir, look))
    assert "pids.max" in found and len(found) >= 3 and {"cpu.max", "cpu.cfs_quota_us"} & found.keys()
    optional = {"memory.swappiness", "memory.kmem.tcp.limit_in_bytes", "memory.memsw.limit_in_bytes"}
    for name, (before, changed, again, mended) in found.items():
        assert before == mended == "", name
        assert (name in changed and name in again) or name in optional, name


def test_limit_of_a_cage_that_was_taken_over_is_compared(shared_dir: Path) -> None:
    """Also that of the processor, which the cage is not born with."""

    async def look(started: StartedCage) -> list[str]:
        cgroup, process = Cgroup(started.session.runtime.subtree), Process(started.cage.pid)
        cgroup.adopt(started.cage.spec, started.cage._cgroup.hand_over())
        cgroup.confirm(process)
        cgroup.confirm_again(process)
        noticed = []
        for name, right in cgroup.leaf.cpu_values(started.cage.spec.policy.resources).items():  # type: ignore[union-attr]
            file = Path(name)
            file.write_text("4096 10000" if file.name == "cpu.max" else str(int(right) // 2))
            for look in (cgroup.confirm, cgroup.confirm_again):
                with pytest.raises(ConfinementError, match=file.name):
                    look(process)
            file.write_text(right)
            cgroup.confirm_again(process)
            noticed.append(file.name)
        return noticed

    assert asyncio.run(_with_cage(shared_dir, look))


SIZE = [("memory.max", "5000", "4096", True), ("memory.max", "5000", "0", False), ("memory.max", "8192", "4096", False)]
SWITCH = [("memory.oom.group", "1", "0", False), ("pids.max", "65", "64", False), ("cpu.weight", "100", "99", False)]


@pytest.mark.parametrize(("name", "wanted", "found", "equal"), [*SIZE, *SWITCH])
def test_value_is_another_unless_the_kernel_has_rounded_a_size_to_whole_pages(
    tmp_path: Path, name: str, wanted: str, found: str, equal: bool
) -> None:
    file = tmp_path / name
    file.write_text(f"{found}\n")
    with contextlib.nullcontext() if equal else pytest.raises(ConfinementError, match=name):
        Cgroup(cast(Any, None))._confirm_all({str(file): wanted}, {})


async def test_cage_that_is_being_made_or_ends_has_not_been_changed(shared_dir: Path) -> None:
    """What is read of it then is not yet, or no longer, what it was made with."""
    looks: list[str] = []

    class Looked(Cage):
        def _confirm_early(self, moment: str) -> None:
            looks.append(self.detect_drift())
            super()._confirm_early(moment)

    for _ in range(10):
        async with cage(shared_dir, ["sleep", "60"], cage_type=Looked) as started:
            looks.append(started.cage.detect_drift())
            os.kill(started.cage.pid, signal.SIGKILL)
            select.select([started.cage.processes.pidfd], [], [])  # the event loop has not heard of it
            looks.append(started.cage.detect_drift())
    assert looks == [""] * 40


async def test_cage_that_is_looked_at_as_it_is_removed_is_watched_no_longer(
    shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cage(shared_dir, ["sleep", "60"]) as started:
        assert not started.cage.detect_drift()
        watch, release = started.session.runtime.proc_watch.mounts, Network.release
        assert watch._requests

        def look(network: Network) -> None:
            assert not started.cage.detect_drift()
            release(network)

        monkeypatch.setattr(Network, "release", look)
        await started.cage.release()
        assert not watch._requests


def test_limit_that_is_changed_by_way_of_another_cgroup_namespace_is_noticed(shared_dir: Path) -> None:
    """Its mount is another file system, of whose files nobody here hears."""

    async def look(started: StartedCage) -> list[str]:
        memory = started.cage.leaf.v1.get("memory")
        if memory is None:
            pytest.skip("cgroup v2: a group above the cage's has no process, so no namespace begins there")
        before = [started.cage.detect_drift() for _ in range(2)]
        change = ["sh", "-c", IN_A_NAMESPACE, "sh", str(memory.parent), f"{memory.name}/memory.limit_in_bytes"]
        await asyncio.to_thread(subprocess.run, change, check=True)
        return [*before, started.cage.detect_drift()]

    *before, found = asyncio.run(_with_cage(shared_dir, look))
    assert before == ["", ""]
    assert "memory.limit_in_bytes is 104857600" in found


def test_score_by_which_the_kernel_chooses_whom_to_kill_is_compared(shared_dir: Path) -> None:
    async def look(started: StartedCage) -> list[str]:
        before = started.cage.detect_drift()
        Path(f"/proc/{started.cage.pid}/oom_score_adj").write_text("900")
        return [before, started.cage.detect_drift(), started.cage.detect_drift()]

    before, *after = asyncio.run(_with_cage(shared_dir, look))
    assert before == ""
    assert all("oom_score_adj is 900" in one for one in after)


def _mounted(image: str, work: Path) -> subprocess.Popen[bytes]:
    """A process in a mount namespace of its own, in which the image is mounted and nothing else.

    What is mounted elsewhere, too, goes from there when its folder is removed, and that is a change.
    """
    script = (
        "import os, signal, subprocess, sys; from isolator.linux import mount, namespaces\n"
        "namespaces.unshare(namespaces.CLONE_NEWNS); mount.set_propagation('/', mount.MS_PRIVATE)\n"
        "subprocess.run(['mount', '-o', 'loop', *sys.argv[1:]], check=True); os.chdir(sys.argv[2])\n"
        "mount.pivot_root(); print(flush=True); signal.pause()"
    )
    process = subprocess.Popen([sys.executable, "-I", "-c", script, image, str(work)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"\n"
    return process


def _is_in_use(image: str) -> bool:
    return bool(subprocess.run(["losetup", "-j", image], check=True, capture_output=True).stdout)


def test_watch_keeps_a_namespace_until_it_ends_and_no_longer(tmp_path: Path) -> None:
    """And with it what is mounted there: the file system, and the device that it is on."""
    watch = MountWatch()
    with ext4_image(1 << 20) as image, contextlib.closing(watch):
        process = _mounted(image, tmp_path)
        files = len(os.listdir("/proc/self/fd"))
        number = watch.begin(process.pid)
        assert number and watch.unchanged(number)
        assert len(os.listdir("/proc/self/fd")) == files, "it takes a descriptor"
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
        assert _is_in_use(image)
        watch.end(number)
        assert not watch.unchanged(number)
        asyncio.run(_until(lambda: not _is_in_use(image)))


async def _until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(seconds(20)):
        while not true():  # noqa: ASYNC110 # the kernel does it in a worker
            await asyncio.sleep(0.01)


@contextlib.contextmanager
def _in_namespaces(number: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes in mount namespaces of their own, each of which waits for a line and then mounts something."""
    command = ["unshare", "--mount", "sh", "-c", "echo; read _; mount -t tmpfs none /mnt; echo; exec sleep 60"]
    with contextlib.ExitStack() as stack:
        processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(number)]
        for process in processes:
            stack.callback(process.communicate)
            stack.callback(process.kill)
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == b"\n"
        yield processes


def test_watch_has_no_bound_and_what_ends_gives_its_room_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mount_watch, "_ROOM", 1)
    with contextlib.closing(MountWatch()) as watch, _in_namespaces(1) as (process,):
        numbers = [watch.begin(process.pid) for _ in range(300)]
        assert all(map(watch.unchanged, numbers))
        contexts = len(watch._contexts)
        assert contexts > 1, "one had room for all"
        for _ in range(10):
            for number in numbers[::2]:
                watch.end(number)
            numbers[::2] = [watch.begin(process.pid) for _ in numbers[::2]]
        assert all(map(watch.unchanged, numbers))
        # The kernel keeps some room that is given back for the processor on which it was (AIO's reqs_available).
        assert len(watch._contexts) <= 2 * contexts, "what has ended still takes room"


def test_change_of_one_namespace_among_many_is_heard_of_by_its_own_number_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mount_watch, "_ROOM", 1)
    with contextlib.closing(MountWatch()) as watch, _in_namespaces(3) as processes:
        others = [watch.begin(processes[0].pid) for _ in range(100)]
        numbers = [watch.begin(process.pid) for process in processes]
        for number in others[::3]:
            watch.end(number)
        assert all(map(watch.unchanged, numbers))
        second = processes[1]
        assert second.stdin is not None and second.stdout is not None
        second.stdin.write(b"\n")
        second.stdin.flush()
        assert second.stdout.readline() == b"\n"
        asyncio.run(_until(lambda: not watch.unchanged(numbers[1])))
        assert [watch.unchanged(number) for number in numbers] == [True, False, True]
        again = watch.begin(second.pid)
        assert again and watch.unchanged(again)
        assert all(watch.unchanged(number) == (at % 3 != 0) for at, number in enumerate(others))


def test_without_the_kernels_help_nothing_is_called_unchanged_and_it_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with contextlib.closing(MountWatch()) as watch, _in_namespaces(1) as (process,):
        with monkeypatch.context() as without:
            without.setattr(aio, "_NUMBERS", {})
            assert watch.begin(process.pid) == 0 and not watch.unchanged(0)
        number = watch.begin(process.pid)  # as once another program has given some of fs.aio-max-nr back
        assert number and watch.unchanged(number)
