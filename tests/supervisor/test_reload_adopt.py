"""The first steps of the new image of a reload."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from isolator.launcher.client import Launcher
from isolator.linux.child import ended
from isolator.supervisor.reload import adopt
from isolator.supervisor.reload.adoption import Adoption
from tests.support.hanging_file import file_that_does_not_close


def closes_what_comes() -> tuple[int, socket.socket]:
    """A child that closes the descriptor it is sent, and then waits; its pid, and the way to send."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid:
        theirs.close()
        return pid, ours
    try:
        ours.close()
        _, (fd,), _, _ = socket.recv_fds(theirs, 1, 1)
        os.close(fd)
        theirs.recv(1)
    finally:
        os._exit(1)


async def test_child_that_hangs_in_a_file_system_does_not_hold_the_new_image_up(tmp_path: Path) -> None:
    """Such as has read what an operator offered (registration/collecting.py), and cannot be killed meanwhile."""
    (hangs, link), (waits, other) = closes_what_comes(), closes_what_comes()
    with link, other, file_that_does_not_close(tmp_path / "file", hangs) as file:
        socket.send_fds(link, [b"f"], [file.fd])
        file.hangs()
        (left,) = adopt.end([hangs, waits])
        assert left.pid == hangs and left.poll() is None
        assert not Path(f"/proc/{waits}").exists(), "the other one was not reaped"
    await ended(left)
    assert not Path(f"/proc/{hangs}").exists()


async def test_launcher_of_before_ends_without_the_cages_that_it_kept(tmp_path: Path) -> None:
    """Also one that hangs, whom nobody can tell that another keeps them now."""
    (tmp_path / "cgroup.kill").touch()
    group, before = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY), Launcher()
    await before.keep("one", group)
    await before.alive()
    os.close(group)
    adoption = Adoption.__new__(Adoption)
    adoption._kept_by = before
    await adoption.change_launchers(cast(Any, SimpleNamespace(plugins={})), None)
    assert before._process.wait() == -signal.SIGKILL
    assert (tmp_path / "cgroup.kill").read_text() == ""
