"""The command line of ``isolator run`` for one plugin, and what becomes of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from host.authoring.private_daemon import wait_until
from host.authoring.trial import Trial
from host.channel.exit_codes import outcome_of
from host.channel.reply import NotSentError, Outcome
from host.events import format_time
from host.plugins.manifest import Manifest, check_values
from isolator.errors import IsolatorError, UsageError
from isolator.ipc.messages import InvocationEnded, Origin
from isolator.policy.keys import BY_NAME
from isolator.policy.model import EffectivePolicy
from isolator.policy.names import format_egress

_OWN, _DENIED = "isolator: ", "isolator: denied: "
"""Lines that ``isolator run`` itself writes on standard error."""
_PAUSE = 0.01
_END_SECONDS = 10.0
_PYTHON = "/usr/bin/python3"


class Cage:
    """Cages of one plugin: its files, its policy, its config, and a room that both sides see.

    Raises UsageError and NotFoundError for config that does not fit.
    """

    def __init__(
        self, root: str | None, made: Path, folder: Path, manifest: Manifest, effective: EffectivePolicy,
        config: Mapping[str, str],
    ) -> None:  # fmt: skip
        self.manifest, self.effective = manifest, effective
        self.values = _values(manifest, config)
        self._files, self._made, room, state = made / "plugin", made, made / "run", made / "state"
        made.chmod(0o755)
        shutil.copytree(folder, self._files, symlinks=True)
        for path in (self._files, *self._files.rglob("*")):
            if not path.is_symlink():  # who runs it is nobody in particular
                path.chmod(path.stat().st_mode | (0o555 if path.is_dir() or path.stat().st_mode & 0o100 else 0o444))
        room.mkdir()
        state.mkdir()
        self.socket = room / "plugin.sock"
        self._own = {
            "PLUGIN_NAME": manifest.core.name,
            "PLUGIN_SOCKET": str(self.socket),
            "PLUGIN_STATE_DIR": str(state),
        }
        self._variables = {name: text for key, text in self.values.items() for name in (key, key.upper())}
        self._variables |= effective.env
        program = sys.argv[0] if "/" in sys.argv[0] else shutil.which(sys.argv[0]) or sys.argv[0]
        self._run = [program, *(("--root", root) if root else ()), "run", "--json"]
        self._run += ["--read", str(self._files), "--write", str(room), "--write", str(state)]
        for name in ("memory", "cpu", "tasks", "nofile", "tmp"):
            value = effective.value(BY_NAME[name])
            self._run += [f"--{name}", str(value) if name in ("tasks", "nofile") else BY_NAME[name].show(value)]
        net = {"none": "none", "listed": "names", "public": "public"}[effective.network.mode]
        self._run += ["--net", net]
        self._run += [word for rule in effective.network.egress for word in ("--egress", format_egress(rule))]
        self._run += [word for path in effective.filesystem.read for word in ("--read", path)]
        self._run += [word for name in self._variables for word in ("--env", name)]

    def secret(self, key: str) -> str:
        """The secret that signs requests; raises UsageError when it is not set."""
        if key not in self.values:
            raise UsageError(f"config {key}", "signs requests, and is not set", f"add --config {key}=VALUE")
        return self.values[key]

    def start(self, trial: Trial, more: Mapping[str, str], stdin: Any, stdout: Any = subprocess.PIPE) -> Run:
        """Run the program with more variables; what it writes to pipes is of the trial's log."""
        core, port = self.manifest.core, self.manifest.transport.port
        own, words = {**self._own, **more}, [str(self._files / core.binary), *core.args]
        run = list(self._run)
        if port is not None:
            relay = self._made / "relay.py"
            shutil.copyfile(Path(__file__).with_name("relay.py"), relay)
            relay.chmod(0o444)
            run += ["--read", str(relay)]
            words = [_PYTHON, "-I", str(relay), str(self.socket), str(port), *words]
            own["PLUGIN_PORT"] = str(port)
        given = [f"{name}={value}" for name, value in own.items()]
        command = [*run, "--cwd", str(self._files), "--", "/usr/bin/env", *given, *words]
        return Run(trial, command, {**os.environ, **self._variables}, stdin, stdout)

    def connect(self, run: Run, deadline: float) -> socket.socket:
        """Connect to the socket of a run that may be starting, until then (monotonic); raises NotSentError."""
        while run.process.poll() is None:
            if self.socket.exists():
                connection = socket.socket(socket.AF_UNIX)
                try:
                    connection.connect(str(self.socket))
                    return connection
                except ConnectionRefusedError:  # bound, and not listening yet
                    connection.close()
            if not wait_until(deadline, _PAUSE):
                raise NotSentError("its socket was not there in time")
        run.join()
        raise NotSentError(run.why or "the sidecar has ended")


class Run:
    """One ``isolator run``; its output becomes the trial's log."""

    def __init__(self, trial: Trial, words: list[str], environment: Mapping[str, str], stdin: Any, stdout: Any) -> None:
        self._trial = trial
        self.why = ""
        self._last: dict[str, str] = {"stdout": "", "stderr": ""}
        self._end: dict[str, Any] = {}
        self.process = subprocess.Popen(
            words, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, env=dict(environment)
        )  # fmt: skip
        self._readers = [
            threading.Thread(target=self._read, args=(name, stream), daemon=True)
            for name, stream in (("stdout", self.process.stdout), ("stderr", self.process.stderr))
            if stream is not None
        ]
        for reader in self._readers:
            reader.start()

    def end(self, grace: float = 0.0) -> None:
        """End it as a daemon would: with time to end by itself, by SIGTERM, then without asking."""
        for number, seconds in ((None, grace), (signal.SIGTERM, _END_SECONDS), (signal.SIGKILL, None)):
            if number is not None and self.process.poll() is None:  # the cage ends with it
                self.process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
                break
        self.join()

    def join(self) -> None:
        """Wait for the end of its output."""
        for reader in self._readers:
            reader.join(_END_SECONDS)

    def outcome(self) -> Outcome:
        """How the program of a plugin with the mode exec has ended."""
        end = self._end
        known = end.get("exit_code") is not None or end.get("signal") is not None
        ended = InvocationEnded(
            name="", run="", exit_code=end.get("exit_code"), signal=end.get("signal"),
            cause=end["cause"] if known else self.why or str(end.get("cause") or "it did not run"),
            origin=Origin.PLUGIN if known else Origin.DAEMON,
        )  # fmt: skip
        return outcome_of(ended, self._last["stdout"].encode(), self._last["stderr"])

    def _read(self, name: str, stream: IO[bytes]) -> None:
        for raw in stream:
            line = raw.decode(errors="replace").rstrip("\n")
            if name == "stderr" and line.startswith(_DENIED):
                self._trial.warnings.append(f"refused: {line.removeprefix(_DENIED)}")
            elif name == "stderr" and line.startswith(_OWN):
                self.why = line.removeprefix(_OWN)
            elif name == "stderr" and (told := _told(line)) is not None:
                if "error" in told:
                    self.why = str(IsolatorError.from_json(told["error"]))
                else:
                    self._end = told
            elif line:
                self._last[name] = line
                now = format_time(time.time())
                self._trial.log.append({"time": now, "run": None, "stream": name, "line": line})
        stream.close()


def _told(line: str) -> dict[str, Any] | None:
    """The end of a run, or the ``error`` because of which there was none, if this line tells of it (``--json``)."""
    try:
        found = json.loads(line) if line.startswith("{") else None
    except ValueError:
        return None
    if not isinstance(found, dict):
        return None
    error = found.get("error")
    failed = isinstance(error, dict) and error.keys() == {"code", "what", "why", "remedy", "exit_code"}
    return found if failed or {"exit_code", "signal", "cause"} <= found.keys() else None


def _values(manifest: Manifest, config: Mapping[str, str]) -> dict[str, str]:
    """The config by key; raises UsageError or NotFoundError."""
    values = {key: text for key, (_, text) in check_values(manifest, config).items()}
    for key in manifest.required:
        if key not in values:
            raise UsageError(f"plugin {manifest.core.name}", f"needs the config {key}", f"add --config {key}=VALUE")
    for field in manifest.config or ():
        if field.default is not None:
            values.setdefault(field.key, field.default)
        if field.type == "file" and field.key in values:
            raise UsageError(f"config {field.key}", "a file is given by root alone", "sudo isolator plugin test DIR")
    return values
