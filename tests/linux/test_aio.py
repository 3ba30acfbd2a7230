"""Syncs of a file by the kernel's own workers."""

from __future__ import annotations

import ctypes
import errno
import os
import select
from pathlib import Path

import pytest

from isolator.linux._libc import libc
from isolator.linux.aio import FileSync

CACHESTAT = 451


def _end(sync: FileSync) -> OSError | None:
    assert select.select([sync.fileno()], [], [], 30)[0], "its end is never told"
    return sync.end()


def _changed_pages(fd: int) -> int:
    """Pages of a file that wait to be written and are not being written (cachestat(2), Linux 6.5)."""
    whole, found = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
    words = (ctypes.c_long(CACHESTAT), ctypes.c_long(fd), whole, found, ctypes.c_long(0))
    if libc.syscall(*words) != 0:
        pytest.skip(f"no cachestat: {os.strerror(ctypes.get_errno())}")
    return found[1]


def test_a_sync_tells_its_end_and_another_can_begin(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    sync = FileSync(fd)
    for _ in range(3):
        os.write(fd, b"x" * 8192)
        sync.begin()
        assert _end(sync) is None
    assert not select.select([sync.fileno()], [], [], 0)[0]
    sync.close()
    os.close(fd)


def test_what_cannot_be_synced_is_an_error_of_begin_or_of_the_sync() -> None:
    reader, writer = os.pipe()
    sync = FileSync(writer)
    with pytest.raises(OSError) as refused:
        sync.begin()
        error = _end(sync)
        if error is not None:
            raise error
    assert refused.value.errno == errno.EINVAL
    sync.close()
    os.close(reader)
    os.close(writer)


def test_write_that_goes_ahead_leaves_no_page_to_be_written_and_the_sync_tells_its_end(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    sync = FileSync(fd)
    os.write(fd, b"x" * 8192)
    if not _changed_pages(fd):
        pytest.skip("this file system writes nothing to a disk, or at once")
    sync.write_out()
    assert not _changed_pages(fd)
    sync.begin()
    assert _end(sync) is None
    sync.close()
    os.close(fd)


def test_write_that_cannot_go_ahead_is_no_error() -> None:
    reader, writer = os.pipe()
    sync = FileSync(writer)
    sync.write_out()
    sync.close()
    os.close(reader)
    os.close(writer)
