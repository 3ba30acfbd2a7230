"""A host port that leads to a plugin: within the host's ceiling, while the plugin runs, and on record."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolator.linux import netlink, netns
from tests.support.timeouts import seconds
from tests.system.daemon import ECHO, Daemon, daemon, event, kill_9, wait_for, write_plugin

SERVER = ECHO.replace(
    '    path = os.environ["PLUGIN_SOCKET"]\n',
    """    import threading
    def serve():
        web = socket.create_server(("127.0.0.1", 3000))
        while True:
            connection, _ = web.accept()
            connection.sendall(b"you said " + connection.recv(100))
            connection.close()
    threading.Thread(target=serve, daemon=True).start()
    path = os.environ["PLUGIN_SOCKET"]
""",
)
HOST_TOML = '[inbound]\nports = [8080]\n[restart]\ncrashes = 2\nbackoff_min = "0.1s"\n'
POLICY = '[grant]\nhooks = ["deploy.*"]\nlisten = ["8080:3000"]\n'


@pytest.fixture
def network() -> Iterator[int]:
    fd = netns.in_new_network(netns.current_network)
    netns.in_network(fd, netlink.bring_up_loopback)
    yield fd
    os.close(fd)


def talk(network: int) -> bytes:
    """Connect to the port on the host; what came back, or the error's name."""

    def client() -> bytes:
        try:
            with socket.create_connection(("127.0.0.1", 8080), 10) as sock:
                sock.sendall(b"hello")
                return b"".join(iter(lambda: sock.recv(100), b""))
        except OSError as error:
            return type(error).__name__.encode()

    return netns.in_network(network, client)


def registered(d: Daemon, folder: Path, policy: str = POLICY) -> None:
    (d.root / "etc/isolator/policies").mkdir(exist_ok=True, parents=True)
    (d.root / "etc/isolator/policies" / f"{folder.name}.toml").write_text(policy)
    d.cli("plugin", "add", str(folder), "--yes")


def test_a_forwarded_port_lives_and_dies_with_the_plugin(tmp_path: Path, network: int) -> None:
    with daemon(host_toml=HOST_TOML, network=network) as d:
        registered(d, write_plugin(tmp_path / "web", SERVER))
        assert talk(network) == b"ConnectionRefusedError"  # not started yet
        d.cli("event", "emit", "deploy.completed", event(1), "--wait")
        wait_for(lambda: talk(network) == b"you said hello", what="nothing came through the port")
        run = d.json("plugin", "show", "web")["run"]
        kill_9(d.service_pid("isolator.broker.service"))
        wait_for(lambda: talk(network) == b"you said hello", what="the port did not come back with the broker")
        assert d.json("plugin", "show", "web")["run"] == run, "the sidecar was restarted for no reason"
        d.cli("plugin", "stop", "web")
        assert talk(network) == b"ConnectionRefusedError"
        inward = [r for r in d.records() if r["data"].get("direction") == "in"]
        allowed = [r for r in inward if r["type"] == "net.connect" and r["data"]["verdict"] == "allowed"]
        assert allowed and {r["plugin"] for r in allowed} == {"web"} and {r["run"] for r in allowed} == {run}
        assert {r["data"]["rule"] for r in allowed} == {"listen 127.0.0.1:8080:3000"}
        d.cli("audit", "verify")


def test_a_taken_port_stops_the_start_with_one_clear_line(tmp_path: Path, network: int) -> None:
    taken = netns.in_network(network, lambda: socket.create_server(("127.0.0.1", 8080)))
    patient = '[inbound]\nports = [8080]\n[restart]\ncrashes = 1\nbackoff_min = "1m"\n'
    with taken, daemon(host_toml=patient, network=network) as d:
        registered(d, write_plugin(tmp_path / "web", SERVER))
        result = d.cli("plugin", "start", "web", code=None)
        assert result.returncode != 0
        assert "127.0.0.1:8080: another program listens there already" in d.json("plugin", "show", "web")["error"]
        taken.close()
        # An operator's start ends the pause, and is not answered with the outcome of an earlier attempt.
        d.cli("plugin", "start", "web")
        wait_for(lambda: talk(network) == b"you said hello")


def test_stop_ends_a_start_that_somebody_waits_for(tmp_path: Path, network: int) -> None:
    taken = netns.in_network(network, lambda: socket.create_server(("127.0.0.1", 8080)))
    patient = '[inbound]\nports = [8080]\n[restart]\ncrashes = 100\nbackoff_min = "1m"\n'
    with taken, daemon(host_toml=patient, network=network) as d:
        registered(d, write_plugin(tmp_path / "web", SERVER))
        starting = d.begin("plugin", "start", "web")
        wait_for(lambda: d.json("plugin", "show", "web")["state"] == "backoff")
        d.cli("plugin", "stop", "web")
        _, told = starting.communicate(timeout=seconds(60))
        assert starting.returncode == 1 and told.startswith("isolator: plugin web: "), told
        assert d.json("plugin", "show", "web")["state"] == "stopped"


def test_a_port_over_the_ceiling_is_refused(tmp_path: Path, network: int) -> None:
    with daemon(host_toml='[inbound]\nports = ["9000-9001"]\n', network=network) as d:
        folder = write_plugin(tmp_path / "web", SERVER)
        policies = d.root / "etc/isolator/policies"
        policies.mkdir(exist_ok=True, parents=True)
        (policies / "web.toml").write_text(POLICY)
        result = d.cli("plugin", "add", str(folder), "--yes", code=None)
        assert result.returncode != 0 and "is not open to plugins" in result.stderr, result.stderr
