"""The end of the terminal that the daemon was started from, and SIGHUP where there is none."""

from __future__ import annotations

import os
import pty
import signal

from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon, wait_for


class OnTerminal(Daemon):
    """A daemon whose standard input is its controlling terminal."""

    def command(self) -> list[str]:
        return ["setsid", "--ctty", *super().command()]


def test_daemon_stops_cleanly_when_its_terminal_is_closed() -> None:
    master, terminal = pty.openpty()
    with daemon(start=False, kind=OnTerminal) as d:
        d.stdin = terminal
        d.start()
        os.close(terminal)
        os.close(master)  # the kernel sends SIGHUP to the session's leader
        assert d.process is not None
        assert d.process.wait(seconds(40)) == 0
        assert "host.stopped" in [record["type"] for record in d.records()[-2:]]  # a seal may follow
        assert d.json("gc", "--dry-run") == []


def test_daemon_without_a_terminal_is_reloaded_by_a_hangup() -> None:
    with daemon() as d:
        assert d.process is not None
        d.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "daemon.reloaded" in [record["type"] for record in d.records()])
        assert d.json("plugin", "list") == []
        assert d.stop() == 0
        assert [record["type"] for record in d.records()].count("host.stopped") == 1
