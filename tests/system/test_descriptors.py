"""Descriptors that a running plugin takes of its supervisor: counted by kind, for hundreds of them run at once."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from isolator.layers.cgroup.subtree import find_hierarchies
from tests.support.processes import children
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


def cage_is_made_ahead(d: Daemon, running: int) -> bool:
    """Whether the next cage's process is there: it, the launcher, and pid 1 of each cage have the same command line."""
    assert d.process is not None
    return len(children(d.process.pid, "isolator.launcher.server")) == running + 2


def taken_by_a_start(d: Daemon) -> Counter[str]:
    """Descriptors that come with a start beside another plugin; others, too, if the next cage is still being made."""
    d.cli("plugin", "stop", "second")
    wait_for(lambda: cage_is_made_ahead(d, 1))
    before = held(d)
    d.cli("plugin", "start", "second")
    wait_for(lambda: cage_is_made_ahead(d, 2))
    return held(d) - before


def test_running_plugin_takes_six_descriptors_at_most(tmp_path: Path) -> None:
    assert EACH.total() <= 6
    with daemon() as d:
        for name in ("first", "second"):
            d.cli("plugin", "add", str(write_plugin(tmp_path / name)), "--yes")
            d.cli("plugin", "start", name)
        wait_for(lambda: taken_by_a_start(d) == EACH, seconds(90), "never six")
        # Neither a reload that is refused leaves one open that it would have handed over, nor one that is not.
        settings, before = d.root / "etc/isolator/host.toml", held(d)
        text = settings.read_text() if settings.exists() else ""
        settings.write_text("nonsense = 1\n")
        assert d.cli("reload", code=None).returncode
        wait_for(lambda: held(d) == before, what=lambda: f"{before}, then {held(d)}")
        settings.write_text(text)
        d.cli("reload")
        wait_for(lambda: not held(d) - before, what=lambda: f"{before}, then {held(d)}")


class Earlier(Daemon):
    """A daemon whose cages, until there is a file ``present``, are as those of a version whose pid 1 kept no pipe."""

    def command(self) -> list[str]:
        return [sys.executable, "-I", __file__, str(self.root)]

    def become_present(self) -> None:
        """Go on with the present version."""
        (self.root / "present").touch()
        self.cli("reload")
        wait_for(lambda: all(one["up"] for one in self.json("status")["services"]))


@pytest.mark.parametrize("kind", [Daemon, Earlier])
def test_output_of_a_running_plugin_is_read_on_by_the_next_host_process(tmp_path: Path, kind: type[Daemon]) -> None:
    with daemon(kind=kind) as d:
        d.cli("plugin", "add", str(write_plugin(tmp_path / "talks", TALKS.lstrip())), "--yes")
        d.cli("plugin", "start", "talks")

        def last(stream: str) -> int:
            said = d.cli("plugin", "logs", "talks").stdout
            return max(map(int, re.findall(rf"{stream} (\d+)", said)), default=0)

        wait_for(lambda: last("line") and last("error"))
        pid = d.json("plugin", "show", "talks")["pid"]
        if isinstance(d, Earlier):
            d.become_present()
        host = d.service_pid("host.service")
        kill_9(host)
        wait_for(lambda: d.service_pid("host.service", missing_ok=True) not in (0, host), seconds(60))
        before = wait_for(lambda: d.cli("plugin", "logs", "talks", code=None).returncode == 0 and last("error"))
        wait_for(lambda: last("line") > before and last("error") > before, what="nothing comes of it any more")
        assert d.json("plugin", "show", "talks")["pid"] == pid


def _serve(root: Path) -> None:
    from host.cli.main import main
    from isolator.cage import cage
    from isolator.supervisor.run import Run

    if not (root / "present").exists():
        cage.LOGS = ()  # type: ignore[assignment]
        Run.release_start = lambda _: None  # type: ignore[method-assign]
    sys.argv = ["isolator", "--root", str(root), "serve", *sys.argv[2:]]
    sys.exit(main())


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
