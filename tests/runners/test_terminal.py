"""``isolator run --tty`` of users without privilege: a terminal of the daemon's making, and nothing of theirs in it."""

from __future__ import annotations

import os

from tests.runners.conftest import ALICE, run_as, words
from tests.support.terminal import terminal
from tests.system.taken_over import TakenOver


def test_shell_has_job_control_on_a_terminal_of_its_own(daemon: TakenOver) -> None:
    flags = ["--tty", "--env", "PS1=% ", "--", "bash", "--norc", "--noprofile"]
    with terminal(words(daemon.root, ALICE, "run", *flags)) as one:
        one.resize(33, 99)
        one.shows("% ")
        one.press("tty; stty size\r")
        assert "/dev/pts/0" in one.shows("33 99")
        one.press("sh -c 'echo be''gun; exec sleep 1000'\r")  # the echo of these keys has not the word
        one.shows("begun")
        one.press("\x1a")
        one.shows("Stopped")
        one.press("exit 7\r")
        one.shows("stopped jobs")
        one.press("exit 7\r")
        assert one.end() == 7


def test_all_output_arrives_before_the_end(daemon: TakenOver) -> None:
    result = run_as(daemon, ALICE, "--tty", "--", "sh", "-c", "seq 20000; exit 3", input="")
    assert result.returncode == 3
    assert result.stdout.split() == [str(number) for number in range(1, 20001)]


def test_terminal_of_the_caller_is_not_in_the_cage(daemon: TakenOver) -> None:
    script = "ls /dev/pts; ls -l /proc/self/fd | grep -c pts/0; exec 3</dev/tty"
    with terminal(words(daemon.root, ALICE, "run", "--tty", "--", "sh", "-c", script)) as one:
        assert one.shows("/dev/tty").split()[:2] == ["0", "ptmx"]
        assert one.end() != 0


def test_cage_ends_when_the_terminals_reader_is_killed(daemon: TakenOver) -> None:
    with terminal(words(daemon.root, ALICE, "run", "--tty", "--", "sh", "-c", "echo up; sleep 1000")) as one:
        one.shows("up")
        os.kill(one.process.pid, 9)
        one.process.wait()
    ended = run_as(daemon, ALICE, "--", "true")
    assert ended.returncode == 0
