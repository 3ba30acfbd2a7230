"""The way out of a whole daemon's cages when something breaks: the broker dies, the cage's rules are flushed."""

from __future__ import annotations

import os
import subprocess
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dns.message
import pytest

from tests.support.internet_servers import OTHER, WEB
from tests.support.pretend_internet import PretendInternet, pretend_internet
from tests.system.daemon import ECHO, Daemon, daemon, event, kill_9, wait_for, write_plugin

HOST_TOML = f'[network]\nresolvers = ["{WEB}"]\n[restart]\nbackoff_min = "0.1s"\n'
POLICY = '[grant]\nhooks = ["deploy.*"]\negress = ["hooks.example.com:7"]\n[limits]\nconnects_per_second = 100\n'

QUESTION = dns.message.make_query("stolen.example.com", "A").to_wire().hex()

# Threads: one holds a connection, one makes new ones all the time, one tries what is not granted.
TRAFFIC = (
    """
    import threading, time
    log = open(os.environ["PLUGIN_STATE_DIR"] + "/log", "a", buffering=1)
    def say(what, action):
        start = time.monotonic()
        try:
            result = action()
        except OSError as error:
            result = type(error).__name__
        print(what, result, round(time.monotonic() - start, 2), file=log)
    def talk(address, port):
        with socket.create_connection((address, port), 5) as s:
            s.sendall(b"x")
            return "ok" if s.recv(1) == b"x" else "closed"
    def hold(address):
        with socket.create_connection((address, 7), 5) as s:
            s.settimeout(None)
            return s.recv(1) or "closed"
    def steal():
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        s.settimeout(0.05)
        s.sendto(bytes.fromhex("QUESTION"), ("WEB", 53))
        return "ok" if s.recv(100) else "empty"
    def forever(what, action):
        while True:
            say(what, action)
            time.sleep(0.03)
    address = socket.gethostbyname("hooks.example.com")
    threading.Thread(target=say, args=("held", lambda: hold(address)), daemon=True).start()
    threading.Thread(target=forever, args=("granted", lambda: talk(address, 7)), daemon=True).start()
    threading.Thread(target=forever, args=("tcp", lambda: talk("OTHER", 7)), daemon=True).start()
    threading.Thread(target=forever, args=("udp", steal), daemon=True).start()
""".replace("WEB", WEB)
    .replace("OTHER", OTHER)
    .replace("QUESTION", QUESTION)
)
SCRIPT = ECHO.replace('    path = os.environ["PLUGIN_SOCKET"]\n', f'{TRAFFIC}    path = os.environ["PLUGIN_SOCKET"]\n')


@pytest.fixture(scope="module")
def pretend() -> Iterator[PretendInternet]:
    with pretend_internet() as made:
        yield made


@pytest.fixture
def busy(pretend: PretendInternet, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon with one plugin in the middle of its traffic."""
    folder = write_plugin(
        tmp_path / "busy", SCRIPT,
        sandbox={"network": {"egress": [{"host": "hooks.example.com", "ports": [7]}]}},
    )  # fmt: skip
    pretend.internet.dns.queries.clear()
    with daemon(host_toml=HOST_TOML, network=pretend.host_fd) as d:
        policies = d.root / "etc/isolator/policies"
        policies.mkdir(parents=True, exist_ok=True)
        (policies / "busy.toml").write_text(POLICY)
        d.cli("plugin", "add", str(folder), "--yes")
        d.cli("event", "emit", "deploy.completed", event(1), "--wait")
        wait_for(lambda: [line for line in lines(d) if line[:2] == ["granted", "ok"]], what="no traffic")
        yield d


def lines(d: Daemon) -> list[list[str]]:
    """What the plugin's attempts came to so far: kind, result, seconds."""
    return [line.split() for line in d.noted("busy", "log")]


def records(d: Daemon, type: str) -> list[dict[str, Any]]:
    return [r for r in d.records() if r["type"] == type]


def test_broker_killed_under_traffic(busy: Daemon) -> None:
    run = busy.json("plugin", "show", "busy")["run"]
    broker = busy.service_pid("isolator.broker.service")
    before = len(lines(busy))
    kill_9(broker)

    def refused_then_served() -> bool:
        results = [line[1] for line in lines(busy)[before:] if line[0] == "granted"]
        return "ConnectionRefusedError" in results and "ok" in results[results.index("ConnectionRefusedError") :]

    wait_for(refused_then_served, what=lambda: f"{lines(busy)[before:]} {busy.log.read_text()}")
    after = [line for line in lines(busy)[before:] if line[0] in ("granted", "held")]
    # Never a hang (5 s would be a TimeoutError): refused, reset in the middle, or served.
    assert {line[1] for line in after} <= {"ok", "ConnectionRefusedError", "ConnectionResetError", "closed"}
    assert [line for line in after if line[0] == "held"], "the held connection did not end with the broker"
    assert busy.json("plugin", "show", "busy")["run"] == run, "the sidecar was restarted for no reason"
    assert not [line for line in lines(busy) if line[0] in ("tcp", "udp") and line[1] == "ok"]
    busy.cli("audit", "verify")


def test_flushed_rules_end_the_run_and_let_nothing_out(busy: Daemon, pretend: PretendInternet) -> None:
    (started,) = records(busy, "plugin.started")
    pid = started["data"]["pid"]
    subprocess.run(["nsenter", f"--net=/proc/{pid}/ns/net", "nft", "flush", "ruleset"], check=True)
    ended = wait_for(lambda: records(busy, "plugin.crashed") + records(busy, "plugin.stopped"), what="it went on")
    assert (ended[0]["run"], ended[0]["data"]["cause"]) == (started["run"], "its network rules were changed")
    wait_for(
        lambda: [r for r in records(busy, "net.denied") if r["data"]["rule"] == "ruleset-changed"],
        what="the change itself is not on record",
    )
    again = wait_for(lambda: records(busy, "plugin.started")[1:], what="it was not started again")[0]
    rules = subprocess.run(
        ["nsenter", f"--net=/proc/{again['data']['pid']}/ns/net", "nft", "list", "ruleset"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert "table inet isolator" in rules and "policy drop" in rules
    count = len(lines(busy))
    wait_for(lambda: [line for line in lines(busy)[count:] if line[:2] == ["granted", "ok"]], what="no traffic again")
    stolen = [line for line in lines(busy) if line[0] in ("tcp", "udp") and line[1] == "ok"]
    assert not stolen and "stolen.example.com" not in pretend.internet.dns.queries
    # That the attempts are able to succeed is seen on the host itself, where there is no cage.
    attempts = f'    say("tcp", lambda: talk("{OTHER}", 7))\n    say("udp", steal)\n'
    functions = SCRIPT.split("    address =")[0].replace("settimeout(0.05)", "settimeout(10)")
    outside = _on_the_host(pretend, functions + attempts)
    assert [line.split()[1] for line in outside.splitlines()] == ["ok", "ok"]


def _on_the_host(pretend: PretendInternet, script: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["nsenter", f"--net=/proc/{os.getpid()}/fd/{pretend.host_fd}", "/usr/bin/python3", "-c",
             textwrap.dedent(script)],
            check=True, env={"PLUGIN_STATE_DIR": folder},
        )  # fmt: skip
        return (Path(folder) / "log").read_text()
