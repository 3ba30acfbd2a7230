"""What belongs to a cage is reached through its first process, and only as long as that is the one it was."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolator.supervisor import reach


@pytest.fixture
def process() -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
    """A process that holds the reading end of a pipe, with the writing end and the pipe's inode."""
    reading, writing = os.pipe()
    held = subprocess.Popen(["sleep", "600"], pass_fds=[reading])
    inode = os.fstat(reading).st_ino
    os.close(reading)
    yield held, writing, inode
    held.kill()
    held.wait()
    os.close(writing)


def test_pipe_is_read_on_from_where_the_one_before_stopped(process: tuple[subprocess.Popen[bytes], int, int]) -> None:
    held, writing, inode = process
    for _ in range(2):
        os.write(writing, b"line")
        pipe = reach.open_pipe(held.pid, inode)
        assert os.read(pipe, 100) == b"line" and not os.get_blocking(pipe)
        os.close(pipe)


def test_pipe_of_a_cage_that_has_ended_is_at_its_end(process: tuple[subprocess.Popen[bytes], int, int]) -> None:
    held, writing, inode = process
    os.write(writing, b"line")
    held.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, held.pid, os.WEXITED | os.WNOWAIT)  # a zombie, as pid 1 is until it is reaped
    pipe = reach.open_pipe(held.pid, inode)
    assert os.read(pipe, 100) == b""
    os.close(pipe)


def test_pipe_of_another_process_with_the_pid_is_not_read(process: tuple[subprocess.Popen[bytes], int, int]) -> None:
    held, writing, inode = process
    os.write(writing, b"line")
    assert reach.find_pipe(held.pid, inode) and not reach.find_pipe(held.pid, inode + 1)
    pipe = reach.open_pipe(held.pid, inode + 1)
    assert os.read(pipe, 100) == b""
    os.close(pipe)


def test_folder_of_a_socket_is_found_in_the_root_of_the_process_alone(tmp_path: Path) -> None:
    folder = tmp_path / reach.SOCKET_FOLDER.lstrip("/")
    folder.mkdir(parents=True)
    known = reach.identity(folder.stat())
    pid = os.fork()
    if not pid:
        os.chroot(tmp_path)
        signal.pause()
    try:
        while os.readlink(f"/proc/{pid}/root") == "/":
            os.sched_yield()
        found = reach.open_folder(pid, known)
        assert reach.identity(os.fstat(found)) == known
        os.close(found)
        folder.rename(tmp_path / "aside")
        folder.mkdir()
        with pytest.raises(FileNotFoundError, match="has ended"):
            reach.open_folder(pid, known)
        folder.rmdir()
        folder.symlink_to("/aside")
        with pytest.raises(OSError, match="symbolic links"):
            reach.open_folder(pid, known)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(FileNotFoundError):
        reach.open_folder(pid, known)
    os.waitpid(pid, 0)


def test_folder_in_the_place_of_one_that_is_gone_stays_empty() -> None:
    folder = reach.empty_folder()
    try:
        assert not os.listdir(f"/proc/self/fd/{folder}")
        with pytest.raises(OSError, match="No space left"):
            os.mkdir("one", dir_fd=folder)
    finally:
        os.close(folder)
