"""From a folder to a delivered event and back to nothing, as an operator does it."""

from __future__ import annotations

import pwd
import subprocess
from pathlib import Path
from typing import Any

import pytest

from host.client.client import Client
from host.control.plugin_types import ListedPlugin, PluginEntry
from isolator.paths import Paths
from tests.support.answers import check_keys, checked
from tests.system.daemon import ECHO, alive, daemon, event, wait_for, write_plugin

SERVICES = ("isolator.audit.service", "isolator.broker.service", "host.service", "isolator.launcher.server")


def test_whole_life(tmp_path: Path) -> None:
    folder = write_plugin(tmp_path / "echo")
    with daemon() as d:
        shown = d.cli("plugin", "add", str(folder), "--yes")
        assert "deploy.completed" in shown.stdout
        assert (d.root / "etc/isolator/policies/echo.toml").exists()
        entry = d.json("plugin", "show", "echo")
        assert entry["state"] == "stopped"

        done = d.cli("event", "emit", "deploy.completed", event(1), "--wait")
        assert "echo" in done.stdout and "ok" in done.stdout
        assert d.json("plugin", "show", "echo")["state"] == "running"
        emitted = d.json("event", "emit", "deploy.completed", event(2), "--wait")

        figures = subprocess.run(
            ["curl", "-s", "--unix-socket", str(d.root / "run/isolator/metrics.sock"), "http://isolator/metrics"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert "isolator_" in figures and "# TYPE" in figures

        (started,) = [r for r in d.records() if r["type"] == "plugin.started"]
        uid = pwd.getpwnam(f"plugin-echo-{Paths.of(d.root).instance}").pw_uid
        status = Path(f"/proc/{started['data']['pid']}/status").read_text()
        assert f"Uid:\t{uid}\t{uid}\t{uid}\t{uid}" in status
        assert "CapBnd:\t0000000000000000" in status and "NoNewPrivs:\t1" in status and "Seccomp:\t2" in status

        for pid in (d.process.pid, *map(d.service_pid, SERVICES)):
            assert "/libssl" not in Path(f"/proc/{pid}/maps").read_text(), (
                "nothing here speaks TLS: 1.3 MiB for nothing"
            )

        story = d.cli("audit", "story", emitted.get("event_id") or emitted["id"])
        assert "echo" in story.stdout
        d.cli("audit", "verify")
        d.cli("plugin", "stop", "echo")
        assert d.json("plugin", "show", "echo")["state"] == "stopped"
        d.cli("plugin", "remove", "echo", "--yes")
        d.cli("plugin", "show", "echo", code=3)
        with pytest.raises(KeyError):
            pwd.getpwnam(f"plugin-echo-{Paths.of(d.root).instance}")
        assert d.stop() == 0
        assert d.cli("audit", "verify").returncode == 0
        types = [r["type"] for r in d.records()]
        assert types[0] == "host.started" and "host.stopped" in types and "plugin.removed" in types


def test_answers_have_the_keys_that_their_verbs_declare(tmp_path: Path) -> None:
    folder = str(write_plugin(tmp_path / "echo"))
    with daemon() as d, Client(d.root) as client:

        def ask(verb: str, **params: Any) -> dict[str, Any]:
            return checked(verb, client.call(verb, **params))

        token = ask("plugin.stage", path=folder)["token"]
        check_keys(ask("plugin.commit", token=token)["plugin"], PluginEntry)
        for verb in ("start", "restart", "explain", "disable", "enable", "stop"):
            ask(f"plugin.{verb}", name="echo")
        token = ask("plugin.stage", path=folder, update="echo")["token"]
        assert ask("plugin.update", token=token)["unchanged"] is True
        check_keys(ask("plugin.list")["plugins"][0], ListedPlugin)
        ask("plugin.show", name="echo")
        for verb in ("status", "ledger", "event.types"):
            ask(verb)
        ask("plugin.remove", name="echo")


def test_killed_supervisor_leaves_no_orphan_and_loses_no_event(tmp_path: Path) -> None:
    folder = write_plugin(
        tmp_path / "echo", ECHO.replace("params = ", "time.sleep(0.5); params = ").replace("json,", "json, time,")
    )
    with daemon() as d:
        d.cli("plugin", "add", str(folder), "--yes")
        d.cli("event", "emit", "deploy.completed", event("before"), "--wait")
        pid = d.json("plugin", "show", "echo")["pid"]
        services = [d.service_pid(module) for module in SERVICES]
        for number in range(5):
            d.cli("event", "emit", "deploy.completed", event(number))
        d.kill()
        for process in (pid, *services):
            wait_for(lambda process=process: not alive(process), what=f"{process} outlived its supervisor")
        d.start()
        wanted = {"dbefore", *(f"d{number}" for number in range(5))}
        wait_for(lambda: {*d.noted("echo")} >= wanted, what="an accepted event was lost")
        assert "earlier daemon left" in d.log.read_text()
        d.cli("audit", "verify")
        runs = {r["run"] for r in d.records() if r["type"] == "plugin.started"}
        ended = {r["run"] for r in d.records() if r["type"] in ("plugin.stopped", "plugin.crashed")}
        assert len(runs - ended) == 1, "the run that was found dead has no record of its end"


def test_second_daemon_on_the_same_root_is_refused(tmp_path: Path) -> None:
    with daemon() as d:
        second = d.cli("serve", code=1)
        assert second.stderr.count("\n") == 1 and "another one is running there" in second.stderr
        d.cli("plugin", "list")
