"""The other side is away for a while: no event of an example or template is lost, nor is any set aside."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import ssl
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from host.client.client import Client
from tests.support.go import go_cache
from tests.support.internet_servers import WEB, Server
from tests.support.pretend_internet import PretendInternet, pretend_internet
from tests.support.processes import children
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon, event, wait_for

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
HOST, PORT, PLAIN_PORT, EVENTS = "hooks.example.com", 8443, 8081, 3
AWAY_HOST = "away.example.com"
"""The deployed site, which nobody knows until the outage is over."""
TOML = f'[network]\nresolvers = ["{WEB}"]\n'
STORE = "var/lib/isolator/host/host.db"
TOOLS = {"python": "python3", "node": "node", "go": "go", "rust": "rustc", "sh": "curl"}
WORK = {
    "python": {
        "import json\n": "import urllib.request\n",
        "def handle(method, params):\n": "    urllib.request.urlopen('URL', b'{}', timeout=8).close()\n",
    },
    "node": {
        "async function handle(method, params) {\n": """
          await new Promise((resolve, reject) => {
            const options = { method: "POST", headers: { "Content-Length": 2 }, timeout: 8000 };
            const outgoing = require("http").request("URL", options, (answer) => {
              answer.resume();
              answer.statusCode === 200 ? resolve() : reject(new Error(answer.statusCode));
            });
            outgoing.on("error", reject).on("timeout", () => outgoing.destroy(new Error("timeout"))).end("{}");
          });\n""",
    },
    "go": {
        '"net"\n': '"net/http"\n"strings"\n',
        "func handle(method string, params map[string]any) map[string]any {\n": """
            answer, err := http.Post("URL", "application/json", strings.NewReader("{}"))
            if err != nil { panic(err) }
            answer.Body.Close()
            if answer.StatusCode != 200 { panic(answer.Status) }\n""",
    },
    "rust": {
        "fn handle(method: &str, line: &str) -> &'static str {\n": """
            let (host, path) = "URL"[7..].split_once('/').unwrap();
            let mut server = std::net::TcpStream::connect(host).unwrap();
            let request = format!("POST /{path} HTTP/1.0\\r\\nHost: {host}\\r\\nContent-Length: 2\\r\\n\\r\\n{{}}");
            server.write_all(request.as_bytes()).unwrap();
            let mut status = String::new();
            BufReader::new(server).read_line(&mut status).unwrap();
            assert!(status.contains(" 200 "), "{status}");\n""",
    },
    "sh": {"# Do the work here.": "\ncurl -sSf -m 8 -d '{}' URL >&2\n#"},
}  # fmt: skip
"""Work for each template: a place in it, and what comes after it."""
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
        pretend.internet.servers.append(Server(pretend.internet.bound("0.0.0.0", PLAIN_PORT), Handler))


def _edited(folder: Path, port: int, *, connects: bool = False) -> Path:
    """The folder, whose manifest has this test's host in place of its own, and what its Makefile makes."""
    file = folder / "plugin.json"
    manifest = json.loads(file.read_text())
    network = manifest["sandbox"].get("network", {})
    if connects or network.get("egress"):
        network["egress"] = [{"host": HOST, "ports": [port]}]
    file.write_text(json.dumps(manifest))
    if (folder / "Makefile").exists():
        cache = {"GOCACHE": go_cache(folder.parent), "GOPATH": str(folder.parent / "go")}
        subprocess.run(["make", "-s", "-B", "-C", folder], check=True, env={**os.environ, **cache})
    return folder


def _example(folder: Path, name: str) -> Path:
    """An example's folder, with this test's host in place of its own."""
    shutil.copytree(EXAMPLES / name, folder / name)
    return _edited(folder / name, PORT)


def _template(folder: Path, language: str) -> Path:
    """What ``isolator new`` makes, with work filled in as an author would: a request that has to succeed."""
    made = folder / f"{language}-template"
    subprocess.run(["isolator", "new", made, "--lang", language], check=True, capture_output=True)
    file = next(path for path in made.iterdir() if path.name.split(".")[0] in (made.name, "main"))
    text = file.read_text()
    for place, work in WORK[language].items():
        assert place in text, f"the template has no {place!r}"
        text = text.replace(place, place + work.replace("URL", f"http://{HOST}:{PLAIN_PORT}/{language}"), 1)
    file.write_text(text)
    return _edited(made, PLAIN_PORT, connects=True)


def _deliveries(d: Daemon) -> list[dict[str, Any]]:
    with Client(d.root) as client:
        return [one for row in client.call("event.list", limit=50)["events"] for one in row["deliveries"]]


def _attempts(d: Daemon) -> dict[str, list[int]]:
    """Attempts so far, by plugin."""
    found: dict[str, list[int]] = {}
    for delivery in _deliveries(d):
        found.setdefault(delivery["plugin"], []).append(delivery["attempts"])
    return found


def _tried(d: Daemon, plugins: int, times: int) -> bool:
    attempts = _attempts(d)
    return len(attempts) == plugins and all(len(n) == EVENTS and min(n) >= times for n in attempts.values())


def _all_done(d: Daemon) -> bool:
    return all(delivery["state"] == "ok" for delivery in _deliveries(d))


def _nothing_lost(d: Daemon) -> None:
    assert not [r["type"] for r in d.records() if r["type"] in ("event.dead", "event.quarantined", "plugin.failed")]


def _outage(
    pretend: PretendInternet, d: Daemon, tmp_path: Path, examples: dict[str, str], languages: list[str], times: int
) -> None:
    """Add the plugins, and end the outage when each event was tried so many times; examples have a key for the URL."""
    side = _OtherSide(pretend)
    webhook, ca = f"https://{HOST}:{PORT}/hook", str(pretend.directory / "ca.pem")
    for name, key in examples.items():
        config = ["--config", f"{key}={webhook}", "--config", f"ca_file=@{ca}"] if key else []
        d.cli("plugin", "add", str(_example(tmp_path, name)), *config, "--yes")
    for language in languages:
        d.cli("plugin", "add", str(_template(tmp_path, language)), "--yes")
    plugins = len(examples) + len(languages)
    for number in range(EVENTS):
        d.cli("event", "emit", "deploy.completed", event(number, project_id=f"p{number}", url=f"http://{AWAY_HOST}/"))
    wait_for(lambda: _tried(d, plugins, times), seconds(200), f"not tried {times} times")
    side.state = "up"
    pretend.internet.dns.records[AWAY_HOST] = [WEB]
    wait_for(lambda: _all_done(d), seconds(200), lambda: d.cli("event", "list").stdout)
    senders = sum(bool(key) for key in examples.values()) + len(languages)
    assert side.turned_away >= times * senders
    assert len(side.bodies) >= EVENTS * senders
    _nothing_lost(d)


def test_outage_of_the_other_side_loses_no_event_of_an_example(pretend: PretendInternet, tmp_path: Path) -> None:
    with daemon(host_toml=TOML, network=pretend.host_fd) as d:
        _outage(pretend, d, tmp_path, {"slack-deploy-notifier": "slack_webhook_url"}, [], 2)


@pytest.mark.wide
def test_outage_of_twenty_seconds_loses_no_event_of_any_example_or_template(
    pretend: PretendInternet, tmp_path: Path
) -> None:
    """Five attempts take some twenty seconds with the pauses between them."""
    needs = {"node-webhook": "node", "go-smoke-test": "go"}
    examples = {"slack-deploy-notifier": "slack_webhook_url", "node-webhook": "webhook_url", "go-smoke-test": ""}
    examples = {name: key for name, key in examples.items() if name not in needs or shutil.which(needs[name])}
    languages = [language for language, tool in TOOLS.items() if shutil.which(tool)]
    with daemon(host_toml=TOML, network=pretend.host_fd) as d:
        _outage(pretend, d, tmp_path, examples, languages, 5)


@pytest.mark.wide
def test_outage_of_a_disk_loses_no_event_of_an_example_that_keeps_state(tmp_path: Path) -> None:
    plugins = ["sh-deploy-log", *(["rust-deploy-stats"] if shutil.which("rustc") else [])]
    with daemon() as d:
        for name in plugins:
            d.cli("plugin", "add", str(_example(tmp_path, name)), "--yes")
        d.cli("event", "emit", "deploy.completed", event("first"), "--wait")
        states = [d.root / f"var/lib/isolator/state/{name}/mnt" for name in plugins]
        for state in states:  # what a kernel does on an error of the disk
            wait_for(lambda state=state: _remounted(state, "ro"), what=f"{state} stays in use")
        for number in range(EVENTS):
            d.cli("event", "emit", "deploy.completed", event(number, project_id=f"p{number}"))
        wait_for(lambda: sum(min(n) >= 1 and sorted(n)[1] >= 5 for n in _attempts(d).values()) == len(plugins),
                 seconds(200), "not tried five times")  # fmt: skip
        for state in states:
            assert _remounted(state, "rw")
        wait_for(lambda: _all_done(d), seconds(200), lambda: d.cli("event", "list").stdout)
        assert (states[0] / "state/events.log").read_text().count("deploy.completed") == EVENTS + 1
        if len(states) > 1:
            assert (states[1] / "state/deploy-completed").read_text() == f"{EVENTS + 1}\n"
        _nothing_lost(d)


def _remounted(mount: Path, how: str) -> bool:
    return subprocess.run(["mount", "-o", f"remount,{how}", mount], check=False, capture_output=True).returncode == 0


@pytest.mark.wide
def test_outage_of_the_hosts_store_loses_no_event_of_a_stream(tmp_path: Path) -> None:
    """The host's store can be read, but takes no write, until a call of the plugin has failed by it."""
    with daemon() as d:
        d.cli("plugin", "add", str(_example(tmp_path, "python-stream-counter")), "--yes")
        d.cli("event", "emit", "deploy.completed", event("first", project_id="first"), "--wait")
        [row] = d.json("plugin", "list")
        inside = [row["pid"], *children(row["pid"])]
        for pid in inside:
            os.kill(pid, signal.SIGSTOP)
        for number in range(EVENTS):
            d.cli("event", "emit", "deploy.completed", event(number, project_id=f"p{number}"))
        wait_for(lambda: all(n for n in _attempts(d)["python-stream-counter"]))
        with contextlib.closing(sqlite3.connect(d.root / STORE, isolation_level=None)) as store:
            store.execute("BEGIN IMMEDIATE")
            for pid in inside:
                os.kill(pid, signal.SIGCONT)
            # The host's refusal, or on a slow machine the plugin's own patience, which is shorter than an event's.
            failed = re.compile(r" (RuntimeError|TimeoutError)\b")
            wait_for(lambda: failed.search(_log(d)), seconds(60), "no call has failed")
            store.execute("ROLLBACK")
        wait_for(lambda: _all_done(d), seconds(120), lambda: d.cli("event", "list").stdout)
        last = [json.loads(x["reply"])["result"] for row in d.json("event", "list") for x in row["deliveries"]]
        # A call that was given up may have been done all the same, and its event is counted once more then.
        most = 2 if " TimeoutError" in _log(d) else 1
        assert len(last) == EVENTS + 1 and {result["count"] for result in last} <= {1, most}
        _nothing_lost(d)


def _log(d: Daemon) -> str:
    return d.cli("plugin", "logs", "python-stream-counter").stdout
