"""The first steps of the new image of a reload."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from isolator.linux.child import ended
from isolator.supervisor.reload import adopt
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
