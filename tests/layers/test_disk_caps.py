"""Caps on disk bandwidth, from inside: writing and reading is slowed where a policy says so, and nowhere else."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from isolator.errors import ConfinementError
from isolator.layers.base import Bind, CageSpec
from isolator.layers.cgroup import disk as cgroup_io
from isolator.layers.cgroup import subtree as cgroup_subtree
from isolator.layers.cgroup.subtree import find_hierarchies
from isolator.policy.model import ResourcePolicy
from isolator.recovery.journal import Journal
from isolator.standalone import beginning
from isolator.volume.volume import Volume
from tests.support.cage_fixture import cage, policy

MIB = 1 << 20
RATE = 4 * MIB
AMOUNT = 4 * MIB

pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(
        cgroup_io.check(find_hierarchies()).state == "unavailable", reason="this host has no io controller at all"
    ),
]

WRITE = f"""
import mmap, os, time
page = mmap.mmap(-1, {MIB})
start = time.monotonic()
fd = os.open("/state/file", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
for _ in range({AMOUNT // MIB}):
    os.write(fd, page)
print(time.monotonic() - start)
"""
FSYNC = WRITE.replace(" | os.O_DIRECT", "").replace("os.write(fd, page)", "os.write(fd, page); os.fsync(fd)")
READ = WRITE.replace(
    "print", "start = time.monotonic()\nfor at in range(4): os.preadv(fd, [page], at * 1048576)\nprint"
)


async def _took(root: Path, script: str, limits: ResourcePolicy) -> float:
    """Seconds that a script says it took, with a state folder of its own."""

    def furnish(spec: CageSpec) -> None:
        spec.policy = policy(resources=limits)
        spec.binds = [*spec.binds, Bind("/state", folder, writable=True)]

    with contextlib.closing(Journal(root / "run/state.journal")) as journal:
        state = Volume(root / "state", "capped", journal)
        folder = state.open(size=8 * MIB, inodes=64, uid=74999, gid=74999)
        os.chmod(f"/proc/self/fd/{folder}", 0o777)
        try:
            async with cage(root, ["python3", "-c", script], change=furnish) as one:
                end = await one.cage.wait()
                assert end.returncode == 0, one.text()
                return float(one.text())
        finally:
            os.close(folder)
            state.remove()


async def _fastest(shared_dir: Path, script: str, limits: ResourcePolicy) -> float:
    """Seconds of the fastest try of some: others may use the disk meanwhile."""
    fastest = await _took(shared_dir, script, limits)
    for _ in range(4):
        if fastest < AMOUNT / RATE / 4:
            break
        fastest = min(fastest, await _took(shared_dir, script, limits))
    return fastest


@pytest.mark.parametrize(("script", "cap"), [(WRITE, "io_write"), (FSYNC, "io_write"), (READ, "io_read")])
async def test_a_cap_slows_writing_and_reading(shared_dir: Path, script: str, cap: str) -> None:
    """The kernel keeps the rate from the first byte on, so it takes about a second; without a cap hundredths of one."""
    other = {"io_read": "io_write", "io_write": "io_read"}[cap]
    free = await _fastest(shared_dir, script, ResourcePolicy())
    wrong = await _fastest(shared_dir, script, ResourcePolicy(**{other: RATE}))
    capped = await _took(shared_dir, script, ResourcePolicy(**{cap: RATE}))
    assert capped > AMOUNT / RATE / 2, f"{AMOUNT} bytes in {capped} s"
    assert capped > 2 * free and capped > 2 * wrong, f"{capped} s with a cap, {free} s without, {wrong} s with another"


async def test_reading_the_hosts_files_is_capped(shared_dir: Path) -> None:
    """The disk behind /usr: what is not in memory already is read at the rate."""
    big = max(Path("/usr/lib").glob("*/*.so*"), key=lambda path: path.stat().st_size)
    if cgroup_io.device(big.stat().st_dev) is None:
        pytest.skip("/usr has no block device of its own here")
    script = f"""
import mmap, os, time
fd = os.open({str(big)!r}, os.O_RDONLY | os.O_DIRECT)
page = mmap.mmap(-1, {MIB})
start = time.monotonic()
got = sum(os.preadv(fd, [page], at * {MIB}) for at in range(4))
print(got / (time.monotonic() - start))
"""

    async def rate(limits: ResourcePolicy) -> float:
        def furnish(spec: CageSpec) -> None:
            spec.policy = policy(resources=limits)

        async with cage(shared_dir, ["python3", "-c", script], change=furnish) as one:
            await one.cage.wait()
            return float(one.text())

    free, capped = await rate(ResourcePolicy()), await rate(ResourcePolicy(io_read=MIB))
    assert capped < 2 * MIB and capped < free / 2, f"{capped} bytes a second with a cap, {free} without"


async def test_a_cap_that_cannot_be_kept_stops_the_start(shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is not there (loop devices come when they are named) stands for one that keeps no rate."""
    monkeypatch.setattr(cgroup_io, "devices", lambda places: ["60:7"])
    limits = policy(resources=ResourcePolicy(io_write=RATE))
    with pytest.raises(ConfinementError, match=r"disk bandwidth cap of device 60:7: .*may_degrade"):
        async with cage(shared_dir, ["true"], limits):
            pass
    subtrees = cgroup_subtree.open_subtree

    def permitted(name: str, **_: object) -> cgroup_subtree.Subtree:
        return subtrees(name, optional=frozenset({"io"}))

    monkeypatch.setattr(beginning, "open_subtree", permitted)
    async with cage(shared_dir, ["true"], limits) as one:
        assert (await one.cage.wait()).returncode == 0


async def test_a_missing_cap_is_noticed(shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup_io, "apply", lambda *_: None)
    with pytest.raises(ConfinementError, match="nothing"):
        async with cage(shared_dir, ["true"], policy(resources=ResourcePolicy(io_read=RATE))):
            pass


def test_a_partition_is_capped_by_its_disk() -> None:
    for place in Path("/sys/dev/block").iterdir():
        major, minor = map(int, place.name.split(":"))
        found = cgroup_io.device(os.makedev(major, minor))
        assert found is not None and not Path(f"/sys/dev/block/{found}/partition").exists()
    assert cgroup_io.device(os.stat("/proc").st_dev) is None
