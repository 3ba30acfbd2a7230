"""Plugins that need long to make their socket: they get the time that manifest, policy and ceiling agree on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.sidecars import oneshot
from tests.system.daemon import Daemon, daemon, event, wait_for, write_plugin

# A file that only a test puts there: the plugin is as slow as the test needs it to be.
PATIENT = oneshot('return {"status": "ok"}', first='while not os.path.exists("/tmp/go"):\n    time.sleep(0.05)\n')
SILENT = "#!/bin/sh\necho nobody listens >&2\nsleep 1000\n"


@pytest.fixture(scope="module")
def running() -> Iterator[Daemon]:
    with daemon(host_toml='[defaults]\nstart_timeout = "1s"\n[restart]\ncrashes = 2\nbackoff_min = "100ms"\n') as d:
        yield d


def test_slow_plugin_is_awaited_as_long_as_its_manifest_asks_and_loses_no_event(
    running: Daemon, tmp_path: Path
) -> None:
    folder = write_plugin(tmp_path / "slow", PATIENT, restart={"start_timeout": "2m"})
    running.cli("plugin", "add", str(folder), "--yes")
    starting = running.begin("plugin", "start", "slow")
    assert starting.stderr is not None and starting.stdout is not None
    assert re.fullmatch(r"slow: its socket is not there yet, after \d+s of 2m\n", starting.stderr.readline())
    emitted = running.json("event", "emit", "deploy.completed", event(1))

    def start() -> str:
        lines = running.cli("plugin", "show", "slow").stdout.splitlines()
        return next((line for line in lines if line.startswith("start: ")), "")

    # Longer than the host's default would let it.
    wait_for(lambda: re.fullmatch(r"start: +its socket is not there yet, after ([2-9]|\d\d+)s of 2m", start()))
    entry = running.json("plugin", "show", "slow")
    assert (entry["state"], entry["ready"], entry["restarts"]) == ("running", False, 0)
    wait_for(lambda: "its socket is not there yet, after" in (running.json("plugin", "show", "slow")["holding"] or ""))

    Path(f"/proc/{entry['pid']}/root/tmp/go").write_text("")
    wait_for(lambda: running.json("plugin", "show", "slow")["ready"])
    assert not start()
    assert starting.stdout.read() == f"started slow, pid {entry['pid']}\n" and starting.wait() == 0
    (response,) = wait_for(
        lambda: [r for r in running.records() if r["type"] == "event.response" and r["event_id"] == emitted["id"]]
    )
    assert (response["run"], response["data"]["attempt"]) == (entry["run"], 1)
    assert running.cli("plugin", "restart", "slow", "--no-wait").stdout.startswith("restarted slow, pid ")


def test_policy_decides_about_the_time_and_the_error_names_the_key(running: Daemon, tmp_path: Path) -> None:
    folder = write_plugin(tmp_path / "silent", SILENT, restart={"start_timeout": "5m"})
    running.cli("plugin", "add", str(folder), "--yes")
    policy = running.root / "etc/isolator/policies/silent.toml"
    policy.write_text(policy.read_text() + '\n[restart]\nstart_timeout = "1500ms"\n')
    wait_for(lambda: running.json("plugin", "show", "silent")["effective"]["restart"]["start_timeout"] == 1.5)
    told = running.cli("plugin", "start", "silent", code=1).stderr
    assert "stderr: nobody listens" in told and told.endswith("; isolator plugin logs silent\n")
    assert "isolator: plugin silent: is " in told and "no socket in 1.5 s" in told
    running.cli("event", "emit", "deploy.completed", event(2))
    entry = wait_for(lambda: (e := running.json("plugin", "show", "silent"))["state"] == "failed" and e)
    assert entry["error"].startswith(
        "no socket in 1.5 s, nothing listens on PLUGIN_SOCKET or PLUGIN_PORT; "
        "raise start_timeout in [restart] of its policy if it needs longer; 2 crashes"
    )
    ends = [r for r in running.records() if r["type"] == "plugin.crashed" and r["plugin"] == "silent"]
    assert {r["data"]["cause"] for r in ends} == {"no socket in 1.5 s"}
