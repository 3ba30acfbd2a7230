"""A new version and the config given with it stay or go together, whoever is killed while it is watched."""

from __future__ import annotations

import contextlib
import json
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.timeouts import seconds
from tests.system.daemon import ECHO, Daemon, daemon, event, wait_for, write_plugin

NAME = "tried"
SCHEMA = {"color": {"type": "string", "default": "none"}, "token": {"type": "string", "secret": True}}
TELLS = ECHO.replace('"status": "ok"', '"status": "ok", "version": "VERSION", "color": os.environ["COLOR"]')
WAITS = """\
import os, time
while not os.path.exists(os.environ["PLUGIN_STATE_DIR"] + "/go"):
    time.sleep(0.02)
"""


@pytest.fixture
def running() -> Iterator[Daemon]:
    with daemon(host_toml='[restart]\nbackoff_min = "0.1s"\n') as d:
        yield d


def _make(folder: Path, version: str, first: str = "", **manifest: Any) -> Path:
    """A version that does ``first`` before it serves, and answers with its version and its color."""
    script = textwrap.dedent(TELLS).replace("VERSION", version)
    head, _, rest = script.partition("\n")
    return write_plugin(folder / NAME, f"{head}\n{first}\n{rest}", version=version, config_schema=SCHEMA, **manifest)


def _answer(d: Daemon) -> tuple[str, str]:
    (delivery,) = d.json("event", "emit", "deploy.completed", event(1), "--wait")["deliveries"]
    result = json.loads(delivery["reply"])["result"]
    return result["version"], result["color"]


def _set(d: Daemon) -> set[str]:
    return {item["key"] for item in d.json("plugin", "config", NAME) if item["is_set"]}


def test_config_given_with_a_version_that_fails_goes_with_it(running: Daemon, tmp_path: Path) -> None:
    running.cli("plugin", "add", str(_make(tmp_path, "1.0.0")), "--yes", "--config", "color=red")
    running.cli("plugin", "start", NAME)
    given = ("--config", "color=blue", "--config", "token=hunter2-hunter2")
    _make(tmp_path, "2.0.0", "import sys; print('hunter2-hunter2', flush=True); sys.exit(7)")
    result = running.cli("plugin", "update", NAME, *given, code=1)
    assert "1.0.0 is in use again" in result.stderr
    assert _answer(running) == ("1.0.0", "red")
    assert _set(running) == {"color"}
    log = (running.root / f"var/log/isolator/plugins/{NAME}.log").read_text()
    assert "[redacted]" in log and "hunter2" not in log  # what came with it was secret while it was tried

    _make(tmp_path, "2.1.0")
    running.cli("plugin", "update", NAME, *given)
    assert _answer(running) == ("2.1.0", "blue")
    assert _set(running) == {"color", "token"}

    running.cli("plugin", "update", NAME, "--config", "color=green")  # the same files
    assert _answer(running) == ("2.1.0", "green")


def test_config_given_with_a_version_that_waits_waits_with_it(running: Daemon, tmp_path: Path) -> None:
    running.cli("plugin", "add", str(_make(tmp_path, "1.0.0")), "--yes", "--config", "color=red")
    running.cli("plugin", "start", NAME)
    _make(tmp_path, "2.0.0", hooks=["deploy.completed", "domain.added"])
    running.cli("plugin", "update", NAME, "--config", "color=blue", code=5)
    assert _answer(running) == ("1.0.0", "red")
    running.cli("plugin", "restart", NAME)
    assert _answer(running) == ("1.0.0", "red")
    running.cli("config", "rotate-key")
    running.cli("plugin", "approve", NAME, "--yes")
    assert _answer(running) == ("2.0.0", "blue")


@pytest.mark.parametrize(
    ("first", "outcome"),
    [
        pytest.param(f"{WAITS}raise SystemExit(7)", ("1.0.0", "red"), marks=pytest.mark.wide),
        (WAITS, ("2.0.0", "blue")),
    ],
    ids=["fails", "comes up"],
)
def test_a_version_on_trial_when_the_daemon_is_killed_is_judged_again(
    running: Daemon, tmp_path: Path, first: str, outcome: tuple[str, str]
) -> None:
    d = running
    d.cli("plugin", "add", str(_make(tmp_path, "1.0.0")), "--yes", "--config", "color=red")
    d.cli("plugin", "start", NAME)
    _make(tmp_path, "2.0.0", first)
    words = ["isolator", "--root", str(d.root), "plugin", "update", NAME, "--config", "color=blue"]
    with contextlib.ExitStack() as stack:
        update = stack.enter_context(subprocess.Popen(words, stderr=subprocess.DEVNULL))
        wait_for(lambda: any(r["type"] == "plugin.started" and r["data"]["reason"] == "update" for r in d.records()))
        d.kill()
        assert update.wait(seconds(30)) == 1
    d.start()
    wait_for(d.state_of(NAME).exists, what="it is not started again")
    (d.state_of(NAME) / "go").touch()
    judged = "plugin.updated" if outcome[0] == "2.0.0" else "plugin.rolled_back"
    wait_for(lambda: any(r["type"] == judged for r in d.records()), what=lambda: f"not judged: {d.log.read_text()}")
    wait_for(lambda: d.json("plugin", "show", NAME)["version"] == outcome[0])  # the record comes before the host knows
    assert _answer(d) == outcome
    assert not (d.root / f"var/lib/isolator/plugins/{NAME}/plugin.trial").exists()
    # It stays so: nothing is judged twice.
    d.stop()
    d.start()
    assert _answer(d) == outcome
    d.cli("audit", "verify")
