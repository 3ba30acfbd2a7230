"""Two daemons and the servers of their log: a plugin goes on where it is when its daemon was killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolator.linux import netns
from tests.support.mcp_servers import server
from tests.support.nats_servers import nats_server
from tests.support.pretend_internet import run_in
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon, event, wait_for, write_plugin

PORT = 4222
SETTINGS = f"""\
[cluster]
name = "%s"
servers = ["127.0.0.1:{PORT}"]
tls = false
"""

pytestmark = [pytest.mark.wide, pytest.mark.slow]


@pytest.fixture
def network() -> Iterator[int]:
    """A network in which there is a server with a cluster's log, and nothing else."""
    made = netns.in_new_network(netns.current_network)
    try:
        run_in(made, "ip", "link", "set", "lo", "up")
        yield made
    finally:
        os.close(made)


@pytest.fixture
def log(network: int, tmp_path: Path) -> Iterator[None]:
    inside = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{network}"]
    config = tmp_path / "server.conf"
    config.write_text(
        f'listen: "127.0.0.1:{PORT}"\njetstream {{ store_dir: "{tmp_path}/store", max_file_store: 100MB }}\n'
    )
    with (tmp_path / "log").open("ab") as output:
        server = subprocess.Popen([*inside, nats_server(), "-c", config], stdout=output, stderr=output)
    make = ["isolator", "cluster", "init", "--server", f"127.0.0.1:{PORT}", "--replicas", "1", "--no-tls"]
    make += ["--max-bytes", str(50 << 20)]
    try:
        wait_for(lambda: subprocess.run([*inside, *make], capture_output=True, check=False).returncode == 0)
        yield
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def _hosts(network: int, plugin: Path, grant: str = "") -> Iterator[tuple[Daemon, Daemon]]:
    """Two daemons that both have a plugin; the one that holds it first."""
    with (
        daemon(host_toml=SETTINGS % "h1", network=network) as first,
        daemon(host_toml=SETTINGS % "h2", network=network) as second,
    ):
        for d in (first, second):
            d.cli("plugin", "add", str(plugin), "--yes")
            policy = d.root / f"etc/isolator/policies/{plugin.name}.toml"
            if grant:
                policy.write_text(policy.read_text().replace("[grant]\n", f"[grant]\n{grant}\n", 1))
        holder = wait_for(lambda: next((d for d in (first, second) if plugin.name in _holds(d)), None), seconds(60))
        yield (first, second) if holder is first else (second, first)


def _holds(d: Daemon) -> list[str]:
    status = d.json("cluster", "status", code=None)
    return next((host["holds"] for host in status["hosts"] if host["here"]), [])


def _name(d: Daemon) -> str:
    return str(d.json("cluster", "status", code=None)["host"])


def _refused(d: Daemon, *words: str) -> str:
    found = d.cli(*words, code=None)
    assert found.returncode, found.stdout
    return " ".join(found.stderr.split())


def _story(d: Daemon, event_id: str) -> str:
    return " ".join(d.cli("audit", "story", event_id).stdout.split())


def test_host_that_does_not_hold_a_plugin_says_who_does(network: int, log: None, tmp_path: Path) -> None:
    with _hosts(network, write_plugin(tmp_path / "plugins/echo")) as (holder, other):
        name = _name(holder)
        for verb in ("start", "stop", "restart"):
            assert f"is held by {name}" in _refused(other, "plugin", verb, "echo")

        # Of what another host delivers, a story says where it was done, and never that it was not.
        done = other.json("event", "emit", "deploy.completed", event(1), "--wait")
        shown = done["deliveries"][0]
        assert (shown["state"], shown["host"], "d1" in shown["reply"]) == ("ok", name, True)
        assert f"echo: ok on {name}; its records are there" in _story(other, done["id"])
        assert "echo: ok at the first attempt" in _story(holder, done["id"])
        done = holder.json("event", "emit", "deploy.completed", event(2), "--wait")
        wait_for(lambda: "ok" in _states(other, done["id"]), what="read")
        assert f"{name} has its deliveries (echo: ok)" in _refused(other, "audit", "story", done["id"])

        # What waits there can be changed there alone; what is this host's own is changed here.
        holder.cli("plugin", "pause", "echo")
        waits = other.json("event", "emit", "deploy.completed", event(3))["id"]
        wait_for(lambda: f"echo: queued on {name}; its records" in _story(other, waits), what="read back")
        for verb in ("retry", "skip", "cancel"):
            more = () if verb == "cancel" else ("--plugin", "echo")
            assert f"its delivery to echo is {name}'s" in _refused(other, "event", verb, waits, *more)
        assert f"{name} has echo, and goes on as before" in other.cli("plugin", "pause", "echo").stderr
        other.cli("plugin", "resume", "echo")
        holder.cli("event", "cancel", waits)
        wait_for(lambda: "cancelled" in _states(other, waits), what="cancelled")
        holder.cli("plugin", "resume", "echo")

        # A holder that does not answer is named, with what the log says.
        stopped = holder.service_pid("host.service")
        os.kill(stopped, signal.SIGSTOP)
        try:
            shown = other.json("event", "show", done["id"], code=None)["deliveries"][0]
        finally:
            os.kill(stopped, signal.SIGCONT)
        assert (shown["state"], shown["reply"], shown["host"]) == ("ok", None, name)
        assert "does not answer" in shown["detail"]

        # A version that one host brings is the cluster's, whoever holds it.
        newer = write_plugin(tmp_path / "newer/echo", version="2.0.0")
        other.cli("plugin", "update", "echo", str(newer), "--yes")
        wait_for(lambda: "echo" in _holds(other), seconds(90), "the version that the cluster uses is not held")
        assert f"is held by {_name(other)}" in _refused(holder, "plugin", "restart", "echo")


def _states(d: Daemon, event_id: str) -> list[str]:
    shown = d.cli("event", "show", event_id, "--json", code=None)
    return [one["state"] for one in json.loads(shown.stdout)["deliveries"]] if not shown.returncode else []


def test_tools_are_approved_on_a_host_that_does_not_run_their_server(network: int, log: None, tmp_path: Path) -> None:
    plugin = write_plugin(tmp_path / "plugins/tools", server(), transport={"mode": "mcp"}, hooks=[])
    with _hosts(network, plugin, 'tools = ["*"]') as (holder, other):
        name = _name(holder)
        wait_for(lambda: holder.json("plugin", "show", "tools")["effective"]["tools"], what="the policy")
        shown = holder.json("mcp", "tools", "tools")
        assert {one["state"] for one in shown["tools"]} == {"new"}
        assert f"is held by {name}: its server runs there alone" in _refused(other, "mcp", "tools", "tools")
        (tmp_path / "shown.json").write_text(json.dumps(shown))
        (tmp_path / "none.json").write_text("{}")
        approve = ("mcp", "approve", "tools", "--yes", "--from")
        refused = _refused(other, *approve, str(tmp_path / "none.json"))
        assert "is not what 'isolator mcp tools --json' shows" in refused
        other.cli(*approve, str(tmp_path / "shown.json"))

        holder.cli("plugin", "disable", "tools")
        wait_for(lambda: "tools" in _holds(other), seconds(60), "it did not move")
        now = other.json("mcp", "tools", "tools")
        assert {one["state"] for one in now["tools"]} == {"approved"} and now["digest"] == shown["digest"]


def test_plugin_moves_when_its_daemon_is_killed(network: int, log: None, tmp_path: Path) -> None:
    plugin = write_plugin(tmp_path / "plugins/echo")
    with (
        daemon(host_toml=SETTINGS % "h1", network=network) as first,
        daemon(host_toml=SETTINGS % "h2", network=network) as second,
    ):
        for d in (first, second):
            d.cli("plugin", "add", str(plugin), "--yes")
        held = wait_for(lambda: next((d for d in (first, second) if _holds(d)), None), seconds(60))
        other = second if held is first else first
        for number in range(5):
            other.cli("event", "emit", "deploy.completed", event(number), "--wait")
        assert {r["data"]["outcome"] for r in held.records() if r["type"] == "event.response"} == {"ok"}
        assert not [r for r in other.records() if r["type"] == "event.dispatched"]
        held.kill()
        other.cli("event", "emit", "deploy.completed", event(5))
        wait_for(lambda: _holds(other), seconds(90), "the plugin did not move")
        done = wait_for(lambda: [r for r in other.records() if r["type"] == "event.response"])
        assert [r["data"]["outcome"] for r in done] == ["ok"]
        held.start()
        held.cli("event", "emit", "deploy.completed", event(6), "--wait")
        wait_for(lambda: len([r for r in other.records() if r["type"] == "event.response"]) == 2)
