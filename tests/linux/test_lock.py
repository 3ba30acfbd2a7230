"""File locks: one holder at a time, also when holders remove the file; nothing but a regular file is locked."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from isolator.linux.lock import lock_file


def test_second_taker_is_refused_until_the_first_lets_go(tmp_path: Path) -> None:
    first = lock_file(tmp_path / "lock")
    assert first is not None
    assert lock_file(tmp_path / "lock") is None
    os.close(first)
    second = lock_file(tmp_path / "lock", create=False)
    assert second is not None
    os.close(second)


def test_waiter_whose_file_was_removed_locks_the_new_file(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = lock_file(path)
    assert first is not None
    found: list[int | None] = []
    waiting = threading.Thread(target=lambda: found.append(lock_file(path, wait=True)))
    waiting.start()
    while not _waiters(path):
        pass
    path.unlink()
    os.close(first)
    waiting.join(10)
    assert found and found[0] is not None
    assert os.path.samestat(os.fstat(found[0]), path.stat()), "the lock of the removed file keeps nobody off"
    os.close(found[0])


def _waiters(path: Path) -> bool:
    """Whether /proc/locks shows somebody who waits (``->``) for the file's lock."""
    return any(
        f":{path.stat().st_ino} " in line and "->" in line for line in Path("/proc/locks").read_text().splitlines()
    )


def test_missing_file_is_an_error_and_a_link_is_not_followed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        lock_file(tmp_path / "missing", create=False)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="Too many levels"):
        lock_file(tmp_path / "link")
    assert not (tmp_path / "target").exists()


def test_pipe_in_the_place_of_a_lock_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        lock_file(tmp_path / "pipe")
