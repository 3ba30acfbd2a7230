"""Syncs of a file by the kernel's own workers."""

from __future__ import annotations

import errno
import os
import select
from pathlib import Path

import pytest

from isolator.linux.aio import FileSync


def _end(sync: FileSync) -> OSError | None:
    assert select.select([sync.fileno()], [], [], 30)[0], "its end is never told"
    return sync.end()


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
