"""The ext4 image that holds one plugin's state: made with the granted data area, checked, resized.

A file system keeps part of its size for itself: inode tables, bitmaps, folders of its own, and blocks that the kernel
holds back (2 %, at most 4096). So an image is made with an estimate, its superblock is asked how much is left for data,
and it is made again with the difference (6 ms each). There is no journal: it would take 4 MiB of every image; after a
crash of the host the image is checked before it is mounted.

The image is sparse. That its content was written by a stranger is no danger to the tools here: only the kernel has
written to it.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from isolator.errors import ConfinementError
from isolator.linux.descriptors import owning
from isolator.linux.files import read_plain

TOOLS = "/usr/sbin:/usr/bin:/sbin:/bin"
BLOCK = 4096
_HELD_BACK_SHARE, _HELD_BACK_MOST = 50, 4096  # ext4_calculate_resv_clusters()
_SUPERBLOCK, _MAGIC, _CLEAN = 1024, 0xEF53, 1
_OWN_INODES = 12
"""Inodes that every ext4 has for itself, ``lost+found`` included, and that of ``state``."""
_ATTEMPTS = 4


@dataclass(frozen=True)
class Size:
    """Capacity for the plugin: bytes of data, number of files."""

    size: int
    inodes: int


@dataclass(frozen=True)
class _Superblock:
    """The figures of a file system's superblock."""

    blocks: int
    free: int
    clean: bool

    @property
    def for_data(self) -> int:
        """Blocks that an ordinary user can fill."""
        return self.free - min(self.blocks // _HELD_BACK_SHARE, _HELD_BACK_MOST)


class Ext4Image:
    """The image of one plugin at ``path``; it must not be mounted while anything here is done to it."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self._what = f"state of {name}"
        self._note = path.with_name("size")

    @property
    def granted(self) -> Size | None:
        """The size it was made for; None when that is not known."""
        try:
            found = Size(**json.loads(read_plain(self._note, most=4096)))
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        return found if all(type(number) is int and number > 0 for number in (found.size, found.inodes)) else None

    def make(self, wanted: Size, uid: int, gid: int) -> None:
        """Make it; what an attempt that was cut short has left is replaced."""
        new = self.path.with_suffix(".new")
        goal = _goal(wanted)
        # The kernel's share is of the whole, what holds the inodes comes on top; the rest is found out.
        blocks = goal + goal // (_HELD_BACK_SHARE - 1) + wanted.inodes * 256 // BLOCK + 32
        try:
            for _ in range(_ATTEMPTS):
                self._format(new, blocks, wanted.inodes, uid, gid)
                missing = goal - self._read(new).for_data
                if not missing:
                    break
                blocks += missing
            self._write_note(wanted)
            new.rename(self.path)
        except OSError as error:
            raise self._failed(error.strerror or str(error), "is the disk full?") from None
        finally:
            new.unlink(missing_ok=True)

    def check(self) -> None:
        """Mend what a crash of the host left; raises ConfinementError when that takes a person."""
        if not self._read(self.path).clean:
            self._mend()

    def resize(self, before: Size, wanted: Size) -> None:
        """Make room for more, or for less if what is stored fits. The number of files only follows roughly.

        Raises ConfinementError, and what is stored is as it was, when more is stored than there would be room for.
        """
        self._mend()
        goal = _goal(wanted)
        now = self._read(self.path)
        stored = max(0, _goal(before) - now.for_data)
        problem = "" if stored <= goal else "that is less"
        for attempt in range(_ATTEMPTS):
            missing = goal - stored - now.for_data
            if problem or not missing:
                break
            problem = self._resize_to(now.blocks + missing)
            if problem and attempt:
                problem = ""  # a few blocks from the goal, and what is stored lies in the way
                break
            now = self._read(self.path)
        if problem:
            raise self._failed(
                f"{stored * BLOCK >> 10} KiB are stored, {wanted.size >> 10} KiB are granted now: {problem}",
                "delete files there, or grant more in the policy",
            )
        self._write_note(wanted)

    def _resize_to(self, blocks: int) -> str:
        """Change the file system's size; returns why it cannot be done."""
        if blocks * BLOCK > self.path.stat().st_size:
            os.truncate(self.path, blocks * BLOCK)
        result = _run(["resize2fs", str(self.path), str(blocks)])
        os.truncate(self.path, self._read(self.path).blocks * BLOCK)
        return "" if result.returncode == 0 else _last_line(result.stderr)

    def _mend(self) -> None:
        result = _run(["e2fsck", "-f", "-p", str(self.path)])
        if result.returncode & ~1:  # 1: errors were corrected
            raise self._failed(_last_line(result.stdout + result.stderr), f"look at it with 'e2fsck -f {self.path}'")

    def _format(self, path: Path, blocks: int, inodes: int, uid: int, gid: int) -> None:
        path.unlink(missing_ok=True)
        with owning(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)) as fd:
            os.ftruncate(fd, blocks * BLOCK)
        options = f"root_owner={uid}:{gid},lazy_itable_init=1,nodiscard"
        result = _run([
            "mkfs.ext4", "-q", "-F", "-b", str(BLOCK), "-m", "0", "-N", str(inodes + _OWN_INODES),
            "-O", "^has_journal,^resize_inode", "-E", options, str(path),
        ])  # fmt: skip
        if result.returncode != 0:
            raise self._failed(_last_line(result.stderr), "is the disk full?")

    def _read(self, path: Path) -> _Superblock:
        try:
            with owning(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)) as fd:
                data = os.pread(fd, 1024, _SUPERBLOCK)
        except OSError as error:
            raise self._failed(f"{path}: {error.strerror}", "restore it from a backup") from None
        if len(data) < 1024 or struct.unpack_from("<H", data, 56)[0] != _MAGIC:
            raise self._failed("the image is damaged: it holds no file system", f"restore {path} from a backup")
        (blocks_low,), (free_low,) = struct.unpack_from("<I", data, 4), struct.unpack_from("<I", data, 12)
        (blocks_high,), (free_high,) = struct.unpack_from("<I", data, 0x150), struct.unpack_from("<I", data, 0x158)
        (state,) = struct.unpack_from("<H", data, 58)
        return _Superblock(blocks_high << 32 | blocks_low, free_high << 32 | free_low, state == _CLEAN)

    def _write_note(self, wanted: Size) -> None:
        new = self._note.with_suffix(".new")
        new.write_text(json.dumps(asdict(wanted)))
        new.rename(self._note)

    def _failed(self, why: str, remedy: str) -> ConfinementError:
        return ConfinementError(self._what, why, remedy)


def _goal(size: Size) -> int:
    """Blocks for data: what is granted, and the folder that holds it."""
    return size.size // BLOCK + 1


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, errors="replace",
        env={"PATH": TOOLS, "LC_ALL": "C.UTF-8"},
    )  # fmt: skip


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it failed without saying why"
