"""Delivering an event: from a whole daemon (cages, validation, durable queue, audit) to a sidecar and back.

Beside it stands what a plugin host costs that has none of that: a Node process (or, where there is no Node, a Python
one) that connects to the same script's socket, writes one line and reads one line. Per round each contender delivers
one event; the daemon's times are those of its own audit records (made in the process that did it):

    dispatch      accepted (safe on disk) → written to the running plugin
    round trip    accepted → reply recorded
    emit          the caller's call of ``emit`` → answered, which includes the sync to disk

What a busy daemon does is measured after the rounds and told in the notes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.frame import Report, Series, Skipped
from host.client import Client
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
HANG = """\
    #!/usr/bin/python3
    import os, socket, time
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.environ["PLUGIN_SOCKET"])
    server.listen(1)
    while True:
        connection, _ = server.accept()
        time.sleep(3600)
"""
FLOOD = """\
    #!/usr/bin/python3
    import os, socket
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.environ["PLUGIN_SOCKET"])
    server.listen(1)
    while True:
        os.write(1, b"x" * 65536)
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
        self.emits: list[float] = []

    def once(self, client: Client, *, wait: bool = True) -> str:
        """Emit one event, and wait for its outcome."""
        began = time.perf_counter_ns()
        event = str(client.call("event.emit", name=self.hook, payload=_payload(self.hook, len(self.ids)))["id"])
        self.emits.append((time.perf_counter_ns() - began) / 1000)
        self.ids.append(event)
        if wait:
            row = client.call("event.wait", id=event, timeout=30)
            if any(d["state"] != "ok" for d in row["deliveries"]):
                raise RuntimeError(f"{self.name}: {row['deliveries']}")
        return event


def _payload(hook: str, number: int) -> dict[str, Any]:
    if hook == "deploy.completed":
        return {**EVENT, "project_id": f"proj_{number % 64}"}
    if hook == "deploy.started":
        return {"project_id": f"proj_{number % 64}", "deployment_id": "dep_xyz789"}
    if hook == "project.created":
        return {"project_id": f"proj_{number % 64}", "name": "shop"}
    return {"project_id": f"proj_{number % 64}", "deployment_id": "d", "error_code": "build"}


def _micros(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() * 1e6


class Trail:
    """The daemon's records of events, by event and plugin."""

    def __init__(self, running: Daemon) -> None:
        self._accepted: dict[str, float] = {}
        self._dispatched: dict[tuple[str, str], float] = {}
        self._replied: dict[tuple[str, str], float] = {}
        for record in running.records():
            event, plugin = record["event_id"], record["plugin"]
            if record["type"] == "event.accepted":
                self._accepted[event] = _micros(record["time"])
            elif record["type"] == "event.dispatched" and record["data"]["queued_us"] is not None:
                self._dispatched[event, plugin] = record["data"]["queued_us"]
            elif record["type"] == "event.response":
                self._replied[event, plugin] = _micros(record["time"])

    def dispatch(self, subject: Subject) -> list[float]:
        return [
            self._dispatched[event, subject.name] for event in subject.ids if (event, subject.name) in self._dispatched
        ]

    def round_trip(self, subject: Subject) -> list[float]:
        return [self._replied[event, subject.name] - self._accepted[event] for event in subject.ids]


def measure(rounds: int) -> Report:
    """``rounds`` events per contender, one at a time; then the daemon under load."""
    samples: dict[str, list[float]] = {}
    with references() as (plain, skipped), daemon(host_toml=HOST_TOML) as running, Client(running.root) as client:
        subjects = [
            Subject(running, "oneshot", "deploy.completed", ONESHOT),
            Subject(running, "stream", "deploy.started", STREAM, transport={"mode": "stream"}),
        ]
        for number in range(-3, rounds):
            if number == 0:
                for subject in subjects:
                    subject.ids.clear()
                    subject.emits.clear()
            turns: list[Reference | Subject] = [*plain, *subjects]
            turn = number % len(turns)
            for one in (*turns[turn:], *turns[:turn]):
                if isinstance(one, Subject):
                    one.once(client)
                    continue
                took = one.once()
                if number >= 0:
                    samples.setdefault(one.name, []).append(took)
        _settle(running, client)
        trail = Trail(running)
        for subject in subjects:
            samples[f"isolator {subject.name}: dispatch"] = trail.dispatch(subject)
            samples[f"isolator {subject.name}: round trip"] = trail.round_trip(subject)
        samples["isolator: emit"] = list(subjects[0].emits)
        notes = [*_under_load(running, client, subjects), *_beside_bad_ones(running, client)]
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


def _under_load(running: Daemon, client: Client, subjects: list[Subject]) -> list[str]:
    notes = []
    for subject in subjects:
        subject.ids.clear()
        before, count = _memory(running), 5000
        began = time.perf_counter()
        last = _pour(running, subject, count)
        client.call("event.wait", id=last, timeout=120)
        took = time.perf_counter() - began
        grown = (_memory(running) - before) / 1024
        notes.append(
            f"{subject.name}: {count / took:.0f} events/s sustained, emitted to answered; the host grew {grown:.0f} KiB"
        )
    paced = subjects[0]
    paced.ids.clear()
    began = time.perf_counter()
    for number in range(600):
        time.sleep(max(0.0, began + number / 200 - time.perf_counter()))
        paced.once(client, wait=False)
    client.call("event.wait", id=paced.ids[-1], timeout=60)
    _settle(running, client)
    notes.append(f"200 events/s to one one-shot plugin: dispatch {_spread(Trail(running).dispatch(paced))}")
    return notes


def _pour(running: Daemon, subject: Subject, count: int) -> str:
    """Emit many events over one connection without waiting for each answer; the id of the last."""
    import socket

    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(running.root / "run/isolator/control.sock"))
    lines = sock.makefile("rb")
    requests = b"".join(
        json.dumps(
            {
                "jsonrpc": "2.0",
                "id": number,
                "method": "event.emit",
                "params": {"name": subject.hook, "payload": _payload(subject.hook, number)},
            }
        ).encode()
        + b"\n"
        for number in range(count)
    )
    sender = threading.Thread(target=sock.sendall, args=(requests,))
    sender.start()
    answers = [json.loads(lines.readline()) for _ in range(count)]
    sender.join()
    sock.close()
    return str(max(answers, key=lambda answer: int(answer["id"]))["result"]["id"])


def _beside_bad_ones(running: Daemon, client: Client) -> list[str]:
    """What a plugin that hangs and one that floods its log do to those who emit, and to their neighbours."""
    good = Subject(running, "neighbour", "project.created", ONESHOT)
    bad = [Subject(running, name, "deploy.failed", script) for name, script in (("hangs", HANG), ("floods", FLOOD))]
    good.once(client)
    for subject in bad:
        subject.once(client, wait=False)
    time.sleep(1)
    good.ids.clear()
    good.emits.clear()
    began = time.perf_counter()
    for number in range(400):
        time.sleep(max(0.0, began + number / 100 - time.perf_counter()))
        good.once(client, wait=False)
    client.call("event.wait", id=good.ids[-1], timeout=60)
    _settle(running, client)
    dispatch = _spread(Trail(running).dispatch(good))
    return [
        f"beside a plugin that hangs and one that floods: emit {_spread(good.emits)}, a neighbour's dispatch {dispatch}"
    ]


def _settle(running: Daemon, client: Client) -> None:
    """Wait until the trail has everything."""
    deadline = time.monotonic() + 30
    while client.call("status")["records_pending"] and time.monotonic() < deadline:
        time.sleep(0.05)


def _memory(running: Daemon) -> int:
    pid = running.service_pid("host.serve")
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _spread(values: list[float]) -> str:
    ordered = sorted(values)
    last = len(ordered) - 1
    return f"p50 {ordered[last // 2]:.0f} µs, p99 {ordered[last * 99 // 100]:.0f} µs"
