"""A user's terminal over reloads of the daemon: one that succeeds, one that is refused, and a kill at each step."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from tests.runners.conftest import ALICE, HOST_TOML, run_as, words
from tests.support.processes import children
from tests.support.terminal import terminal
from tests.support.timeouts import seconds
from tests.system.daemon import alive, daemon, wait_for, write_plugin
from tests.system.reload.faulty import STEPS, FaultyDaemon
from tests.system.reload.test_faults import ALWAYS
from tests.system.reload.test_reload import STATE, running

SHELL = ["--tty", "--env", "PS1=% ", "--", "bash", "--norc", "--noprofile"]
ENDED = "isolator: isolator run: the daemon has ended, and the run with it; run it again"


@pytest.fixture
def faulty(shared_dir: Path) -> Iterator[FaultyDaemon]:
    """A daemon with a running sidecar, whose reloads go as they are told."""
    with daemon(host_toml=HOST_TOML, kind=FaultyDaemon) as made:
        d = cast(FaultyDaemon, made)
        d.cli("plugin", "add", str(write_plugin(shared_dir / "echo", sandbox=STATE)), "--yes")
        d.cli("plugin", "start", "echo")
        yield d


def test_shell_goes_on_over_reloads_and_over_refused_ones(faulty: FaultyDaemon) -> None:
    with terminal(words(faulty.root, ALICE, "run", *SHELL)) as one:
        one.shows("% ")
        one.press("x=$$; sleep 1000 & echo be''gun\r")
        one.shows("begun")
        for number, trap in enumerate(("fail", "", "fail", "")):
            if trap:
                faulty.at_exec(trap)
            one.press(f"echo before-$((number={number}))\r")  # what is under way as it begins
            faulty.cli("reload", code=1 if trap else 0)
            one.shows(f"before-{number}")
            one.resize(30 + number, 90)
            one.press("stty size; jobs %1; echo same-$(($$ == x))\r")
            shown = one.shows("same-1")
            assert f"{30 + number} 90" in shown and "Running" in shown
        one.press("sleep 1000\r")
        faulty.cli("reload")
        one.press("\x03")  # the terminal's signals come from the cage's own line
        one.press("exit 7\r")
        assert one.end() == 7
    assert [record["data"]["cause"] for record in faulty.records() if record["type"] == "run.ended"] == ["exit"]


def killed_at(d: FaultyDaemon, step: str) -> None:
    """Kill the supervisor at a step of a reload: who is at the terminal reads why, and the next start clears all."""
    assert d.process is not None
    d.cli("plugin", "start", "echo")
    with terminal(words(d.root, ALICE, "run", *SHELL)) as one:
        before = one.settings()
        one.shows("% ")
        one.press("sleep 1000 & echo be''gun\r")
        one.shows("begun")
        ours = children(d.process.pid)
        assert running(d)["echo"][0] in ours
        d.kill_at(step)
        d.process.send_signal(signal.SIGHUP)
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = d.process.wait(seconds(60))
        assert code == -signal.SIGKILL, (step, d.log.read_text())
        assert one.end() == 125, step
        assert one.rest().splitlines()[-1] == ENDED, step
        assert one.settings() == before, step
        d.kill()
        wait_for(lambda: not any(map(alive, ours)), what=f"a process outlived a kill at {step!r}")
    d.start()
    log = d.log.read_text()
    assert "cleared what an earlier daemon left: cage echo" in log and f"cage _run.{ALICE}" in log, (step, log)
    d.log.write_text("")


@pytest.mark.timeout(seconds(900))
@pytest.mark.parametrize("steps", [ALWAYS, pytest.param(STEPS, marks=pytest.mark.wide)], ids=["some", "all"])
def test_kill_at_a_step_of_a_reload_leaves_nothing_of_a_terminal(faulty: FaultyDaemon, steps: tuple[str, ...]) -> None:
    for step in steps:
        killed_at(faulty, step)
    assert run_as(faulty, ALICE, "--", "true").returncode == 0
    assert faulty.stop() == 0
    faulty.cli("audit", "verify")
    assert faulty.json("gc", "--dry-run") == []
