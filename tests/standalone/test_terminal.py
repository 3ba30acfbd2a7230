"""``isolator run`` on a terminal: keys and signals reach all of the command, and the terminal is left as it was."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import struct
import subprocess
import termios
from pathlib import Path

import pytest

from tests.support.cage_fixture import COMMAND, caged, isolator
from tests.support.processes import state
from tests.support.terminal import terminal
from tests.support.timeouts import seconds
from tests.system.daemon import wait_for

# Ended by the kernel, without a handler: one that runs while pause(2) is begun again after a stop does not end it.
WAITS = """import signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
print("ready", flush=True)
while True: signal.pause()"""

CATCHES = """import signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})
print("ready", flush=True)
print("child got", signal.sigwait({signal.SIGTERM, signal.SIGHUP}).value, flush=True)"""


def _run(root: Path, *arguments: str) -> list[str]:
    return [*COMMAND, "--root", str(root), "run", *arguments]


def test_ctrl_c_ends_a_script_with_the_program_that_it_waits_for(shared_dir: Path) -> None:
    with terminal(_run(shared_dir, "--", "sh", "-c", f"python3 -c '{WAITS}'; echo went on")) as one:
        one.shows("ready")
        one.press("\x03")
        assert one.end() == 128 + signal.SIGINT
        assert "went on" not in one.rest()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_program_that_a_script_waits_for(shared_dir: Path, number: signal.Signals) -> None:
    script = f"trap 'echo shell got it' TERM HUP; python3 -c '{CATCHES}'; echo went on"
    with terminal(_run(shared_dir, "--", "sh", "-c", script)) as one:
        one.shows("ready")
        one.process.send_signal(number)
        one.shows(f"child got {number.value}")
        one.shows("shell got it")
        one.shows("went on")
        assert one.end() == 0


def test_ctrl_z_stops_the_cage_and_fg_continues_it(shared_dir: Path) -> None:
    script = f"trap 'echo continued' CONT; python3 -c '{WAITS}'; echo went on"
    with terminal(["bash", "--norc", "-i"]) as one:
        one.press(shlex.join(_run(shared_dir, "--", "sh", "-c", script)) + "\n")
        one.shows("ready\r\n")
        one.press("\x1a")
        one.shows("Stopped")
        sidecar = caged(shared_dir)[1:]
        wait_for(lambda: {state(pid) for pid in sidecar} == {"T"}, what="the stop of everything in the cage")
        one.press("fg\n")
        wait_for(lambda: "T" not in {state(pid) for pid in sidecar}, what="their continuation")
        one.press("\x03")
        one.press("echo code $?\n")
        one.shows("code 130")
        one.press("exit\n")
        assert one.end() == 0


def test_the_modes_of_the_terminal_are_put_back(shared_dir: Path) -> None:
    with terminal(_run(shared_dir, "--", "sh", "-c", "stty -echo -icanon; stty -a | grep -o ' -echo '")) as one:
        before = termios.tcgetattr(one.line)
        one.shows("-echo")
        assert one.end() == 0
        assert termios.tcgetattr(one.line) == before


def test_a_stream_that_blocked_blocks_again(shared_dir: Path) -> None:
    code = "import os; os.set_blocking(0, False); print('open', os.get_blocking(0), flush=True)"
    with terminal(_run(shared_dir, "--", "python3", "-c", code)) as one:
        one.shows("open False")
        assert one.end() == 0
        assert os.get_blocking(one.line)


def test_a_shell_on_a_terminal_of_its_own_controls_jobs(shared_dir: Path) -> None:
    with terminal(
        _run(shared_dir, "--tty", "--env", "PS1=> ", "--env", "TERM=dumb", "--", "bash", "--norc", "-i")
    ) as one:
        one.shows("> ")
        one.press("tty; stty size; cat\n")
        one.shows("/dev/pts/0\r\n24 80\r\n")
        one.press("typed\n")
        one.shows("typed\r\ntyped\r\n")
        one.press("\x1a")
        one.shows("Stopped")
        one.press("fg\n")
        one.shows("\ncat\r\n")
        one.press("again\n")
        one.shows("again\r\nagain\r\n")
        one.press("\x03")
        one.shows("^C")
        one.shows("> ")  # what is typed before is discarded, with cat's input
        one.press("echo code $?; exit 7\n")
        one.shows("code 130")
        assert one.end() == 7


def test_the_callers_terminal_is_not_in_the_cage(shared_dir: Path) -> None:
    script = "stty size -echo; stty rows 7; ls -1 /dev/pts; stty size"
    with terminal(_run(shared_dir, "--tty", "--", "sh", "-c", script)) as one:
        before = termios.tcgetattr(one.line)
        assert one.end() == 0
        assert one.rest() == "24 80\r\n0\r\nptmx\r\n7 80\r\n"
        assert termios.tcgetattr(one.line) == before
        size = fcntl.ioctl(one.line, termios.TIOCGWINSZ, b"\0" * 8)
        assert struct.unpack("4H", size)[:2] == (24, 80)


def test_a_change_of_size_arrives(shared_dir: Path) -> None:
    script = "trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.05; done"
    with terminal(_run(shared_dir, "--tty", "--", "bash", "-c", script)) as one:
        one.shows("ready")
        one.resize(33, 99)
        one.shows("33 99")
        assert one.end() == 0


@pytest.mark.parametrize("line", ["line\n", "no end of line"])
def test_a_terminal_without_one_outside_ends_with_the_input(shared_dir: Path, line: str) -> None:
    result = isolator(shared_dir, "run", "-t", "--", "sh", "-c", "test -t 0 -a -t 1 && cat", input=line)
    assert result.returncode == 0, result.stderr
    assert result.stdout == line * 2  # typed, and as cat has it


def test_all_output_arrives_before_the_end(shared_dir: Path) -> None:
    result = isolator(shared_dir, "run", "-t", "--", "seq", "20000")
    assert result.stdout.split() == [str(number) for number in range(1, 20001)]


def test_a_terminal_that_nobody_reads_hangs_up(shared_dir: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$@" </dev/null | head -n1', "bash", *_run(shared_dir, "-t", "--", "yes")],
        capture_output=True, text=True, check=False, timeout=seconds(60),
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("y\n", 128 + signal.SIGHUP), done.stderr


def test_why_a_command_was_ended_has_a_line_of_its_own(shared_dir: Path) -> None:
    script = "printf prompt; exec python3 -c 'bytearray([7]) * (1 << 30)'"
    with terminal(_run(shared_dir, "--tty", "--memory", "32M", "--", "sh", "-c", script)) as one:
        assert one.end() == 128 + signal.SIGKILL
        assert one.rest().splitlines() == ["prompt", "isolator: sh was ended: out of memory"]
