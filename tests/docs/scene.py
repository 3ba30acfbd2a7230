"""One daemon for the commands of all pages: the plugins that they name, and a shell in a folder with their files.

Commands run as they stand, but for ``sudo`` and for the places and ids that stand for the reader's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import tty
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from isolator.linux import netlink, netns
from tests.docs.blocks import ROOT, blocks
from tests.support.mcp_servers import server
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon, event, wait_for, write_plugin

READER = 61990
"""A user of the host whose files the scene's folder holds."""
HOST_TOML = f"""\
[roles]
viewer = [{READER}]
emitter = [{READER}]
runner = [{READER}]
caller = [{READER}]
[restart]
backoff_min = "0.1s"
[console]
port = 8090
emit = true
"""
SLACK = """\
    #!/usr/bin/python3
    import json, os, socket
    ANSWERS = {
        "later": {"status": "retry", "retry_after_ms": 600_000},
        "never": {"status": "rejected", "message": "it will never work"},
    }
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.environ["PLUGIN_SOCKET"])
    server.listen(1)
    while True:
        connection, _ = server.accept()
        request = json.loads(connection.recv(4096))
        print(request["method"], flush=True)
        answer = ANSWERS.get(request["params"].get("project_id").split("-")[0], {"status": "ok"})
        connection.sendall(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": answer}).encode() + b"\\n")
        connection.close()
"""
_ID = re.compile(r"ev_01a2…?|EVENT_ID")


@dataclass
class Scene:
    """The daemon, the folder in which commands run, and the event that they speak of."""

    daemon: Daemon
    folder: Path
    network: int
    event: str = ""
    user: int | None = None
    """Who runs the next commands; root if None."""
    _emitted: int = 0

    def emit(self, project: str, state: str) -> None:
        """Emit the event that commands speak of from now on: at ``slack`` it comes to ``state``."""
        self._emitted += 1
        payload = event(self._emitted, project_id=f"{project}-{self._emitted}")
        self.event = self.daemon.json("event", "emit", "deploy.completed", payload)["id"]
        wait_for(lambda: self.state() == state, what=lambda: f"{self.event} is {self.state()}")

    def state(self) -> str:
        """How its delivery at ``slack`` stands."""
        rows = self.daemon.json("event", "show", self.event)["deliveries"]
        return next(str(row["state"]) for row in rows if row["plugin"] == "slack")

    def version(self, number: str, **manifest: object) -> None:
        """A newer version of ``slack`` in a folder of its own."""
        write_slack(self.folder / f"slack-{number}", f"{number}.0", **manifest)

    def run(self, command: str, answer: str = "y") -> subprocess.CompletedProcess[str]:
        """Run one command to its end; ``answer`` is given to every question."""
        with self._begun(command, answer) as process:
            process.wait(seconds(90))
        return subprocess.CompletedProcess(command, process.returncode, self._output.read_text())

    def follow(self, command: str, seen: Callable[[str], bool]) -> subprocess.CompletedProcess[str]:
        """Run one command that does not end by itself until ``seen`` of its output, while events come; then Ctrl-C."""
        with self._begun(command) as process:

            def has_been_seen() -> bool:
                self.emit("shop", "ok")
                assert process.poll() is None, self._output.read_text()
                return seen(self._output.read_text())

            wait_for(has_been_seen, what=command)
            os.killpg(process.pid, signal.SIGINT)
            process.wait(seconds(30))
        return subprocess.CompletedProcess(command, process.returncode, self._output.read_text())

    @property
    def _output(self) -> Path:
        return self.daemon.root / "output"

    @contextlib.contextmanager
    def _begun(self, command: str, answer: str = "y") -> Iterator[subprocess.Popen[str]]:
        script = _ID.sub(self.event, command.replace("sudo ", ""))
        person, terminal = pty.openpty()
        tty.setraw(terminal)
        os.write(person, f"{answer}\n".encode() * 4)
        who = ["setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--clear-groups"] if self.user else []
        # Whoever runs the tests in the background has Ctrl-C ignored, also by what they start.
        enter = ["env", "--default-signal=INT", "nsenter", f"--net=/proc/{os.getpid()}/fd/{self.network}", *who]
        with self._output.open("w") as output:
            process = subprocess.Popen(
                [*enter, "bash", "-o", "pipefail", "-c", script],
                cwd=self.folder, stdin=terminal, stdout=output, stderr=output, text=True, start_new_session=True,
                env=self._environment(),
            )  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(terminal)
            os.close(person)

    def _environment(self) -> dict[str, str]:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "ISOLATOR_ROOT": str(self.daemon.root), "TOOL_CALL": "echo done >made"}


def write_slack(folder: Path, version: str, **manifest: object) -> Path:
    """A version of the plugin ``slack``."""
    body: Mapping[str, object] = {
        "name": "slack", "version": version, "hooks": ["deploy.completed", "deploy.failed"],
        "permissions": ["read:projects"], "sandbox": {"network": {"egress": []}},
        "config_schema": {"channel": {"type": "string"}, "api_key": {"type": "string", "secret": True}},
    }  # fmt: skip
    return write_plugin(folder, SLACK, **{**body, **manifest})


def write_plugin_of(page: str, folder: Path) -> None:
    """The first plugin of a page, from its own blocks: manifest and program."""
    found = {block.kind: block.body for block in reversed(blocks(ROOT / page))}
    folder.mkdir()
    (folder / "plugin.json").write_text(found["json"])
    program = folder / Path(json.loads(found["json"])["binary"]).name
    program.write_text(found["python"])
    program.chmod(0o755)


@contextlib.contextmanager
def scene() -> Iterator[Scene]:
    """Everything that the pages name."""
    network = netns.in_new_network(netns.current_network)
    netns.in_network(network, netlink.bring_up_loopback)
    try:
        with daemon(host_toml=HOST_TOML, network=network) as d:
            folder = d.root / "reader"
            folder.mkdir()
            _write_files(folder)
            os.chown(folder, READER, READER)
            d.cli("plugin", "add", str(write_slack(folder / "slack-1.0", "1.0.0")), "--yes")
            github = write_plugin(folder / "github", server(), hooks=[], transport={"mode": "mcp"})
            d.cli("plugin", "add", str(github), "--yes")
            made = Scene(d, folder, network)
            made.emit("shop", "ok")
            yield made
    finally:
        os.close(network)


def _write_files(folder: Path) -> None:
    shutil.copytree(ROOT / "policies", folder / "policies")
    for name in ("slack-deploy-notifier", "hostile"):
        shutil.copytree(ROOT / "examples" / name, folder / "examples" / name)
    texts = {
        "payload.json": event("payload"), "key.txt": "a-secret-key\n",
        "isolator.pass": "a long enough passphrase\n", "weather.env": "TOKEN=sunny\n", "server.py": "print('up')\n",
        "Makefile": "all:\n\t@echo built\n",
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "isolator.pass").chmod(0o600)
    write_plugin_of("docs/plugins.md", folder / "deploy-bell")
    # The other host, which is this one: what stands in its line is done.
    (folder / "bin").mkdir()
    (folder / "bin/ssh").write_text('#!/bin/sh\nshift\nexec sh -c "$*"\n')
    (folder / "bin/ssh").chmod(0o755)
