"""Reloads that come at a bad moment: a version is on trial, another plugin or program is being installed, the disk is
full, operators do whatever they do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pytest

from tests.support.timeouts import seconds
from tests.system.daemon import ECHO, Daemon, daemon, event, wait_for, write_plugin
from tests.system.reload import faulty
from tests.system.reload.faulty import FaultyDaemon
from tests.system.reload.test_reload import STATE, running

ROOM = 96 << 20
SLOW = ECHO.replace(
    "import json, os, socket",
    """import json, os, socket, time
    open(os.environ["PLUGIN_STATE_DIR"] + "/waits", "w").close()
    while not os.path.exists(os.environ["PLUGIN_STATE_DIR"] + "/go"):
        time.sleep(0.02)""",
)
"""Makes its socket once the file ``go`` is there."""


def test_reload_waits_for_a_version_on_trial_and_for_an_installation(shared_dir: Path) -> None:
    with daemon() as d:
        for name in ("tried", "stays"):
            d.cli("plugin", "add", str(write_plugin(shared_dir / name, sandbox=STATE)), "--yes")
            d.cli("plugin", "start", name)
        before, state = running(d), d.state_of("tried")
        write_plugin(shared_dir / "tried", SLOW, sandbox=STATE, version="2.0.0")
        updating = d.begin("plugin", "update", "tried", "--yes")
        wait_for((state / "waits").exists, what="the trial has not begun")
        reloading = d.begin("reload")
        adding = d.begin("plugin", "add", str(write_plugin(shared_dir / "late", sandbox=STATE)), "--yes")
        (state / "go").touch()
        for command in (updating, reloading, adding):
            out, errors = command.communicate(timeout=seconds(120))
            assert command.returncode == 0, (command.args, out, errors, d.log.read_text())
        shown = d.json("plugin", "show", "tried")
        assert (shown["version"], shown["state"], shown["on_trial"]) == ("2.0.0", "running", False)
        assert running(d)["stays"] == before["stays"]
        types = [(one["type"], one["plugin"]) for one in d.records()]
        assert types.count(("daemon.reloaded", None)) == 1
        assert types.count(("plugin.started", "tried")) == 2, "the version on trial was begun anew"
        assert not [one for one in types if one[0] == "plugin.rolled_back"]
        d.cli("event", "emit", "deploy.completed", event(1), "--wait")
        assert set(running(d)) == {"tried", "stays", "late"}


class Linked(FaultyDaemon):
    """A daemon whose program is what a link leads to, as after an installation."""

    def command(self) -> list[str]:
        if not self.link.exists():
            self.link.symlink_to(faulty.__file__)
        return [sys.executable, "-I", str(self.link), str(self.root)]

    @property
    def link(self) -> Path:
        return self.root / "program"


def test_program_that_is_put_there_after_the_trial_is_not_executed(shared_dir: Path) -> None:
    """Nobody has asked that one whether it takes over: of a version that does not, nothing would be left running."""
    with daemon(kind=Linked) as made:
        d = cast(Linked, made)
        d.cli("plugin", "add", str(write_plugin(shared_dir / "echo", sandbox=STATE)), "--yes")
        d.cli("plugin", "start", "echo")
        before = running(d)
        other = shared_dir / "other"
        other.write_text("raise SystemExit('it takes nothing over')\n")
        d.at_rest(f"run ln -sfT {other} {d.link}")
        assert "reload: the program was exchanged after its trial; ask again" in d.cli("reload", code=1).stderr
        assert "refused, and nothing has changed: " in d.cli("reload", code=1).stderr, "it is tried now"
        d.link.unlink()
        d.link.symlink_to(faulty.__file__)
        d.cli("reload")
        assert running(d) == before
        d.cli("event", "emit", "deploy.completed", event(1), "--wait")


def test_reload_with_a_full_disk_stops_nobody_and_loses_nothing(shared_dir: Path) -> None:
    with daemon(start=False) as d:
        place = d.root / "var"
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM},mode=755", "tmpfs", str(place)], check=True)
        try:
            d.start()
            d.cli("plugin", "add", str(write_plugin(shared_dir / "echo", sandbox=STATE)), "--yes")
            d.cli("event", "emit", "deploy.completed", event(1), "--wait")
            before, ballast = running(d), place / "ballast"
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(1 << 16)):
                    pass
            d.cli("event", "emit", "deploy.completed", event(2), code=None)
            d.cli("reload", "--timeout", "30", code=None)
            assert running(d) == before, d.log.read_text()
            ballast.unlink()
            wait_for(lambda: d.cli("event", "emit", "deploy.completed", event(3), "--wait", code=None).returncode == 0)
            d.cli("reload")
            assert running(d) == before
            d.cli("event", "emit", "deploy.completed", event(4), "--wait")
            kinds = [one["type"] for one in d.records()]
            assert not {"plugin.crashed", "plugin.stopped"} & set(kinds)
            assert kinds.count("daemon.reloaded") >= 1
            d.cli("audit", "verify")
            assert d.stop() == 0
        finally:
            if d.process is not None:
                d.stop()
            while os.path.ismount(place):
                subprocess.run(["umount", "-l", str(place)], check=True)


def commands(d: Daemon, folder: Path, backups: Path) -> dict[str, Callable[[int], list[list[str]]]]:
    """What operators do, by who does it: the commands of one round."""
    passphrase = folder / "passphrase"
    passphrase.write_text("correct horse battery staple\n")
    passphrase.chmod(0o600)

    def add(number: int) -> list[list[str]]:
        package = write_plugin(folder / f"late{number}", sandbox=STATE)
        return [
            ["plugin", "add", str(package), "--yes"], ["plugin", "start", package.name],
            ["plugin", "remove", package.name, "--yes"],
        ]  # fmt: skip

    def update(number: int) -> list[list[str]]:
        package = write_plugin(folder / "new", sandbox=STATE, version=f"1.0.{number}")
        first = [["plugin", "add", str(package), "--yes"]]
        return [["plugin", "update", "new", "--yes"], ["plugin", "rollback", "new"]] if number else first

    return {
        "adds": add,
        "updates": update,
        "backs up": lambda number: [["backup", str(backups / f"b{number}"), "--passphrase-file", str(passphrase)]],
        "configures": lambda number: [
            ["plugin", "config", "echo", "set", f"token=secret{number}"], ["config", "rotate-key"],
        ],
        "pauses": lambda _: [["plugin", "pause", "echo"], ["plugin", "resume", "echo"]],
        "emits": lambda number: [["event", "emit", "deploy.completed", event(f"chaos{number}"), "--wait"]],
        "reloads": lambda _: [["reload"]],
        "reloads, too": lambda _: [["reload"]],
    }  # fmt: skip


@pytest.mark.wide
@pytest.mark.timeout(seconds(900))
def test_whatever_operators_do_is_done_while_reloads_come_without_end(shared_dir: Path) -> None:
    backups = Path(tempfile.mkdtemp(prefix="isolator-backups-", dir="/var/tmp"))
    done, failed = threading.Event(), list[str]()
    with daemon() as d, ThreadPoolExecutor() as operators:
        schema = {"token": {"type": "string", "secret": True}}
        d.cli("plugin", "add", str(write_plugin(shared_dir / "echo", sandbox=STATE, config_schema=schema)), "--yes")
        d.cli("plugin", "start", "echo")

        def work(rounds: Callable[[int], list[list[str]]]) -> None:
            for number in range(4):
                for words in rounds(number):
                    result = d.cli(*words, code=None)
                    if result.returncode and "run the command again" not in result.stderr:  # a backup says so
                        failed.append(f"{words}: {result.stderr}")

        def hang_up() -> None:
            while not done.wait(0.3):
                assert d.process is not None
                d.process.send_signal(signal.SIGHUP)

        try:
            storm = operators.submit(hang_up)
            for one in [operators.submit(work, rounds) for rounds in commands(d, shared_dir, backups).values()]:
                one.result()
            done.set()
            storm.result()
            d.cli("reload")
            assert not failed
            bad = ("service.ended", "audit.gap", "plugin.crashed")
            assert not [one for one in d.records() if one["type"] in bad]
            d.cli("audit", "verify")
            assert d.stop() == 0
            assert d.json("gc", "--dry-run") == []
        finally:
            done.set()
            shutil.rmtree(backups)
