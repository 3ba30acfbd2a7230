"""Two daemons and the servers of their log: a plugin goes on where it is when its daemon was killed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolator.linux import netns
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


def _is_held(d: Daemon) -> bool:
    status = d.json("cluster", "status", code=None)
    return bool(next(host["holds"] for host in status["hosts"] if host["here"]))


def test_plugin_moves_when_its_daemon_is_killed(network: int, log: None, tmp_path: Path) -> None:
    plugin = write_plugin(tmp_path / "plugins/echo")
    with (
        daemon(host_toml=SETTINGS % "h1", network=network) as first,
        daemon(host_toml=SETTINGS % "h2", network=network) as second,
    ):
        for d in (first, second):
            d.cli("plugin", "add", str(plugin), "--yes")
        held = wait_for(lambda: next((d for d in (first, second) if _is_held(d)), None), seconds(60))
        other = second if held is first else first
        for number in range(5):
            other.cli("event", "emit", "deploy.completed", event(number), "--wait")
        assert {r["data"]["outcome"] for r in held.records() if r["type"] == "event.response"} == {"ok"}
        assert not [r for r in other.records() if r["type"] == "event.dispatched"]
        held.kill()
        other.cli("event", "emit", "deploy.completed", event(5))
        wait_for(lambda: _is_held(other), seconds(90), "the plugin did not move")
        done = wait_for(lambda: [r for r in other.records() if r["type"] == "event.response"])
        assert [r["data"]["outcome"] for r in done] == ["ok"]
        held.start()
        held.cli("event", "emit", "deploy.completed", event(6), "--wait")
        wait_for(lambda: len([r for r in other.records() if r["type"] == "event.response"]) == 2)
