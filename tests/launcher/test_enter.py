"""End of a process's way into its cage: it execs at the supervisor's word alone."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from isolator.launcher.enter import enter_cage
from isolator.layers.plan import Plan


@pytest.mark.parametrize(("word", "runs"), [(b"x", True), (b"n", False), (b"", False)])
def test_cage_that_is_given_up_runs_nothing(tmp_path: Path, word: bytes, runs: bool) -> None:
    """Also one that nobody killed: the supervisor has ended, or has closed the link and not come further."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    status_read, status = os.pipe()
    null = os.open("/dev/null", os.O_RDWR)
    plan = Plan("", ["/usr/bin/touch", str(tmp_path / "ran")], {}, fds={"stdin": null, "stdout": null, "stderr": null})
    child = os.fork()
    if child == 0:
        ours.close()
        enter_cage(plan, theirs, status)
    theirs.close()
    os.close(status)
    os.close(null)
    with ours:
        assert [json.loads(ours.recv(65536))["step"] for _ in range(2)] == ["viewed", "caged"]
        if word:
            ours.send(word)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (0 if runs else 125)
    with os.fdopen(status_read, "rb") as report:
        assert len(report.read()) == (4 if runs else 0)
    assert (tmp_path / "ran").exists() == runs
