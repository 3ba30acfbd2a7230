"""The end of the terminal that the daemon was started from, and SIGHUP where there is none."""

from __future__ import annotations

import os
import pty
import signal
from typing import cast

import pytest

from tests.support.processes import children
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon, wait_for
from tests.system.reload.faulty import FaultyDaemon


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


def tries(d: Daemon) -> bool:
    """Whether the program of a reload is being tried."""
    assert d.process is not None
    return bool(children(d.process.pid, "--check-handover"))


@pytest.mark.parametrize("refused", [False, True], ids=["that succeeds", "that is refused"])
def test_hangup_during_a_reload_is_followed_by_another(refused: bool) -> None:
    """What was changed since the one under way had read it would wait for somebody to ask again."""
    with daemon() as d:
        assert d.process is not None
        host_toml = d.root / "etc/isolator/host.toml"
        if refused:
            host_toml.parent.mkdir(parents=True, exist_ok=True)
            host_toml.write_text("[roles\n")
        d.process.send_signal(signal.SIGHUP)
        wait_for(lambda: tries(d), what="no trial")
        host_toml.unlink(missing_ok=True)
        d.process.send_signal(signal.SIGHUP)
        reloads = 1 if refused else 2
        wait_for(lambda: [record["type"] for record in d.records()].count("daemon.reloaded") == reloads)
        assert ("not reloaded" in d.log.read_text()) == refused
        assert d.stop() == 0


@pytest.mark.parametrize("word", ["term", "hup"])
def test_signal_that_comes_as_the_daemon_is_at_rest_is_not_lost(word: str) -> None:
    """It was received, and its handler is called in the next turn of the event loop: of another program by then."""
    with daemon(kind=FaultyDaemon) as made:
        d = cast(FaultyDaemon, made)
        assert d.process is not None
        d.at_rest(word)
        d.process.send_signal(signal.SIGHUP)
        if word == "term":
            assert d.process.wait(seconds(60)) == 0
            assert [record["type"] for record in d.records()].count("host.stopped") == 1
        else:
            wait_for(lambda: [record["type"] for record in d.records()].count("daemon.reloaded") == 2)
