"""A daemon on a root of its own, inside a network namespace of its own, and the command line that talks to it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support import commands
from tests.support.leftovers import new_root
from tests.support.processes import stat, state
from tests.support.timeouts import seconds

EVENT = {"project_id": "p1", "deployment_id": "d1", "url": "https://app.example/", "duration_ms": 12}

ECHO = """\
    #!/usr/bin/python3
    import json, os, socket
    path = os.environ["PLUGIN_SOCKET"]
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(1)
    while True:
        connection, _ = server.accept()
        request = json.loads(connection.recv(4096))
        params = request["params"]
        with open(os.environ["PLUGIN_STATE_DIR"] + "/seen", "a") as seen:
            seen.write(params["deployment_id"] + "\\n")
        reply = {"jsonrpc": "2.0", "id": request["id"], "result": {"status": "ok", "echo": params["deployment_id"]}}
        connection.sendall(json.dumps(reply).encode() + b"\\n")
        connection.close()
"""


class Daemon:
    """One ``isolator serve`` and its root."""

    def __init__(self, root: Path, *, host_toml: str = "", network: int | None = None) -> None:
        self.root = root
        self._enter = ["unshare", "-n"] if network is None else ["nsenter", f"--net=/proc/{os.getpid()}/fd/{network}"]
        self.process: subprocess.Popen[bytes] | None = None
        self.log = root / "serve.log"
        self.stdin = subprocess.DEVNULL
        if host_toml:
            etc = root / "etc/isolator"
            etc.mkdir(parents=True)
            (etc / "host.toml").write_text(textwrap.dedent(host_toml))

    def command(self) -> list[str]:
        """What is started; for subclasses that put a double in its place."""
        return ["isolator", "--root", str(self.root), "serve"]

    def start(self, timeout: float = seconds(30)) -> None:
        """Start it and wait for its ``ready``."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._enter, *self.command()], stdout=subprocess.PIPE, stderr=log,
                stdin=self.stdin,
            )  # fmt: skip
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], timeout)
        line = self.process.stdout.readline() if readable else b"(nothing)"
        assert line == b"isolator: ready\n", (line, self.log.read_text())

    def stop(self, timeout: float = seconds(40)) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(timeout)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process = None
        return code

    def kill(self) -> None:
        """SIGKILL to the supervisor alone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process = None

    def cli(self, *words: str, code: int | None = 0, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run one command; ``code`` is the exit code it must have (None: any)."""
        result = commands.run(["--root", str(self.root), *words], stdin=stdin, timeout=seconds(90))
        if code is not None:
            assert result.returncode == code, (words, result.returncode, result.stdout, result.stderr)
        return result

    def begin(self, *words: str) -> subprocess.Popen[str]:
        """Begin one command; its output is read by the caller."""
        command = ["isolator", "--root", str(self.root), *words]
        return subprocess.Popen(
            command, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def json(self, *words: str, code: int | None = 0) -> Any:
        """The same with ``--json``, parsed."""
        return json.loads(self.cli(*words, "--json", code=code).stdout)

    def records(self) -> list[dict[str, Any]]:
        """The whole trail; what has just happened is in it a few milliseconds later, when the writer commits again."""
        path = self.root / "var/log/isolator/audit/audit.jsonl"
        written, end = path.read_bytes(), time.monotonic() + seconds(1)
        while time.monotonic() < end:
            time.sleep(seconds(0.06))  # some commits of a quiet trail, whose writer tells nobody here of one
            before, written = written, path.read_bytes()
            if written == before:
                break
        return [json.loads(line) for line in written[: written.rfind(b"\n") + 1].splitlines()]

    def state_of(self, plugin: str) -> Path:
        """What a plugin sees as its own folder."""
        return self.root / f"var/lib/isolator/state/{plugin}/mnt/state"

    def noted(self, plugin: str, file: str = "seen") -> list[str]:
        """The whole lines that a plugin has written into a file of its own so far."""
        with contextlib.suppress(OSError):
            return (self.state_of(plugin) / file).read_text().split("\n")[:-1]
        return []

    def service_pid(self, module: str, *, missing_ok: bool = False) -> int:
        """The pid of one of this daemon's processes, found among the supervisor's children.

        The process that is parked for the next cage has the launcher's command line, and a PID namespace of its own.
        """
        assert self.process is not None
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                parent = int(stat(int(entry.name))[1])
                named = parent == self.process.pid and any(module.encode() in word for word in words)
                if named and os.path.samefile(entry / "ns/pid", f"/proc/{self.process.pid}/ns/pid"):
                    return int(entry.name)
        if missing_ok:
            return 0
        raise AssertionError(f"no {module} below {self.process.pid}")

    def purge(self) -> None:
        """Stop what runs and remove every trace."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stop()
        if self.process is not None:
            self.kill()
        self.cli("uninstall", "--purge", "--yes")
        shutil.rmtree(self.root, ignore_errors=True)


@contextlib.contextmanager
def daemon(
    *, host_toml: str = "", start: bool = True, network: int | None = None, kind: type[Daemon] | None = None
) -> Iterator[Daemon]:
    """A running daemon that leaves nothing behind; in a network namespace of its own, or in that of a descriptor."""
    root = new_root("system")
    made = (kind or Daemon)(root, host_toml=host_toml, network=network)
    try:
        if start:
            made.start()
        yield made
    finally:
        made.purge()


def write_plugin(folder: Path, script: str = ECHO, **manifest: Any) -> Path:
    """A plugin folder with one Python script."""
    folder.mkdir(parents=True, exist_ok=True)
    body = {
        "name": folder.name,
        "version": "1.0.0",
        "api_version": "1",
        "binary": "./main",
        "hooks": ["deploy.completed"],
    }
    (folder / "plugin.json").write_text(json.dumps(body | manifest))
    (folder / "main").write_text(textwrap.dedent(script))
    (folder / "main").chmod(0o755)
    return folder


def event(number: int | str, **more: Any) -> str:
    """A deploy.completed payload."""
    return json.dumps(EVENT | {"deployment_id": f"d{number}"} | more)


def wait_for(condition: Any, timeout: float = seconds(30), what: str | Callable[[], object] = "") -> Any:
    """Poll until ``condition`` returns something true; its value. ``what`` tells a failure, as it is when it fails."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, (what() if callable(what) else what) or "it did not happen in time"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process with this pid exists and is not a zombie."""
    return state(pid) not in ("", "Z")


def kill_9(pid: int) -> None:
    """SIGKILL."""
    os.kill(pid, signal.SIGKILL)
