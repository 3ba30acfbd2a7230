"""The demo from its beginning to its end, as `./dev demo` runs it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from psutil import Process

from isolator.paths import Paths
from tests.examples.conftest import EXAMPLES
from tests.support.timeouts import seconds

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("isolator") is None, reason="needs isolator on PATH: ./dev test"),
]
SCRIPT = EXAMPLES / "demo" / "demo.py"


def traces(root: Path) -> set[str]:
    """What a demo with this root makes on the machine and must take away."""
    instance = Paths.of(root).instance
    found = {user for line in Path("/etc/passwd").read_text().splitlines() if (user := line.split(":")[0])}
    found = {user for user in found if user.endswith(f"-{instance}")} | ({str(root)} if root.exists() else set())
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            found |= {path.read_text()} if str(root) in path.read_text() else set()
    return found


@contextlib.contextmanager
def running_demo() -> Iterator[tuple[subprocess.Popen[str], list[str], Path]]:
    """A demo in whose middle the daemon and a cage run: its process, its lines so far, and its root."""
    command = [sys.executable, "-I", str(SCRIPT)]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert demo.stdout is not None
        before = []
        for line in demo.stdout:
            before.append(line)
            if "What arrived" in line:
                break
        children = [argument for child in Process(demo.pid).children(recursive=True) for argument in child.cmdline()]
        roots = {Path(argument) for argument in children if argument.startswith("/var/lib/isolator-demo-")}
        (root,) = {Path(*path.parts[:4]) for path in roots}
        yield demo, before, root
    finally:
        demo.kill()
        demo.wait()


@pytest.mark.vm
def test_every_promise_holds_and_nothing_is_left() -> None:
    with running_demo() as (demo, before, root):
        assert len(traces(root)) >= 5
        rest, errors = demo.communicate(timeout=seconds(120))
    out = "".join(before) + rest
    assert demo.returncode == 0, out + errors
    lines = out.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert "\x1b" not in out
    assert len(lines) < 340
    held = re.search(r"^(\d+) of (\d+) promises held\.$", out, re.M)
    assert held is not None
    assert held[1] == held[2]
    assert errors == ""
    assert not traces(root)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.wide)])
def test_an_interrupted_demo_cleans_up_and_fails(number: signal.Signals) -> None:
    with running_demo() as (demo, _, root):
        os.kill(demo.pid, number)
        rest, errors = demo.communicate(timeout=seconds(120))
    assert demo.returncode == 1, rest + errors
    assert re.search(r"Nothing is left behind +yes", rest), rest
    assert "demo: interrupted" in errors
    assert "Traceback" not in errors
    assert not traces(root)
