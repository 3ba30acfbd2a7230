"""Delivering an event: from a whole daemon (cages, validation, durable queue, audit) to a sidecar and back.

Beside it stands what a plugin host costs that has none of that: a Node process (or, where there is no Node, a Python
one) that connects to the same script's socket, writes one line and reads one line. Per round each contender delivers
one event; the daemon's times are those of its own audit records (made in the process that did it):

    dispatch      accepted (safe on disk) → written to the running plugin
    round trip    accepted → reply recorded
    emit          the caller's call of ``emit`` → answered, which includes the sync to disk
    one sync      of a block of 4 KiB to the same disk: what no durable queue can do without

Where the time goes, stage by stage, and what a busy daemon does (``delivery_load.py``) is told in the notes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.frame import Report, Series, Skipped
from host.client.client import Client
from tests.support.timeouts import EMULATED
from tests.system.daemon import Daemon, daemon, write_plugin

HOST_TOML = """
[defaults]
cpu = "100%"
[ceiling]
cpu = "400%"
"""
ONESHOT = """\
    #!/usr/bin/python3
    import json, os, socket
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.environ["PLUGIN_SOCKET"])
    server.listen(1)
    while True:
        connection, _ = server.accept()
        request = json.loads(connection.recv(4096))
        reply = {"jsonrpc": "2.0", "result": {"status": "ok"}, "id": request["id"]}
        connection.sendall(json.dumps(reply).encode() + b"\\n")
        connection.close()
"""
STREAM = """\
    #!/usr/bin/python3
    import json, os, socket
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.environ["PLUGIN_SOCKET"])
    server.listen(1)
    while True:
        connection, _ = server.accept()
        for line in connection.makefile("rb"):
            request = json.loads(line)
            if "id" in request:
                result = {"protocol": "1"} if request["method"] == "host.hello" else {"status": "ok"}
                reply = {"jsonrpc": "2.0", "result": result, "id": request["id"]}
                connection.sendall(json.dumps(reply).encode() + b"\\n")
"""
NODE = """
const net = require("net");
require("readline").createInterface({input: process.stdin}).on("line", (line) => {
  const began = process.hrtime.bigint();
  const socket = net.createConnection(process.argv[1], () => socket.write(line + "\\n"));
  let reply = "";
  socket.on("data", (data) => { reply += data; });
  socket.on("end", () => {
    JSON.parse(reply);
    console.log(Number(process.hrtime.bigint() - began) / 1000);
  });
});
"""
PYTHON = """
import json, socket, sys, time
for line in sys.stdin:
    began = time.perf_counter_ns()
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(sys.argv[1])
    peer.sendall(line.encode())
    json.loads(peer.makefile().read())
    peer.close()
    print((time.perf_counter_ns() - began) / 1000, flush=True)
"""
EVENT = {
    "project_id": "proj_abc123", "deployment_id": "dep_xyz789", "url": "https://myapp.example.com",
    "commit_sha": "a1b2c3d", "duration_ms": 14200,
}  # fmt: skip


class Reference:
    """The plain host and its sidecar: the same script, no cage, no queue, no trail."""

    def __init__(self, work: Path, name: str, command: list[str]) -> None:
        self.name = name
        path = work / f"{name.split(maxsplit=1)[0]}.sock"
        script = work / "sidecar.py"
        script.write_text("\n".join(line[4:] for line in ONESHOT.splitlines()))
        self._sidecar = subprocess.Popen(
            ["/usr/bin/python3", str(script)], env={**os.environ, "PLUGIN_SOCKET": str(path)}
        )
        while not path.exists():
            time.sleep(0.01)
        self._host = subprocess.Popen(
            [*command, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._line = json.dumps({"jsonrpc": "2.0", "method": "deploy.completed", "params": EVENT, "id": 1}) + "\n"

    def once(self) -> float:
        """Deliver one event; µs as the plain host measured them."""
        assert self._host.stdin is not None
        assert self._host.stdout is not None
        self._host.stdin.write(self._line)
        return float(self._host.stdout.readline())

    def close(self) -> None:
        for process in (self._host, self._sidecar):
            process.kill()
            process.wait()


@contextlib.contextmanager
def references() -> Iterator[tuple[list[Reference], list[Skipped]]]:
    """Every plain host that this machine can run."""
    found: list[Reference] = []
    skipped: list[Skipped] = []
    with tempfile.TemporaryDirectory(prefix="isolator-bench-") as folder, contextlib.ExitStack() as stack:
        for name, program, words in (
            ("node host, no durability, no audit, no cage", shutil.which("node"), ["-e", NODE]),
            ("python host, no durability, no audit, no cage", "/usr/bin/python3", ["-c", PYTHON]),
        ):
            if program is None:
                skipped.append(Skipped(name, "node is not installed"))
                continue
            found.append(Reference(Path(folder), name, [program, *words]))
            stack.callback(found[-1].close)
        yield found, skipped


class Subject:
    """One plugin of the daemon, and the events that were sent to it."""

    def __init__(self, running: Daemon, name: str, hook: str, script: str, **manifest: Any) -> None:
        self.name, self.hook = name, hook
        folder = write_plugin(running.root / "src" / name, script, hooks=[hook], **manifest)
        running.cli("plugin", "add", str(folder), "--yes")
        self.ids: list[str] = []
        self.began: list[float] = []
        self.emits: list[float] = []

    def clear(self) -> None:
        """Forget what was measured so far."""
        for figures in (self.ids, self.began, self.emits):
            figures.clear()

    def once(self, client: Client, *, wait: bool = True) -> str:
        """Emit one event, and wait for its outcome."""
        self.began.append(time.time_ns() / 1000)
        began = time.perf_counter_ns()
        event = str(client.call("event.emit", name=self.hook, payload=payload(self.hook, len(self.ids)))["id"])
        self.emits.append((time.perf_counter_ns() - began) / 1000)
        self.ids.append(event)
        if wait:
            row = client.call("event.wait", id=event, timeout=30)
            if any(d["state"] != "ok" for d in row["deliveries"]):
                raise RuntimeError(f"{self.name}: {row['deliveries']}")
        return event


def payload(hook: str, number: int) -> dict[str, Any]:
    """A payload of that event, of one of 64 projects."""
    if hook == "deploy.completed":
        return {**EVENT, "project_id": f"proj_{number % 64}"}
    if hook == "deploy.started":
        return {"project_id": f"proj_{number % 64}", "deployment_id": "dep_xyz789"}
    if hook == "project.created":
        return {"project_id": f"proj_{number % 64}", "name": "shop"}
    return {"project_id": f"proj_{number % 64}", "deployment_id": "d", "error_code": "build"}


def _micros(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() * 1e6


@dataclass(frozen=True)
class Passage:
    """One delivery's way, in µs of the clock that stamps the records."""

    accepted: float
    queued: float
    """From accepted until the attempt was on record."""
    replied: float
    latency: float
    """From written to the plugin until its reply was read."""

    @property
    def dispatch(self) -> float:
        """From accepted until it was written."""
        return self.round_trip - self.latency

    @property
    def round_trip(self) -> float:
        return self.replied - self.accepted


class Trail:
    """The daemon's records of events, by event and plugin."""

    def __init__(self, running: Daemon) -> None:
        self.accepted: dict[str, float] = {}
        self._queued: dict[tuple[str, str], float] = {}
        self._replied: dict[tuple[str, str], tuple[float, float]] = {}
        for file in sorted((running.root / "var/log/isolator/audit").glob("audit*.jsonl")):
            for line in file.read_text().splitlines():
                record = json.loads(line)
                event, plugin, data = record["event_id"], record["plugin"], record["data"]
                if record["type"] == "event.accepted":
                    self.accepted[event] = _micros(record["time"])
                elif record["type"] == "event.dispatched" and data["queued_us"] is not None:
                    self._queued[event, plugin] = data["queued_us"]
                elif record["type"] == "event.response":
                    self._replied[event, plugin] = _micros(record["time"]), data["latency_us"]

    def passages(self, plugin: str, events: list[str]) -> list[Passage]:
        """The deliveries of these events to a plugin; those that waited for a retry are left out."""
        return [
            Passage(self.accepted[event], self._queued[event, plugin], *self._replied[event, plugin])
            for event in events
            if (event, plugin) in self._queued and (event, plugin) in self._replied
        ]


def measure(rounds: int) -> Report:
    """``rounds`` events per contender, one at a time; then the daemon under load."""
    from bench.delivery_load import under_load

    samples: dict[str, list[float]] = {}
    with references() as (plain, skipped), daemon(host_toml=HOST_TOML) as running, Client(running.root) as client:
        subjects = [
            Subject(running, "oneshot", "deploy.completed", ONESHOT),
            Subject(running, "stream", "deploy.started", STREAM, transport={"mode": "stream"}),
        ]
        for number in range(-3, rounds):
            if number == 0:
                for subject in subjects:
                    subject.clear()
            turns: list[Reference | Subject] = [*plain, *subjects]
            turn = number % len(turns)
            for one in (*turns[turn:], *turns[:turn]):
                if isinstance(one, Subject):
                    one.once(client)
                    continue
                took = one.once()
                if number >= 0:
                    samples.setdefault(one.name, []).append(took)
            if number >= 0:
                samples.setdefault("one sync", []).append(_one_sync(running.root / "block"))
        settle(running, client)
        trail, notes = Trail(running), []
        for subject in subjects:
            passages = trail.passages(subject.name, subject.ids)
            samples[f"isolator {subject.name}: dispatch"] = [p.dispatch for p in passages]
            samples[f"isolator {subject.name}: round trip"] = [p.round_trip for p in passages]
            notes.append(_stages(subject, trail, passages))
        samples["isolator: emit"] = list(subjects[0].emits)
        if EMULATED:
            notes.append(
                "what a busy daemon does is not measured: this processor is emulated, and has no speed of its own"
            )
        else:
            notes += [
                "to reach: dispatch p50 300 µs, p99 1 ms; round trip stream p50 400 µs, oneshot p50 3 × the first line",
                *under_load(running, client, subjects),
            ]
    builds = {"isolator": "cage, validation, durable queue, audit"}
    series = tuple(
        Series(name, builds.get(name.split(maxsplit=1)[0].rstrip(":"), ""), "µs", tuple(taken))
        for name, taken in samples.items()
    )
    return Report(
        name="delivery",
        title="Delivering an event (one at a time)",
        series=series,
        skipped=tuple(skipped),
        baselines=(plain[0].name,),
        notes=tuple(notes),
    )


def _one_sync(path: Path) -> float:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        os.lseek(fd, 0, os.SEEK_END)
        began = time.perf_counter_ns()
        os.write(fd, b"x" * 4096)
        os.fdatasync(fd)
        return (time.perf_counter_ns() - began) / 1000
    finally:
        os.close(fd)


def _stages(subject: Subject, trail: Trail, passages: list[Passage]) -> str:
    """Where the time goes: medians of each stage, of which the first ends with the sync to disk."""
    began = dict(zip(subject.ids, subject.began, strict=True))
    stages = {
        "called → accepted": [trail.accepted[event] - began[event] for event in subject.ids],
        "→ attempt on record": [p.queued for p in passages],
        "→ in the trail's hands and written": [p.dispatch - p.queued for p in passages],
        "→ reply read": [p.latency for p in passages],
    }
    return f"stages of {subject.name}, p50 in µs: " + ", ".join(
        f"{stage} {statistics.median(values):.0f}" for stage, values in stages.items()
    )


def settle(running: Daemon, client: Client) -> None:
    """Wait until the trail has everything."""
    deadline = time.monotonic() + 60
    while client.call("status")["records_pending"] and time.monotonic() < deadline:
        time.sleep(0.05)
