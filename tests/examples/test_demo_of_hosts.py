"""The demo with three hosts, as `./dev demo --hosts 3` runs it: from its beginning to its end, and interrupted."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from psutil import Process

from tests.examples.test_whole_demo import running_demo, traces
from tests.support.timeouts import seconds

pytestmark = [
    pytest.mark.slow,
    pytest.mark.wide,
    pytest.mark.timeout(seconds(600)),
    pytest.mark.skipif(shutil.which("isolator") is None, reason="needs isolator on PATH: ./dev test"),
]
NAMES = ("h1", "h2", "h3")


def left(root: Path, servers: set[int]) -> set[str]:
    """What a demo has left of its three hosts, and of its servers."""
    found = traces(root).union(*(traces(root / name) for name in NAMES))
    return found | {f"process {pid}" for pid in servers if Path(f"/proc/{pid}").exists()}


def servers_of(demo: int) -> set[int]:
    """The processes of a demo that are servers of NATS."""
    return {one.pid for one in Process(demo).children(recursive=True) if "nats-server" in " ".join(one.cmdline())}


def test_every_promise_of_three_hosts_holds_and_nothing_is_left() -> None:
    with running_demo("--hosts", "3", until="which one of them holds") as (demo, before, root):
        servers = servers_of(demo.pid)
        assert len(servers) == 3
        rest, errors = demo.communicate(timeout=seconds(500))
    out = "".join(before) + rest
    assert demo.returncode == 0, out + errors
    assert [line for line in out.splitlines() if len(line) > 80] == []
    held = re.search(r"^(\d+) of (\d+) promises held\.$", out, re.M)
    assert held is not None and held[1] == held[2] and int(held[1]) >= 16
    assert errors == ""
    assert not left(root, servers)


@pytest.mark.parametrize("until", ["which one of them holds", "is cut off =="])
def test_interrupted_demo_of_three_hosts_cleans_up_and_fails(until: str) -> None:
    with running_demo("--hosts", "3", until=until) as (demo, _, root):
        servers = servers_of(demo.pid)
        os.kill(demo.pid, signal.SIGINT)
        rest, errors = demo.communicate(timeout=seconds(240))
    assert demo.returncode == 1, rest + errors
    assert re.search(r"Nothing is left behind +yes", rest), rest
    assert "demo: interrupted" in errors
    assert "Traceback" not in errors
    assert not left(root, servers)
