"""Descriptors that a running plugin takes of its supervisor: counted by kind, for hundreds of them run at once."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from pathlib import Path

from isolator.layers.cgroup.subtree import find_hierarchies
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon, kill_9, wait_for, write_plugin

EACH = Counter(
    {
        "anon_inode:[pidfd]": 1,
        "pipe:[]": 1,  # pid 1 reports on it
        "/": 1,  # the figures that its /proc shows
        "socket:[]": 1,  # hears of changes of its network's rules
        "anon_inode:seccomp notify": 1,
    }
    | ({} if "memory" in find_hierarchies().v2 else {"anon_inode:[eventfd]": 1})  # out of memory
)
TALKS = """
#!/usr/bin/python3
import sys, time, os, socket
server = socket.socket(socket.AF_UNIX)
server.bind(os.environ["PLUGIN_SOCKET"])
server.listen()
number = 0
while True:
    print("line", number := number + 1, flush=True)
    print("error", number, file=sys.stderr, flush=True)
    time.sleep(0.05)
"""


def held(d: Daemon) -> Counter[str]:
    """The supervisor's descriptors, by kind."""
    assert d.process is not None
    found: Counter[str] = Counter()
    for one in Path(f"/proc/{d.process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # it has been closed
            found[re.sub(r"\d+", "", os.readlink(one))] += 1
    return found


def test_running_plugin_takes_six_descriptors_at_most(tmp_path: Path) -> None:
    assert EACH.total() <= 6
    with daemon() as d:
        for name in ("first", "second", "third"):
            d.cli("plugin", "add", str(write_plugin(tmp_path / name)), "--yes")
        d.cli("plugin", "start", "first")
        for name in ("second", "third"):
            before = wait_for(lambda: at_rest(d))
            d.cli("plugin", "start", name)
            wait_for(lambda before=before: at_rest(d) - before == EACH and not before - held(d), what=f"{held(d)}")


def at_rest(d: Daemon) -> Counter[str]:
    """What the supervisor has open once the next cage is made ahead: nothing yet while it is being made."""
    found = held(d)
    return found if found["anon_inode:[pidfd]"] and found == held(d) else Counter()


def test_output_of_a_running_plugin_is_read_on_by_the_next_host_process(tmp_path: Path) -> None:
    with daemon() as d:
        d.cli("plugin", "add", str(write_plugin(tmp_path / "talks", TALKS.lstrip())), "--yes")
        d.cli("plugin", "start", "talks")

        def last(stream: str) -> int:
            said = d.cli("plugin", "logs", "talks").stdout
            return max(map(int, re.findall(rf"{stream} (\d+)", said)), default=0)

        wait_for(lambda: last("line") and last("error"))
        pid = d.json("plugin", "show", "talks")["pid"]
        host = d.service_pid("host.service")
        kill_9(host)
        wait_for(lambda: d.service_pid("host.service", missing_ok=True) not in (0, host), seconds(60))
        before = wait_for(lambda: d.cli("plugin", "logs", "talks", code=None).returncode == 0 and last("error"))
        wait_for(lambda: last("line") > before and last("error") > before, what="nothing comes of it any more")
        assert d.json("plugin", "show", "talks")["pid"] == pid
