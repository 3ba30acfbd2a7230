"""A reload waits for what is being stopped: nobody is asked twice to end, and nobody's time to do so is cut short."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import cast

import pytest

from tests.support.timeouts import seconds
from tests.system.daemon import ECHO, daemon, event, wait_for, write_plugin
from tests.system.reload.exchanges import MODULES, exchanged, processes
from tests.system.reload.gated import GatedDaemon

ENDS_LATE = """\
    #!/usr/bin/python3
    import os, signal, time
    state = os.environ["PLUGIN_STATE_DIR"]
    def asked(*_):
        with open(state + "/asked", "a") as file:
            file.write("once\\n")
    signal.signal(signal.SIGTERM, asked)
    while not os.path.exists(state + "/go") or not os.path.exists(state + "/asked"):
        time.sleep(0.01)
    with open(state + "/ended", "a") as file:
        file.write("once\\n")
"""
"""Makes no socket, and ends when it was asked to, once the file ``go`` is there."""
HOST_TOML = "[restart]\ncrashes = 1\n"
PATIENT = '\n[restart]\nstop_grace = "60s"\n'


STUBBORN = ECHO.replace(
    "import json, os, socket",
    """import json, os, signal, socket, sys, time
    state = os.environ["PLUGIN_STATE_DIR"]
    def asked(*_):
        open(state + "/asked", "w").close()
        while not os.path.exists(state + "/go"):
            time.sleep(0.01)
        sys.exit()
    signal.signal(signal.SIGTERM, asked)""",
)
"""Ends when it was asked to, once the file ``go`` is there."""


def test_host_is_let_finish_what_it_was_asked_to_change(shared_dir: Path) -> None:
    """However long that takes: its caller would be told to look whether it was done."""
    with daemon(kind=GatedDaemon) as made:
        d = cast(GatedDaemon, made)
        assert d.process is not None
        state = add_patient(d, write_plugin(shared_dir / "late", STUBBORN, sandbox={"filesystem": {"state": "1M"}}))
        d.cli("plugin", "start", "late")
        before = d.service_pid(MODULES["host"])
        restarting = d.begin("plugin", "restart", "late")
        wait_for((state / "asked").exists, what=d.log.read_text)
        d.wait_at("nowhere")
        os.kill(d.process.pid, signal.SIGUSR1)
        wait_for(lambda: hosts(d) == 2, what="no new host")
        (state / "go").touch()
        out, errors = restarting.communicate(timeout=seconds(60))
        assert restarting.returncode == 0, (out, errors, d.log.read_text())
        wait_for(lambda: exchanged(d, "host", before), what=d.log.read_text)
        (left,) = [note for note in d.notes if note.startswith("host leaves")]
        assert "restart" not in left


def hosts(d: GatedDaemon) -> int:
    """The number of host processes."""
    assert d.process is not None
    return len(processes(d, "host"))


def add_patient(d: GatedDaemon, folder: Path) -> Path:
    """Add a plugin that has a minute to end; returns its own folder."""
    d.cli("plugin", "add", str(folder), "--yes")
    policy = d.root / f"etc/isolator/policies/{folder.name}.toml"
    policy.write_text(policy.read_text() + PATIENT)
    wait_for(lambda: d.json("plugin", "show", folder.name)["effective"]["restart"]["stop_grace"] == 60)
    return d.state_of(folder.name)


@pytest.mark.parametrize("mode", ["oneshot", "exec"])
def test_reload_waits_for_whoever_was_asked_to_end(shared_dir: Path, mode: str) -> None:
    """A sidecar without a socket, and a program that takes longer than it may."""
    with daemon(host_toml=HOST_TOML, kind=GatedDaemon) as made:
        d = cast(GatedDaemon, made)
        more = {
            "exec": {"transport": {"mode": "exec"}, "delivery": {"timeout": "1s"}},
            "oneshot": {"restart": {"start_timeout": "1s"}},
        }[mode]
        folder = write_plugin(shared_dir / "late", ENDS_LATE, sandbox={"filesystem": {"state": "1M"}}, **more)
        state = add_patient(d, folder)
        d.cli("event", "emit", "deploy.completed", event(1))
        wait_for((state / "asked").exists, what=d.log.read_text)
        d.wait_at("nowhere")
        reloading = d.begin("reload", "--no-wait")
        wait_for(lambda: "at rest" in d.notes, what=d.log.read_text)
        (state / "go").touch()
        out, errors = reloading.communicate(timeout=seconds(60))
        assert reloading.returncode == 0, (out, errors, d.log.read_text())
        wait_for((state / "ended").exists, what=d.log.read_text)
        kinds = {"plugin.crashed": "oneshot", "exec.ended": "exec"}
        (end,) = wait_for(lambda: [one for one in d.records() if kinds.get(one["type"]) == mode])
        assert end["data"]["exit_code"] == 0 and end["data"]["cause"].startswith(("no socket", "no end"))
        assert (state / "asked").read_text().split() == ["once"], "it was asked to end again"


def test_reload_ends_though_an_invocation_that_is_being_stopped_ends_meanwhile(shared_dir: Path) -> None:
    """Its stop is waited for, which waits for its end."""
    with daemon(host_toml=HOST_TOML, kind=GatedDaemon) as made:
        d = cast(GatedDaemon, made)
        more = {"transport": {"mode": "exec"}, "delivery": {"timeout": "10m"}}
        folder = write_plugin(shared_dir / "late", ENDS_LATE, sandbox={"filesystem": {"state": "1M"}}, **more)
        state = add_patient(d, folder)
        d.cli("event", "emit", "deploy.completed", event(1))
        wait_for(lambda: [one for one in d.records() if one["type"] == "exec.started"], what=d.log.read_text)
        stopping = d.begin("plugin", "disable", "late")
        wait_for((state / "asked").exists, what=d.log.read_text)
        d.wait_at("nowhere")
        reloading = d.begin("reload", "--no-wait")
        wait_for(lambda: "at rest" in d.notes, what=d.log.read_text)
        (state / "go").touch()
        for command in (reloading, stopping):
            out, errors = command.communicate(timeout=seconds(90))
            assert command.returncode == 0, (command.args, out, errors, d.log.read_text())
        assert d.json("plugin", "show", "late")["state"] == "disabled"
