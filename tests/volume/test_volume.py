"""A plugin's state folder: as large as granted and no larger, resized with the policy, mended after a crash."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import isolator
from isolator.errors import ConfinementError
from isolator.linux import loop
from isolator.paths import Paths
from isolator.recovery.daemon import clear
from isolator.recovery.journal import Journal
from isolator.volume.volume import Volume
from tests.system.daemon import wait_for

MIB = 1 << 20
UID = 65533
NAME = "stateful"


class World:
    """One state below a base folder, and a journal for it."""

    def __init__(self, base: Path, run: Path | None = None) -> None:
        self.base = base / "state"
        self.base.mkdir()
        self.journal = Journal((run or base) / "run/journal")
        self.state = Volume(self.base, NAME, self.journal)
        self.image = self.base / NAME / "image"

    def open(self, size: int, inodes: int = 1024) -> int:
        return self.state.open(size=size, inodes=inodes, uid=UID, gid=UID)

    def ready(self, size: int, inodes: int = 1024) -> Path:
        """Open it and say where it is."""
        os.close(self.open(size, inodes))
        return self.base / NAME / "mnt/state"

    def close(self) -> None:
        self.state.remove()
        self.journal.close()

    def detach(self) -> None:
        """Unmount it, and wait until no process has a copy of the mount: until then the image is in use."""
        self.state.close()
        wait_for(lambda: loop.device_of(self.image) is None)

    def superblock(self, offset: int, value: int) -> None:
        with self.image.open("r+b") as file:
            file.seek(1024 + offset)
            file.write(struct.pack("<H", value))


@pytest.fixture
def world(shared_dir: Path) -> Iterator[World]:
    made = World(shared_dir)
    yield made
    made.close()


def fill(folder: Path, *, limit: int = 1 << 31) -> int:
    """Write as the plugin's user until nothing more fits; how many bytes did."""
    script = (
        "import os, sys\n"
        "os.setgroups([]); os.setresgid(65533, 65533, 65533); os.setresuid(65533, 65533, 65533)\n"
        "done, fd = 0, os.open('full', os.O_WRONLY | os.O_CREAT | os.O_APPEND)\n"
        "try:\n"
        f"    while done < {limit}:\n"
        "        done += os.write(fd, bytes(65536))\n"
        "        os.fsync(fd)\n"
        "except OSError as error:\n"
        "    assert error.errno == 28, error\n"
        "print(done)\n"
    )
    fd = os.open(folder, os.O_RDONLY)
    try:
        # The way to the folder is root's alone, so the child gets there before it becomes the plugin's user.
        ran = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, preexec_fn=lambda: os.fchdir(fd)
        )
    finally:
        os.close(fd)
    return int(ran.stdout)


@pytest.mark.parametrize("size", [1, 2, 4, 16, 64, 200])
def test_what_is_granted_is_what_fits(world: World, size: int) -> None:
    room = fill(world.ready(size * MIB))
    # One write of 64 KiB that does not fit wholly, and what the kernel keeps for the file's own description.
    assert size * MIB * 0.98 - 65536 <= room <= size * MIB, f"{room / MIB:.2f} MiB fit into {size} MiB"


def test_a_large_one_is_sparse(world: World) -> None:
    folder = world.ready(10 << 30, inodes=16384)
    available = os.statvfs(folder).f_bavail * 4096
    assert abs(available - (10 << 30)) < 8192
    assert world.image.stat().st_blocks * 512 < 16 * MIB


def test_the_number_of_files_is_capped(world: World) -> None:
    folder = world.ready(16 * MIB, inodes=64)
    made = 0
    with pytest.raises(OSError, match="No space left") as caught:
        for made in range(1000):
            (folder / f"f{made}").touch()
    assert caught.value.errno == errno.ENOSPC and 48 <= made <= 96


def test_it_grows_with_the_policy_and_keeps_what_is_stored(world: World) -> None:
    (world.ready(4 * MIB) / "kept").write_text("precious")
    for size in (8, 64, 200):
        folder = world.ready(size * MIB)
        assert (folder / "kept").read_text() == "precious"
        available = os.statvfs(folder).f_bavail * 4096
        assert size * MIB * 0.99 - 8192 <= available <= size * MIB
    assert fill(folder) <= 200 * MIB


def test_it_shrinks_when_what_is_stored_fits(world: World) -> None:
    folder = world.ready(64 * MIB)
    fill(folder, limit=6 * MIB)
    before = (folder / "full").read_bytes()
    with pytest.raises(ConfinementError, match=r"6\d\d\d KiB are stored, 4096 KiB are granted now") as caught:
        world.ready(4 * MIB)
    assert "delete files" in str(caught.value)
    folder = world.ready(64 * MIB)
    assert (folder / "full").read_bytes() == before
    folder = world.ready(8 * MIB)
    assert (folder / "full").read_bytes() == before
    assert world.image.stat().st_size < 10 * MIB
    room = fill(folder)
    assert MIB <= room <= 2 * MIB + 65536


def test_it_is_mended_after_a_crash_of_the_host(world: World) -> None:
    folder = world.ready(8 * MIB)
    (folder / "kept").write_text("precious")
    os.sync()
    # What a power cut leaves: the image as it is while it is mounted, with a free count that does not fit.
    torn = world.image.with_name("torn")
    shutil.copyfile(world.image, torn)
    world.state.close()
    torn.rename(world.image)
    assert struct.unpack("<H", world.image.read_bytes()[1024 + 58 : 1024 + 60])[0] & 1 == 0, "not marked as in use"
    debugfs = ["debugfs", "-w", "-R", "ssv free_blocks_count 7", world.image]
    subprocess.run(debugfs, check=True, capture_output=True)
    folder = world.ready(8 * MIB)
    assert (folder / "kept").read_text() == "precious"
    assert os.statvfs(folder).f_bavail * 4096 > 7 * MIB
    world.state.close()
    assert subprocess.run(["e2fsck", "-f", "-n", world.image], capture_output=True, check=False).returncode == 0


def test_what_cannot_be_mended_is_told(world: World) -> None:
    world.ready(4 * MIB)
    world.detach()
    world.superblock(56, 0)
    with pytest.raises(ConfinementError, match="the image is damaged"):
        world.ready(4 * MIB)
    world.image.write_bytes(b"")
    with pytest.raises(ConfinementError, match="the image is damaged"):
        world.ready(4 * MIB)
    assert loop.device_of(world.image) is None


def test_image_that_is_still_held_is_mounted_again_from_its_device(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attached a second time it would be two file systems that write over each other."""
    folder = world.ready(4 * MIB)
    device = loop.device_of(world.image)
    held = os.open(folder, os.O_RDONLY)
    world.state.close()  # lazily: somebody is still in it
    try:
        (world.ready(4 * MIB) / "new").write_text("seen by both")
        assert os.listdir(held) == ["new"] and loop.device_of(world.image) == device
        attached = subprocess.run(["losetup", "-j", world.image], capture_output=True, text=True, check=True)
        assert len(attached.stdout.splitlines()) == 1
        with (
            monkeypatch.context() as hurried,
            pytest.raises(ConfinementError, match="cannot be resized while /dev/loop"),
        ):
            hurried.setattr("isolator.volume.volume._DETACH_SECONDS", 0.2)
            world.ready(8 * MIB)
        world.ready(4 * MIB)
    finally:
        os.close(held)
    assert (world.ready(8 * MIB) / "new").read_text() == "seen by both"
    world.state.close()
    assert subprocess.run(["e2fsck", "-f", "-n", world.image], capture_output=True, check=False).returncode == 0


def queue(device: str) -> tuple[int, ...]:
    """Requests at a time, KiB in each, and KiB that are read ahead."""
    folder = Path("/sys/class/block") / Path(device).name / "queue"
    return tuple(int((folder / name).read_text()) for name in ("nr_requests", "max_sectors_kb", "read_ahead_kb"))


def fresh_queue(folder: Path) -> tuple[int, ...]:
    """The same of a device that nobody has touched."""
    with (folder / "fresh").open("w+b") as file:
        file.truncate(MIB)
        held, device = loop.attach(file.fileno())
        try:
            return queue(device)
        finally:
            os.close(held)


@pytest.mark.parametrize("crashed", [False, True])
def test_a_device_is_narrow_and_past_the_cache_for_as_long_as_it_is_mounted(shared_dir: Path, crashed: bool) -> None:
    """Else a plugin that writes as fast as it can fills the disk's queue, and others' syncs wait behind all of that.

    What it reads ahead fits into its queue: else the reader waits for room there, and reads half as fast.
    """
    paths = Paths.of(shared_dir)
    paths.state.parent.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(contextlib.closing(World(paths.state.parent)))
        world.ready(4 * MIB)
        held = loop.open_device_of(world.image)  # so that nobody else gets it meanwhile
        assert held is not None
        stack.callback(os.close, held[0])
        device = held[1]
        assert (Path("/sys/class/block") / Path(device).name / "loop/dio").read_text().strip() == "1"
        assert queue(device) == (4, 128, 512)
        if crashed:
            clear(paths, world.journal)
        else:
            world.state.close()
        assert not world.state.mounted
        assert queue(device) == fresh_queue(shared_dir)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    place = folder / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_disk_too_full_to_make_it(shared_dir: Path) -> None:
    with small_disk(shared_dir, "32k") as place, contextlib.closing(World(place, shared_dir)) as made:
        with pytest.raises(ConfinementError, match="is the disk full"):
            made.ready(4 * MIB)
        assert not list((made.base / NAME).glob("image*"))


def test_a_disk_that_becomes_full(shared_dir: Path) -> None:
    """The image is sparse: what was granted may not be there. The plugin is told; when there is room, it goes on."""
    with small_disk(shared_dir, "2m") as place, contextlib.closing(World(place, shared_dir)) as made:
        folder = made.ready(8 * MIB)
        (folder / "kept").write_text("precious")
        os.sync()
        assert fill(folder) < 3 * MIB
        made.state.close()
        subprocess.run(["mount", "-o", "remount,size=32m", place], check=True)
        folder = made.ready(8 * MIB)
        assert (folder / "kept").read_text() == "precious"
        (folder / "full").unlink()
        assert fill(folder) > 7 * MIB


def test_no_loop_devices(shared_dir: Path) -> None:
    """In a mount namespace whose /dev has none."""
    script = (
        "import sys; from pathlib import Path\n"
        "from isolator.volume.volume import Volume, check\n"
        "from isolator.recovery.journal import Journal\n"
        "from isolator.errors import ConfinementError\n"
        "base = Path(sys.argv[1]); journal = Journal(base / 'run/journal')\n"
        "print(check().state)\n"
        "try:\n"
        "    Volume(base / 'state', 'one', journal).open(size=1 << 20, inodes=64, uid=65533, gid=65533)\n"
        "except ConfinementError as error:\n"
        "    print(error)\n"
        "journal.close()\n"
    )
    command = (
        f"mount -t tmpfs none /dev && mknod /dev/null c 1 3 && exec '{sys.executable}' -c \"$SCRIPT\" '{shared_dir}'"
    )
    environment = {**os.environ, "SCRIPT": script, "PYTHONPATH": str(Path(isolator.__file__).parents[1])}
    ran = subprocess.run(
        ["unshare", "-m", "sh", "-c", command], capture_output=True, text=True, check=False, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    state, error = ran.stdout.splitlines()
    assert state == "unavailable" and "no loop device" in error and "losetup" in error
