"""Trial of a plugin by a user who is not root: in a cage that a running daemon builds, for the role ``runner``.

The plugin is what ``isolator run`` makes of it: its files (a copy, readable by all) and its socket, under the policy
that the manifest and ``--policy`` give, within ``[runner]`` of the daemon's ``host.toml``. This process is the user's
own, and so are the plugin's bytes that it reads. There is no host API; refused connections are in the daemon's trail.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from host.authoring.private_daemon import wait_until
from host.authoring.sending import Answer
from host.authoring.trial import Plan, Trial
from host.channel.reply import ONESHOT_REPLY, Outcome, interpret, meta_of, oneshot_request, params_text, read_reply
from host.cli.examples import example_of
from host.events import Catalogue, format_time, from_schema
from host.plugins.manifest import Manifest, check_value, parse
from host.queue.interface import Event
from isolator.errors import NotFoundError, UsageError
from isolator.paths import Paths
from isolator.policy.host import HostConfig
from isolator.policy.keys import BY_NAME
from isolator.policy.meet.effective import meet
from isolator.policy.model import EffectivePolicy
from isolator.policy.names import covers_hook, format_egress

ONESHOT, EXEC = "oneshot", "exec"
_OWN, _DENIED = "isolator: ", "isolator: denied: "
"""Lines that ``isolator run`` itself writes on standard error."""
_PAUSE = 0.01
_END_SECONDS = 10.0
_KINDS = {
    os.EX_OK: "ok",
    os.EX_TEMPFAIL: "retry",
    os.EX_USAGE: "rejected",
    os.EX_DATAERR: "rejected",
    os.EX_CONFIG: "rejected",
}
"""Outcomes that exit codes mean in the mode exec; others are failed attempts."""


def is_served(root: str | None) -> bool:
    """Whether a daemon runs cages for this user."""
    return os.access(Paths.of(root).run_socket, os.W_OK)


class RunnerTrials:
    """Trials of one plugin through the daemon of ``root``."""

    def __init__(self, root: str | None, plan: Plan) -> None:
        self._root, self._plan = root, plan
        self._catalogue = Catalogue()
        for name, schema in plan.schemas.items():
            self._catalogue.register(from_schema(name, schema))

    def round(self) -> Trial:
        """Send every event to the folder as it is now; raises IsolatorError for what cannot run."""
        plan, folder = self._plan, Path(self._plan.folder)
        try:
            manifest = parse((folder / "plugin.json").read_bytes(), name=str(folder / "plugin.json"))
        except FileNotFoundError:
            raise NotFoundError(str(folder / "plugin.json"), "not there", "write one (see 'isolator new')") from None
        core = manifest.core
        if manifest.transport.mode not in (ONESHOT, EXEC):
            why = f"the mode {manifest.transport.mode} is tried by root alone"
            raise UsageError("plugin test", why, f"sudo isolator plugin test {plan.folder}")
        grant = None
        if plan.policy is not None:
            from isolator.policy.parse.load import parse_plugin_policy

            grant = parse_plugin_policy(plan.policy.read_bytes(), source=str(plan.policy))
        effective = meet(core, grant, HostConfig()).effective
        trial = Trial(core.name, core.version, manifest.transport.mode, effective.digest())
        trial.warnings.append("through the role 'runner': no host API, and refused connections are in the trail alone")
        with tempfile.TemporaryDirectory(prefix="isolator-test-") as made:
            cage = _Cage(self._root, Path(made), folder, manifest, effective, plan.config)
            sending = cage.oneshot if manifest.transport.mode == ONESHOT else cage.exec
            with sending(trial) as send:
                for name in plan.events or dict.fromkeys(map(self._catalogue.canonical, core.hooks)):
                    trial.answers.append(self._answer(name, effective, manifest, send))
        return trial

    def _answer(self, name: str, effective: EffectivePolicy, manifest: Manifest, send: Any) -> Answer:
        event_type = self._catalogue.need(name)
        payload = self._plan.events.get(name) or example_of(name, event_type.schema(), event_type.filled)
        hook = next((hook for hook in manifest.core.hooks if self._catalogue.canonical(hook) == event_type.name), None)
        if hook is None or not any(covers_hook(granted, hook) for granted in effective.hooks):
            return Answer(name, payload, "withheld", "its manifest or its policy keeps this event from it")
        valid = self._catalogue.validate(name, payload)
        now = time.time()
        event = Event(
            1, f"ev_test_{os.urandom(8).hex()}", event_type.name, format_time(datetime.now(UTC)), now, now, valid.json
        )
        began = time.perf_counter_ns()
        outcome: Outcome = send(event, hook, event_type, self._plan.timeout)
        latency = (time.perf_counter_ns() - began) // 1000
        return Answer(name, payload, outcome.kind, outcome.detail, outcome.text or None, latency)


class _Cage:
    """The command line of ``isolator run`` for one plugin, and what becomes of it."""

    def __init__(
        self, root: str | None, made: Path, folder: Path, manifest: Manifest, effective: EffectivePolicy,
        config: Mapping[str, str],
    ) -> None:  # fmt: skip
        self._manifest, self._effective = manifest, effective
        self._files, self._room, state = made / "plugin", made / "run", made / "state"
        made.chmod(0o755)
        shutil.copytree(folder, self._files, symlinks=True)
        for path in (self._files, *self._files.rglob("*")):
            if not path.is_symlink():  # who runs it is nobody in particular
                path.chmod(path.stat().st_mode | (0o555 if path.is_dir() or path.stat().st_mode & 0o100 else 0o444))
        self._room.mkdir()
        state.mkdir()
        self._socket = self._room / "plugin.sock"
        self._own = {
            "PLUGIN_NAME": manifest.core.name,
            "PLUGIN_SOCKET": str(self._socket),
            "PLUGIN_STATE_DIR": str(state),
        }
        self._variables = {**_variables(manifest, config), **effective.env}
        program = sys.argv[0] if "/" in sys.argv[0] else shutil.which(sys.argv[0]) or sys.argv[0]
        self._run = [program, *(("--root", root) if root else ()), "run", "--json"]
        self._run += ["--read", str(self._files), "--write", str(self._room), "--write", str(state)]
        for name in ("memory", "cpu", "tasks", "nofile", "tmp"):
            value = effective.value(BY_NAME[name])
            self._run += [f"--{name}", str(value) if name in ("tasks", "nofile") else BY_NAME[name].show(value)]
        net = {"none": "none", "listed": "names", "public": "public"}[effective.network.mode]
        self._run += [
            "--net",
            net,
            *(word for rule in effective.network.egress for word in ("--egress", format_egress(rule))),
        ]
        self._run += [word for path in effective.filesystem.read for word in ("--read", path)]
        self._run += [word for name in self._variables for word in ("--env", name)]

    @contextlib.contextmanager
    def oneshot(self, trial: Trial) -> Iterator[Any]:
        """A sidecar that runs; a function that sends it one event."""
        process = self._start(trial, {}, subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + self._effective.restart.start_timeout
            while not self._socket.exists() and process.process.poll() is None and wait_until(deadline, _PAUSE):
                pass

            def send(event: Event, hook: str, event_type: Any, timeout: float) -> Outcome:
                if process.process.poll() is not None or not self._socket.exists():
                    process.join()
                    return Outcome("unknown", "not_started", process.why or "its socket was not there in time")
                major, meta = (
                    int(self._manifest.core.api_version.partition(".")[0]),
                    self._manifest.transport.meta == "fit",
                )
                line = oneshot_request(event, hook, event_type, attempt=1, timeout=timeout, major=major, meta=meta)
                if line is None:
                    return Outcome("rejected", "payload_too_large", "the event does not fit into a one-shot request")
                return _exchange(self._socket, line, timeout)

            yield send
        finally:
            process.end()

    @contextlib.contextmanager
    def exec(self, trial: Trial) -> Iterator[Any]:
        """A function that runs the program for one event."""

        def send(event: Event, hook: str, event_type: Any, timeout: float) -> Outcome:
            about = {"PLUGIN_EVENT_ID": event.id, "PLUGIN_EVENT_TYPE": hook, "PLUGIN_EVENT_ATTEMPT": "1"}
            process = self._start(trial, about, subprocess.PIPE)
            major = int(self._manifest.core.api_version.partition(".")[0])
            line = params_text(event, event_type, major, meta_of(event, 1, timeout)).encode() + b"\n"
            assert process.process.stdin is not None
            with contextlib.suppress(OSError):
                process.process.stdin.write(line)
            with contextlib.suppress(OSError):
                process.process.stdin.close()
            try:
                process.process.wait(timeout)
            except subprocess.TimeoutExpired:
                return Outcome("failed", "ended", f"no end within {timeout:g} s")
            finally:
                process.end()
            return process.outcome()

        yield send

    def _start(self, trial: Trial, more: Mapping[str, str], stdin: int) -> _Run:
        own = [f"{name}={value}" for name, value in {**self._own, **more}.items()]
        core = self._manifest.core
        program = str(self._files / core.binary)
        words = [*self._run, "--cwd", str(self._files), "--", "/usr/bin/env", *own, program, *core.args]
        return _Run(trial, words, {**os.environ, **self._variables}, stdin)


class _Run:
    """One ``isolator run``; its output becomes the trial's log."""

    def __init__(self, trial: Trial, words: list[str], environment: Mapping[str, str], stdin: int) -> None:
        self._trial = trial
        self.why = ""
        self._last: dict[str, str] = {"stdout": ""}
        self._end: dict[str, Any] = {}
        self.process = subprocess.Popen(
            words, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(environment)
        )
        self._readers = [
            threading.Thread(target=self._read, args=(name, stream), daemon=True)
            for name, stream in (("stdout", self.process.stdout), ("stderr", self.process.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def end(self) -> None:
        """End it as a daemon would: SIGTERM, then without asking."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()  # the cage ends with it
                self.process.wait()
        self.join()

    def join(self) -> None:
        """Wait for the end of its output."""
        for reader in self._readers:
            reader.join(_END_SECONDS)

    def outcome(self) -> Outcome:
        """How the program of a plugin with the mode exec has ended."""
        line, code = self._last["stdout"], self._end.get("exit_code")
        try:
            result = json.loads(line)
        except ValueError:
            result = None
        found = result if isinstance(result, dict) else None
        _, status, message, retry_after = interpret({"result": found})
        text = line if found is not None else ""
        if not self._end or (code is None and self._end.get("signal") is None):
            return Outcome("unknown", None, self.why or self._end.get("cause"), text)
        kind = _KINDS.get(code, "failed") if code is not None else "failed"
        if kind == "ok":
            return Outcome("ok", status, message, text)
        how = f"exit code {code}" if code is not None else f"signal {self._end['signal']}"
        return Outcome(kind, status, f"{how}: {message}" if message else how, text, retry_after=retry_after)  # type: ignore[arg-type]  # of _KINDS

    def _read(self, name: str, stream: Any) -> None:
        for raw in stream:
            line = raw.decode(errors="replace").rstrip("\n")
            if name == "stderr" and line.startswith(_DENIED):
                self._trial.warnings.append(f"refused: {line.removeprefix(_DENIED)}")
            elif name == "stderr" and line.startswith(_OWN):
                self.why = line.removeprefix(_OWN)
            elif name == "stderr" and (end := _end(line)) is not None:
                self._end = end
            elif line:
                self._last[name] = line
                now = format_time(datetime.now(UTC))
                self._trial.log.append({"time": now, "run": None, "stream": name, "line": line})
        stream.close()


def _end(line: str) -> dict[str, Any] | None:
    """The end of a run, if this line tells of it (``isolator run --json``)."""
    try:
        found = json.loads(line) if line.startswith("{") else None
    except ValueError:
        return None
    return found if isinstance(found, dict) and {"exit_code", "signal", "cause"} <= found.keys() else None


def _exchange(path: Path, line: bytes, timeout: float) -> Outcome:
    """One connection, one line, one line back, as the daemon does it."""
    reply, deadline = b"", time.monotonic() + timeout
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.settimeout(timeout)
            connection.connect(str(path))
            connection.send(line)
            while b"\n" not in reply and len(reply) <= ONESHOT_REPLY:
                connection.settimeout(max(0.001, deadline - time.monotonic()))
                piece = connection.recv(65536)
                if not piece:
                    break
                reply += piece
        except TimeoutError:
            return Outcome("unknown", detail=f"none within {timeout:g} s")
        except OSError as error:
            return Outcome("unknown", detail=f"connection broken: {error.strerror}")
    reply = reply.partition(b"\n")[0]
    if len(reply) > ONESHOT_REPLY:
        return Outcome("failed", "bad_reply", f"reply longer than {ONESHOT_REPLY} bytes")
    return read_reply(reply) if reply else Outcome("unknown", detail="connection closed without a reply")


def _variables(manifest: Manifest, config: Mapping[str, str]) -> dict[str, str]:
    """The config as variables, each as spelled and in capitals; raises UsageError or NotFoundError."""
    values = {}
    fields = {field.key: field for field in manifest.config or ()}
    for key, text in config.items():
        if manifest.config is not None and key not in fields:
            raise NotFoundError(
                f"config {key}", "is not in the plugin's schema", "see config_schema of its plugin.json"
            )
        values[key] = check_value(fields[key], text) if key in fields else text
    for key, field in fields.items():
        if field.default is not None:
            values.setdefault(key, field.default)
        if field.required and key not in values:
            raise UsageError(f"plugin {manifest.core.name}", f"needs the config {key}", f"add --config {key}=VALUE")
        if field.type == "file" and key in values:
            raise UsageError(f"config {key}", "a file is given by root alone", "sudo isolator plugin test DIR")
    return {name: text for key, text in values.items() for name in (key, key.upper())}
