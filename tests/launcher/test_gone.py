"""A launcher whose supervisor goes away in the middle of something kills the cages that it keeps all the same."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from isolator.ipc.packet import receive_packet, send_packet
from isolator.launcher.client import _start
from tests.support.timeouts import seconds


@pytest.mark.parametrize("last", [b'{"alive": true}', b'{"park": {}}'], ids=["question", "order"])
def test_launcher_that_has_an_answer_for_nobody_kills_its_cages(tmp_path: Path, last: bytes) -> None:
    process, sock = _start()
    assert isinstance(process, subprocess.Popen)
    try:
        assert receive_packet(sock)[0] == b'{"ready": true}'
        process.send_signal(signal.SIGSTOP)
        (tmp_path / "cgroup.kill").touch()
        group = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
        send_packet(sock, b'{"keep": "one"}', [group])
        os.close(group)
        send_packet(sock, last)  # an order without descriptors is refused
        sock.close()
        process.send_signal(signal.SIGCONT)
        process.wait(seconds(20))
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "cgroup.kill").read_text() == "1"
