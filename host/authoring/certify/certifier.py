"""A plugin in a private daemon whose host plays the faults of the protocol; what that shows, check by check."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from host.authoring.certify.checks import Check, checks_for
from host.authoring.certify.stage import FOUND, GOOD, Stage
from host.authoring.private_daemon import PrivateDaemon, wait_until
from host.authoring.sending import Answer, cancel, first_attempt, no_event
from host.authoring.trial import Plan, Trials
from host.cli import trail
from host.client.client import Client
from isolator.audit.reader import Query
from isolator.errors import IsolatorError, UsageError

PATIENCE = 60.0
"""Seconds for one answer, beyond the plugin's own time: for its start, and for connections that it refuses."""
_KILLED = 9
_UNDER_WAY = ("queued", "in_flight", "retry")
_RECORDS = ("plugin.crashed", "plugin.stopped", "plugin.health", "event.quarantined")
_SETTLE_SECONDS, _PAUSE = 60.0, 0.02
_REFUSAL_SECONDS = 1.0
"""Patience with the request of a connection to the dead end."""
_FILLER = "isolator-certify"


@dataclass
class Result:
    """Outcome of one check."""

    check: Check
    first: int
    """Number of the newest record before it."""
    findings: list[str] = field(default_factory=list)
    skipped: str = ""
    """Why it could not be played."""
    good: frozenset[str] = GOOD
    """Outcomes that count as an answer."""


@dataclass
class Report:
    """Outcome of a certification."""

    plugin: str
    version: str
    mode: str
    digest: str
    timeout: float
    """Seconds that it has for an event."""
    results: list[Result] = field(default_factory=list)
    whole: bool = True
    """Every check of the mode was played."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not any(result.findings for result in self.results)


class DeadEnd:
    """A proxy on loopback that leads nowhere: it refuses whatever it is asked, or is silent."""

    def __init__(self) -> None:
        self._answering = threading.Event()
        self._answering.set()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.port = 9
        try:
            self._socket.bind(("127.0.0.1", 0))
        except OSError:  # no loopback here: nothing is reached in any case
            return
        self.port = self._socket.getsockname()[1]
        self._socket.listen(128)
        threading.Thread(target=self._serve, name="dead end", daemon=True).start()

    @property
    def network(self) -> dict[str, Any]:
        """The table ``[network]`` that leads everything here, names too: no datagram is answered."""
        place = f"127.0.0.1:{self.port}"
        return {"proxy": place, "proxy_resolves": True, "resolvers": [place]}

    def be_silent(self) -> None:
        """Leave connections alone from now on."""
        self._answering.clear()

    def refuse(self) -> None:
        """Refuse again, also what was left alone."""
        self._answering.set()

    def close(self) -> None:
        self._answering.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                connection, _ = self._socket.accept()
                self._answering.wait()
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(_REFUSAL_SECONDS)
                    connection.recv(4096)
                    connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")


class Certifier(Trials):
    """One certification; ``note`` gets each check as it begins."""

    def __init__(self, daemon: PrivateDaemon, plan: Plan, dead_end: DeadEnd, note: Callable[[Check], None]) -> None:
        super().__init__(daemon, plan)
        self._stage, self._dead_end, self._note = Stage(Path(daemon.root)), dead_end, note

    def certify(self, names: tuple[str, ...] = ()) -> Report:
        """Play the checks of these names, of none: all; raises IsolatorError for a plugin that cannot be tried."""
        began = trail.newest(self._daemon.root)
        with self._daemon.client() as client:
            trial = self._take_over(client)
            shown = client.call("plugin.show", name=trial.plugin)
            report = Report(
                trial.plugin, trial.version, trial.mode, shown["digest"], shown["effective"]["delivery_timeout"]
            )  # fmt: skip
            self._plan = replace(self._plan, timeout=report.timeout + PATIENCE)
            events = self._events(client, trial.plugin)
            if not events:
                raise no_event(trial.plugin)
            checks = checks_for(trial.mode, names)
            report.whole = len(checks) == len(checks_for(trial.mode, ()))
            for check in checks:
                self._note(check)
                report.results.append(self._play(client, check, report, events))
            self._stage.set("plain", report.mode)
            self._stop(client, report.plugin, began)
        self._read_trail(report)
        return report

    def _play(
        self, client: Client, check: Check, report: Report, events: Mapping[str, Mapping[str, Any]]
    ) -> Result:  # fmt: skip
        # A tool of MCP says so when it could not do its work; that is an answer.
        good = GOOD | {"failed"} if report.mode == "mcp" else GOOD
        result = Result(check, trail.newest(self._daemon.root), good=good)
        name, payload = next(iter(events.items()))
        if report.mode != "exec":
            with contextlib.suppress(IsolatorError):  # after a crash it would be in its pause; an event shows the rest
                client.call("plugin.start", name=report.plugin)
        self._stage.set(check.play, report.mode, report.timeout)
        if check.name == "events":
            for event, one in events.items():
                self._judge(self._send(client, report.plugin, event, one), result)
            return result
        run = client.call("plugin.show", name=report.plugin).get("run")
        if check.name == "sigterm":
            self._restart_in_mid_event(client, report.plugin, name, payload)
        elif check.name == "twice" and report.mode == "exec":
            self._again(client, report.plugin, name, payload, result)
        elif check.name == "disk":
            with self._full_disk(report.plugin) as full:
                if full:
                    self._judge(self._send(client, report.plugin, name, payload), result, "with a full disk ")
                else:
                    result.skipped = "it has no state of its own"
        elif check.name == "down":
            self._dead_end.be_silent()
            try:
                self._judge(self._send(client, report.plugin, name, payload), result)
            finally:
                self._dead_end.refuse()
        else:
            answer = self._send(client, report.plugin, name, payload)
            if report.mode not in check.loses:
                self._judge(answer, result)
        self._stage.set("plain", report.mode)
        self._judge(self._send(client, report.plugin, name, payload), result, "afterwards ")
        now = client.call("plugin.show", name=report.plugin).get("run")
        if run is not None and now != run and check.name != "sigterm":
            result.findings.append("it ended, and was started again")
        return result

    @staticmethod
    def _judge(answer: Answer, result: Result, when: str = "") -> None:
        if answer.outcome == "withheld":
            raise UsageError(f"event {answer.event}", answer.detail or "", "name one with --event and --payload")
        if answer.outcome not in result.good:
            result.findings.append(f"{when}{answer.event}: {answer.outcome}: {answer.detail or 'no reason'}")

    def _restart_in_mid_event(self, client: Client, plugin: str, event: str, payload: Mapping[str, Any]) -> None:
        emitted = client.call("event.emit", name=event, payload=dict(payload))
        deadline = time.monotonic() + _SETTLE_SECONDS
        while self._state(client, plugin, emitted["id"]) != "in_flight":
            if not wait_until(deadline, _PAUSE):
                raise IsolatorError(f"event {event}", "was not sent in time", "run the command again")
        with contextlib.suppress(IsolatorError):  # what is wrong with the start shows in what follows
            client.call("plugin.restart", name=plugin)
        # It would be tried again, and hold the others of its project back. What is in flight cannot be cancelled yet.
        while self._state(client, plugin, emitted["id"]) in _UNDER_WAY and wait_until(deadline, _PAUSE):
            cancel(client, emitted["id"])

    @staticmethod
    def _state(client: Client, plugin: str, event_id: str) -> str:
        deliveries = client.call("event.show", id=event_id)["deliveries"]
        return str(next(one["state"] for one in deliveries if one["plugin"] == plugin))

    def _again(
        self, client: Client, plugin: str, event: str, payload: Mapping[str, Any], result: Result
    ) -> None:  # fmt: skip
        """Send an event that was handled once more, as an operator's replay does."""
        answer = self._send(client, plugin, event, payload)
        self._judge(answer, result)
        if answer.ok:
            (row,) = client.call("event.list", limit=1, plugin=plugin)["events"]
            client.call("event.replay", id=row["id"], plugin=plugin)
            repeated = first_attempt(client, plugin, event, payload, row["id"], self._plan.timeout)
            self._judge(repeated, result, "the second time ")

    @contextlib.contextmanager
    def _full_disk(self, plugin: str) -> Iterator[bool]:
        """Fill the plugin's state; False where it has none."""
        folder = Path(f"/proc/{self._daemon.pid}/root{self._daemon.paths.state / plugin}")
        place = folder / "mnt"
        if not place.is_dir() or place.stat().st_dev == folder.stat().st_dev:
            yield False
            return
        # Beside the plugin's own folder in its image, where it neither sees nor removes it.
        fd = os.open(place / _FILLER, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            _fill(fd)
            yield True
        finally:
            os.close(fd)
            (place / _FILLER).unlink()

    def _read_trail(self, report: Report) -> None:
        """Add to each check the records that count against the plugin, up to the check after it."""
        found = trail.search(self._daemon.root, Query(report.plugin, _RECORDS))
        for _, record in found:
            finding = _finding(record.type, record.data)
            results = [
                result
                for result in report.results
                if result.first < record.seq or (record.type == "plugin.stopped" and result.check.name == "sigterm")
            ]
            if record.type == "plugin.stopped":
                results.sort(key=lambda result: result.check.name == "sigterm")
            if finding and results and finding not in results[-1].findings:
                results[-1].findings.append(finding)


def _finding(kind: str, data: Mapping[str, Any]) -> str:
    if kind == "plugin.crashed":
        return f"it ended by itself ({data['cause']}): {data.get('reason') or _last(data)}".rstrip(": ")
    if kind == "plugin.stopped":
        return "it did not end after SIGTERM and was killed" if data.get("signal") == _KILLED else ""
    if kind == "plugin.health":
        return "" if data["ok"] else str(data["detail"]).removeprefix(FOUND)
    return "two events made it crash"


def _last(data: Mapping[str, Any]) -> str:
    lines = [line for line in data.get("stderr") or () if line]
    return str(lines[-1]) if lines else ""


def _fill(fd: int) -> None:
    place, chunk = 0, 64 << 20
    while chunk >= 512:
        try:
            os.posix_fallocate(fd, place, chunk)
            place += chunk
        except OSError:
            chunk //= 2
