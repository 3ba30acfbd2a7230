"""Progress of what takes long: a line on a person's terminal, and nothing anywhere else."""

from __future__ import annotations

import subprocess
import sys

from tests.support.terminal import terminal

PROGRAM = """\
from isolator.cli import progress
progress.AFTER = 0
with progress.Progress("copying", {total}, quiet={quiet}) as shown:
    shown.advance(5)
    print("begun", flush=True)
    input()
print("over", flush=True)
"""


def command(total: int | None = 10, *, quiet: bool = False) -> list[str]:
    return [sys.executable, "-I", "-c", PROGRAM.format(total=total, quiet=quiet)]


def test_terminal_shows_how_far_it_is_and_nothing_of_it_stays() -> None:
    with terminal(command(), TERM="xterm") as one:
        one.shows("copying  [##########----------]  50%  0 s")
        one.press("\n")
        one.shows("\r\x1b[Kover")
        assert one.end() == 0


def test_work_of_unknown_length_shows_its_time() -> None:
    with terminal(command(None), TERM="xterm") as one:
        one.shows("copying  0 s")
        one.shows("copying  1 s")
        one.press("\n")
        assert one.end() == 0


def test_json_pipes_and_dumb_terminals_get_nothing() -> None:
    for quiet, kind in ((True, "xterm"), (False, "dumb")):
        with terminal(command(quiet=quiet), TERM=kind) as one:
            one.shows("begun")
            one.press("\n")
            one.shows("over")
            assert one.end() == 0
            assert b"copying" not in one.seen
    done = subprocess.run(command(), input="\n", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "begun\nover\n", "")
