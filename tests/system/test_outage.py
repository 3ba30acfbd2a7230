"""The other side is away for a while: no event of an example is lost, nor is any set aside."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from tests.support.internet_servers import WEB, Server
from tests.support.pretend_internet import PretendInternet, pretend_internet
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon, event, wait_for

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
HOST, PORT, EVENTS = "hooks.example.com", 8443, 3
AWAY = ("refused", "silent", "503", "429")
"""What the other side does while it is away, in turns; in the end, nobody knows its name."""


@pytest.fixture
def pretend() -> Iterator[PretendInternet]:
    with pretend_internet() as made:
        yield made


class _OtherSide:
    """A webhook with ``state``: what it does with a request; ``bodies`` are those that it took."""

    def __init__(self, pretend: PretendInternet) -> None:
        self.state, self.bodies, self.turned_away = "away", [], 0
        side = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if side.state != "up":
                    how = AWAY[side.turned_away % len(AWAY)]
                    side.turned_away += 1
                    if how.isdigit():
                        self.send_error(int(how))
                    else:
                        self.close_connection = True
                    return
                side.bodies.append(body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pretend.directory / "ca.pem", pretend.directory / "key.pem")
        pretend.internet.servers.append(Server(pretend.internet.bound("0.0.0.0", PORT), Handler, context))


def _example(folder: Path, name: str) -> Path:
    """An example's folder, with this test's host in place of its own."""
    shutil.copytree(EXAMPLES / name, folder / name)
    file = folder / name / "plugin.json"
    manifest = json.loads(file.read_text())
    if egress := manifest["sandbox"].get("network", {}).get("egress"):
        manifest["sandbox"]["network"]["egress"] = [egress[0] | {"host": HOST, "ports": [PORT]}]
    file.write_text(json.dumps(manifest))
    if (folder / name / "Makefile").exists():
        cache = {"GOCACHE": str(folder / "cache"), "GOPATH": str(folder / "go")}
        subprocess.run(["make", "-s", "-B", "-C", folder / name], check=True, env={**os.environ, **cache})
    return folder / name


def _attempts(d: Daemon) -> dict[str, list[int]]:
    """Attempts so far, by plugin."""
    found: dict[str, list[int]] = {}
    for row in d.json("event", "list", "--limit", "50"):
        for delivery in row["deliveries"]:
            found.setdefault(delivery["plugin"], []).append(delivery["attempts"])
    return found


def _tried(d: Daemon, plugins: int) -> bool:
    attempts = _attempts(d)
    return len(attempts) == plugins and all(len(n) == EVENTS and min(n) >= 5 for n in attempts.values())


def test_outage_of_the_other_side_loses_no_event_of_an_example(pretend: PretendInternet, tmp_path: Path) -> None:
    """It is over when each event was tried five times, some twenty seconds."""
    side = _OtherSide(pretend)
    webhook, ca = f"https://{HOST}:{PORT}/hook", str(pretend.directory / "ca.pem")
    plugins = {"slack-deploy-notifier": "slack_webhook_url"}
    plugins |= {"node-webhook": "webhook_url"} if shutil.which("node", path="/usr/bin") else {}
    plugins |= {"go-smoke-test": ""} if shutil.which("go") else {}
    toml = f'[network]\nresolvers = ["{WEB}"]\n'
    with daemon(host_toml=toml, network=pretend.host_fd) as d:
        for name, key in plugins.items():
            config = ["--config", f"{key}={webhook}", "--config", f"ca_file=@{ca}"] if key else []
            d.cli("plugin", "add", str(_example(tmp_path, name)), *config, "--yes")
        for number in range(EVENTS):
            d.cli(
                "event",
                "emit",
                "deploy.completed",
                event(number, project_id=f"p{number}", url="http://away.example.com/"),
            )
        wait_for(lambda: _tried(d, len(plugins)), seconds(120), "not tried five times")
        side.state = "up"
        pretend.internet.dns.records["away.example.com"] = [WEB]

        def done() -> bool:
            rows = d.json("event", "list", "--limit", "50")
            return all(delivery["state"] == "ok" for row in rows for delivery in row["deliveries"])

        wait_for(done, seconds(120), d.cli("event", "list").stdout)
        assert side.turned_away >= 5
        assert len(side.bodies) >= EVENTS * sum(bool(key) for key in plugins.values())
        assert not [r["type"] for r in d.records() if r["type"] in ("event.dead", "event.quarantined", "plugin.failed")]
