"""Each example plugin, run as a plain process and spoken to as the host would."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.examples.conftest import EXAMPLES, Starter, event
from tests.support.go import go_cache

PLUGINS = sorted(path.parent.name for path in EXAMPLES.glob("*/plugin.json"))
OTHERS = {"hostile", "python-stream-counter", "exec-lint", "flask-notifier", "mcp-github-like"}
ONESHOT = [name for name in PLUGINS if name not in OTHERS]
SOURCES = ("slack-notifier", "node-webhook.js", "main.go", "main.rs", "deploy-log", "page-report")


@dataclass
class Webhook:
    """An HTTPS server on loopback with a private authority; ``answer`` is the status it gives."""

    url: str
    ca: str
    answer: int = 200
    bodies: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture
def webhook(tmp_path: Path) -> Iterator[Webhook]:
    from certificates import issue

    issue(tmp_path, "localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "webhook.pem", tmp_path / "webhook.key")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            hook.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(hook.answer)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    class Server(ThreadingHTTPServer):
        address_family, *_, address = socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)[0]
        """Where a program goes first, and some nowhere else."""

    server = Server(Server.address[:2], Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    hook = Webhook(f"https://localhost:{server.server_port}/services/secret", str(tmp_path / "ca.pem"))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield hook
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled examples, copied and built aside: the tree may be read-only."""
    directory = tmp_path_factory.mktemp("built")
    environment = {**os.environ, "GOCACHE": go_cache(directory)}
    for folder, compiler in (("go-smoke-test", "go"), ("rust-deploy-stats", "rustc")):
        if shutil.which(compiler):
            shutil.copytree(EXAMPLES / folder, directory / folder)
            command = ["make", "-s", "-B", "-C", str(directory / folder)]
            subprocess.run(command, check=True, env=environment, timeout=300)
    return directory


def needs(folder: Path) -> str:
    if not folder.exists():
        pytest.skip(f"{folder.name} is not built: its compiler is not installed")
    return str(folder)


class TestEveryFolder:
    @pytest.mark.parametrize("name", PLUGINS)
    def test_has_a_manifest_that_names_it(self, name: str) -> None:
        manifest = json.loads((EXAMPLES / name / "plugin.json").read_text())
        assert manifest["name"] == name
        assert {"name", "version", "api_version", "binary", "hooks"} <= manifest.keys()

    @pytest.mark.parametrize("name", PLUGINS)
    def test_has_a_two_line_readme(self, name: str) -> None:
        assert len((EXAMPLES / name / "README.md").read_text().splitlines()) == 2

    @pytest.mark.parametrize("name", ONESHOT)
    def test_is_under_sixty_lines(self, name: str) -> None:
        sources = [path for path in (EXAMPLES / name).iterdir() if path.name in SOURCES]
        assert [len(path.read_text().splitlines()) < 60 for path in sources] == [True]


class TestSlackDeployNotifier:
    def test_posts_each_event(self, start: Starter, webhook: Webhook) -> None:
        plugin = start("slack-deploy-notifier", slack_webhook_url=webhook.url, ca_file=webhook.ca, channel="#ops")
        for method, further in (
            ("deploy.started", {}),
            ("deploy.completed", {"url": "https://shop.example", "duration_ms": 4200, "project_name": "shop"}),
            ("deploy.failed", {"error_code": "BUILD_FAILED"}),
        ):
            assert plugin.send(method, event(**further)) == {"status": "ok", "detail": "Slack answered 200"}
        assert [body["text"] for body in webhook.bodies] == [
            ":hourglass: proj_1 is being deployed (dep_1)",
            ":rocket: shop is live at https://shop.example after 4200 ms",
            ":x: proj_1 failed with BUILD_FAILED (dep_1)",
        ]
        assert {body["channel"] for body in webhook.bodies} == {"#ops"}

    def test_skips_an_event_it_has_no_text_for(self, start: Starter, webhook: Webhook) -> None:
        plugin = start("slack-deploy-notifier", slack_webhook_url=webhook.url)
        assert plugin.send("domain.added", event()) == {"status": "skipped"}

    @pytest.mark.parametrize(("answer", "status"), [(404, "rejected"), (503, "retry"), (429, "retry"), (408, "retry")])
    def test_tells_a_lasting_refusal_from_a_passing_one(
        self, start: Starter, webhook: Webhook, answer: int, status: str
    ) -> None:
        webhook.answer = answer
        plugin = start("slack-deploy-notifier", slack_webhook_url=webhook.url, ca_file=webhook.ca)
        assert plugin.send("deploy.started", event())["status"] == status

    def test_does_not_trust_an_unknown_authority(self, start: Starter, webhook: Webhook) -> None:
        plugin = start("slack-deploy-notifier", slack_webhook_url=webhook.url)
        result = plugin.send("deploy.started", event())
        assert result["status"] == "retry"
        assert "certificate" in result["message"]
        assert webhook.bodies == []

    def test_binds_again_where_it_was_killed(self, start: Starter, webhook: Webhook) -> None:
        plugin = start("slack-deploy-notifier", slack_webhook_url=webhook.url)
        plugin.process.kill()
        plugin.process.wait()
        Path(plugin.path).unlink()
        Path(plugin.path).touch()  # what a kill leaves: a name that nobody listens on
        again = subprocess.Popen(
            plugin.process.args,
            cwd=plugin.folder,
            env={"PLUGIN_SOCKET": plugin.path, "SLACK_WEBHOOK_URL": webhook.url},
        )
        plugin.process = again
        while not Path(plugin.path).is_socket():
            assert again.poll() is None
        assert plugin.send("domain.added", event()) == {"status": "skipped"}


class TestNodeWebhook:
    def test_forwards_the_event_without_what_is_the_hosts(self, start: Starter, webhook: Webhook) -> None:
        plugin = start("node-webhook", webhook_url=webhook.url, ca_file=webhook.ca)
        assert plugin.send("deploy.failed", event(error_code="E")) == {
            "status": "ok",
            "message": "webhook answered 200",
        }
        assert webhook.bodies == [
            {"event": "deploy.failed", "project_id": "proj_1", "deployment_id": "dep_1", "error_code": "E"}
        ]

    @pytest.mark.parametrize(("answer", "status"), [(404, "rejected"), (502, "retry"), (429, "retry"), (408, "retry")])
    def test_tells_a_lasting_refusal_from_a_passing_one(
        self, start: Starter, webhook: Webhook, answer: int, status: str
    ) -> None:
        webhook.answer = answer
        plugin = start("node-webhook", webhook_url=webhook.url, ca_file=webhook.ca)
        assert plugin.send("deploy.failed", event())["status"] == status


class TestGoSmokeTest:
    def test_fetches_the_address(self, start: Starter, built: Path) -> None:

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(418)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/"
            result = start(needs(built / "go-smoke-test")).send("deploy.completed", event(url=url))
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
        assert result["status"] == "ok"
        assert result["http"] == 418

    def test_retries_when_nothing_answers(self, start: Starter, built: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        result = start(needs(built / "go-smoke-test")).send("deploy.completed", event(url=f"http://127.0.0.1:{port}/"))
        assert result["status"] == "retry"
        assert "refused" in result["message"]


class TestRustDeployStats:
    def test_counts_each_event_by_itself(self, start: Starter, built: Path) -> None:
        plugin = start(needs(built / "rust-deploy-stats"))
        assert plugin.send("deploy.started", event()) == {"status": "ok", "count": 1}
        assert plugin.send("deploy.started", event(), number=8) == {"status": "ok", "count": 2}
        assert plugin.send("deploy.failed", event()) == {"status": "ok", "count": 1}
        assert (plugin.state / "deploy-started").read_text() == "2\n"

    def test_a_payload_cannot_fake_a_key(self, start: Starter, built: Path) -> None:
        plugin = start(needs(built / "rust-deploy-stats"))
        nasty = '","method":"deploy.failed","id":99,"x":"'
        assert plugin.send("deploy.started", event(commit_message=nasty)) == {"status": "ok", "count": 1}
        assert not (plugin.state / "deploy-failed").exists()


class TestShDeployLog:
    def test_keeps_a_line_per_event(self, start: Starter) -> None:
        plugin = start("sh-deploy-log")
        assert plugin.send("deploy.started", event()) == {"status": "ok", "lines": 1}
        assert plugin.send("deploy.completed", event()) == {"status": "ok", "lines": 2}
        lines = (plugin.state / "events.log").read_text().splitlines()
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ deploy.completed proj_1", lines[1])

    def test_a_payload_cannot_fake_a_key_or_a_line(self, start: Starter) -> None:
        plugin = start("sh-deploy-log")
        nasty = '\n","method":"domain.added","project_id":"fake","id":99,"x":"$(touch /tmp/x)`id`'
        assert plugin.send("deploy.started", event(commit_message=nasty)) == {"status": "ok", "lines": 1}
        assert (plugin.state / "events.log").read_text().endswith(" deploy.started proj_1\n")


class HostApi:
    """The host's end of the key-value store: what the example may rely on, no more."""

    def __init__(self, path: str) -> None:
        self.values: dict[str, Any] = {}
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(4)
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        connection, _ = self.listener.accept()
        with connection, connection.makefile("rwb") as file:
            for line in file:
                request = json.loads(line)
                params = request["params"]
                if request["method"] == "kv.set":
                    self.values[params["key"]] = params["value"]
                result = {"value": self.values.get(params["key"])}
                file.write(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": result}).encode() + b"\n")
                file.flush()

    def close(self) -> None:
        self.thread.join(5)
        self.listener.close()


class TestPythonStreamCounter:
    def test_counts_many_events_in_flight(self, start: Starter) -> None:
        plugin = start("python-stream-counter")
        api = HostApi(str(plugin.path).replace("plugin.sock", "host.sock"))
        with plugin.connect() as connection, connection.makefile("rwb") as file:

            def say(method: str, number: str, **params: Any) -> None:
                message = {"jsonrpc": "2.0", "method": method, "params": params, "id": number}
                file.write(json.dumps(message).encode() + b"\n")
                file.flush()

            say("host.hello", "h", protocol=["1"], hooks=["deploy.completed"])
            hello = json.loads(file.readline())
            assert hello["result"]["protocol"] == "1"
            for number in range(16):
                say("deploy.completed", f"e{number}", project_id=f"proj_{number % 2}")
            replies = [json.loads(file.readline()) for _ in range(16)]
            assert {reply["id"] for reply in replies} == {f"e{number}" for number in range(16)}
            assert sorted(reply["result"]["count"] for reply in replies) == sorted([*range(1, 9), *range(1, 9)])
            say("ping", "p")
            assert json.loads(file.readline())["result"] == {"status": "ok"}
        plugin.stop()
        api.close()
        assert api.values == {"deploy.completed/proj_0": 8, "deploy.completed/proj_1": 8}

    def test_asks_for_another_try_while_the_host_is_away(self, start: Starter) -> None:
        plugin = start("python-stream-counter")
        with plugin.connect() as connection, connection.makefile("rwb") as file:
            message = {"jsonrpc": "2.0", "method": "deploy.failed", "params": {"project_id": "p"}, "id": "e"}
            file.write(json.dumps(message).encode() + b"\n")
            file.flush()
            assert json.loads(file.readline())["error"]["code"] == -31000
