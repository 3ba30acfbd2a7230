"""The demo from its beginning to its end, as `./dev demo` runs it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.conftest import EXAMPLES
from tests.support.timeouts import seconds

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("isolator") is None, reason="needs isolator on PATH: ./dev test"),
]
SCRIPT = EXAMPLES / "demo" / "demo.py"


def traces() -> set[str]:
    """What a demo makes on the machine and must take away; other daemons may come and go meanwhile."""
    users = {line.split(":")[0] for line in Path("/etc/passwd").read_text().splitlines()}
    found = {user for user in users if user.startswith(("plugin-hostile-", "plugin-slack-deploy-noti"))}
    found |= {str(path) for path in Path("/var/lib").glob("isolator-demo-*")}
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            found |= {path.read_text()} if "isolator-demo" in path.read_text() else set()
    return found


@pytest.mark.vm
def test_every_promise_holds_and_nothing_is_left() -> None:
    before = traces()
    command = [sys.executable, "-I", str(SCRIPT)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=seconds(120), check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert "\x1b" not in run.stdout
    assert len(lines) < 340
    held = re.search(r"^(\d+) of (\d+) promises held\.$", run.stdout, re.M)
    assert held is not None
    assert held[1] == held[2]
    assert run.stderr == ""
    assert traces() <= before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_cleans_up_and_fails(number: signal.Signals) -> None:
    before = traces()
    demo = subprocess.Popen(
        [sys.executable, "-I", str(SCRIPT)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "What arrived" in line:  # the daemon and a cage are running
                break
        os.kill(demo.pid, number)
        rest, errors = demo.communicate(timeout=120)
    finally:
        demo.kill()
        demo.wait()
    assert demo.returncode == 1, rest + errors
    assert re.search(r"Nothing is left behind +yes", rest), rest
    assert "demo: interrupted" in errors
    assert "Traceback" not in errors
    assert traces() <= before
